"""What the label-efficiency runs say."""

from __future__ import annotations

import statistics


def show(found, paper):
    for name, seeds in found.items():
        m = [points[-1].record["miou"] for points in seeds]
        print(
            f"{name:45s} {statistics.mean(m):.4f} ± {statistics.stdev(m) if len(m) > 1 else 0:.4f}  {[[round(p.record['miou'], 4) for p in points] for points in seeds]}"
        )


def write_all(*_):
    pass
