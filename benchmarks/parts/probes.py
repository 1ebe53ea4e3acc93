"""A table of every training that a comparison has kept, with what it led to or not: probes, failures, looks at val."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from parts.table import table


def told(kept: Path) -> str:
    """A page with every training of a `Lab.export`: by place, number of labels and settings, mIoU of each seed.

    Settings are those that differ from raysal's defaults and are not the same in all trainings. Trainings of one seed that differ
    only in which images are labelled (other queries) stand beside each other.
    """
    entries = [json.loads(line) for line in kept.read_text().splitlines()]
    trainings = [entry["value"] for entry in entries if entry["key"].startswith("training-")]
    flat = [_flat(t["config"]) for t in trainings]
    everywhere = set.intersection(*(set(f.items()) for f in flat)) if flat else set()
    found: dict[tuple[str, str, int, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for training, settings in zip(trainings, flat, strict=True):
        own = ", ".join(f"{k}={v}" for k, v in sorted(settings.items()) if (k, v) not in everywhere)
        fold, labels = training["fold"], training["labels_n"]
        kind = "all" if training["labels"] == "all" else f"{labels:,}"
        found[f"fold {fold[0]}/{fold[1]}" if fold else "val", kind, labels, own][training["seed"]].append(training["miou"])
    rows = [
        [
            place,
            kind,
            settings,
            "; ".join(f"{seed}: " + ", ".join(f"{v:.3f}" for v in sorted(values)) for seed, values in sorted(by_seed.items())),
        ]
        for (place, kind, _, settings), by_seed in sorted(found.items(), key=lambda item: (item[0][3], item[0][0], item[0][2]))
    ]
    same = ", ".join(f"{k}={v}" for k, v in sorted(everywhere))
    return (
        f"# Every training that was kept\n\n{len(trainings)} trainings, by settings; the same in all: {same}. Several mIoU of one seed: "
        "other images were labelled, or the training started from another. Where a batch is not named it is the default.\n\n"
        + table(["measured on", "labels", "settings that differ", "mIoU by seed"], rows)
        + "\n"
    )


def _flat(config: dict[str, Any]) -> dict[str, str]:
    """``section.knob`` -> value as text; the seed is told elsewhere."""
    return {
        f"{section}.{knob}": json.dumps(value)
        for section, knobs in config.items()
        if isinstance(knobs, dict)
        for knob, value in knobs.items()
    }
