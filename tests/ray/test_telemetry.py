"""The numbers of jobs, as Prometheus reads them from a node."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pyarrow as pa
import pytest
import ray
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from raysal.archive.tables import manifest_schema
from raysal.model.checkpoint import digest_at
from raysal.stream.label import label_pool
from raysal.telemetry.meters import COUNTERS, GAUGES
from raysal.train.logs import read_log
from raysal.train.ray import fit
from tests.helpers import tiny
from tests.ray.scenes import configured, manifest_at
from tests.ray.test_train import plan_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_runtime")]

OF_STREAMS = {"ray_raysal_rows_total", "ray_raysal_rows_left", "ray_raysal_job_model_info"}
WAIT_S = 120.0

Numbers = dict[tuple[str, str], float]
"""By name, and by the value of the one label that matters here."""


def families() -> list[Metric]:
    """What all nodes tell now."""
    targets = [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in ray.nodes() if node["Alive"]]
    return [family for target in targets for family in text_string_to_metric_families(httpx.get(target, timeout=60).text)]


def wait(run: Path, label: str, ready: Callable[[Numbers], bool]) -> Numbers:
    """The numbers of a run once they are ready: Ray hands them on every ten seconds."""
    numbers: Numbers = {}
    deadline = time.monotonic() + WAIT_S
    while not ready(numbers):
        assert time.monotonic() < deadline, numbers
        time.sleep(1)
        samples = [s for family in families() for s in family.samples if s.labels.get("run") == str(run)]
        assert all(sample.labels["submission_id"] == "" for sample in samples)
        numbers = {(sample.name, sample.labels.get(label, "")): sample.value for sample in samples}
    return numbers


def names(numbers: Numbers) -> set[str]:
    return {name for name, _ in numbers}


def test_a_label_job_tells_its_rows_and_its_model(checkpoint: str, archive: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"not an image")
    broken = pa.Table.from_pylist([{"id": "f" * 32, "uri": str(tmp_path / "broken.png"), "exclude": []}], schema=manifest_schema())
    manifest, out = pa.concat_tables([manifest_at(archive).slice(0, 7), broken]), tmp_path / "labels"
    summary = label_pool(manifest, checkpoint, str(out), configured(score_actors=1), rows_per_shard=3)
    assert summary.counts["ok"] == 7 and summary.counts["decode"] == 1
    numbers = wait(out, "status", lambda now: names(now) >= OF_STREAMS and now["ray_raysal_rows_left", ""] == 0)
    assert {key: value for key, value in numbers.items() if key[0] == "ray_raysal_rows_total"} == {
        ("ray_raysal_rows_total", "ok"): 7,
        ("ray_raysal_rows_total", "decode"): 1,
    }
    [model] = [s for family in families() for s in family.samples if s.name == "ray_raysal_job_model_info" and s.labels["run"] == str(out)]
    assert (model.labels["digest"], model.labels["runtime"], model.value) == (digest_at(checkpoint)[:12], summary.runtime, 1)


def test_a_training_tells_its_last_losses_and_miou(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    trained = fit(plan_of(tiny(tmp_path)), str(folder))
    assert trained.metrics is not None
    wanted = {f"ray_{name}" for name in {*COUNTERS, *GAUGES}} - OF_STREAMS
    numbers = wait(folder, "term", lambda now: names(now) >= wanted and now["ray_raysal_train_step", ""] == 12)
    last = [record for record in read_log(str(folder)) if "loss" in record][-1]
    assert {term: value for (name, term), value in numbers.items() if name == "ray_raysal_train_loss"} == pytest.approx(
        {term: last[term] for term in ("loss", "sup1", "sup2", "cps")}
    )
    assert numbers["ray_raysal_train_steps", ""] == 12
    assert numbers["ray_raysal_val_miou", ""] == pytest.approx(trained.metrics["miou"])
    assert numbers["ray_raysal_train_images_per_second", ""] == pytest.approx(last["images_per_second"])
    assert 0 <= numbers["ray_raysal_train_data_wait_ratio", ""] <= 1


def test_rays_own_numbers_on_the_dashboard_are_told() -> None:
    dashboard = json.loads((Path(__file__).resolve().parents[2] / "deploy/grafana/jobs.json").read_text())
    shown = {n for panel in dashboard["panels"] for target in panel["targets"] for n in re.findall(r"ray_node_\w+", target["expr"])}
    shown -= {n for n in shown if "gpu" in n}  # there may be none here
    assert len(shown) >= 4
    there: set[str] = set()
    deadline = time.monotonic() + WAIT_S
    while not shown <= there and time.monotonic() < deadline:
        time.sleep(1)
        there |= {sample.name for family in families() for sample in family.samples}
    assert shown <= there, shown - there
