"""What jobs tell: numbers that are counted once and stay visible, lines that machines read; dashboards and docs name what there is."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pyarrow as pa
import pytest
import ray
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray.dashboard.modules.job.common import JOB_ID_METADATA_KEY

from raysal.config import Config, build
from raysal.errors import InputError
from raysal.progress import Ui, failed
from raysal.serving.meters import ServeMeters
from raysal.stream.pool import _Tally
from raysal.stream.worker import STATUSES
from raysal.telemetry import lines, meters
from raysal.telemetry.lines import submission_id
from raysal.telemetry.meters import OF_ALL, Meters, RayMeters, metered
from raysal.train.ray import _watch
from tests.helpers import Call

ROOT = Path(__file__).resolve().parents[2]
STEP = {"step": 40, "loss": 3.0, "sup1": 1.0, "sup2": 1.5, "cps": 0.5, "images_per_second": 9.0, "step_s": 2.0, "data_wait_s": 0.5}
EVALUATION = {"step": 40, "eval": {"miou": 0.5, "iou": {"sand": 0.5, "sky": None}}}


class Fake:
    """A metric of Ray's that is written down instead."""

    made: ClassVar[dict[str, Fake]] = {}

    def __init__(self, name: str, description: str, *more: Any) -> None:
        self.name, self.description, self.tags = name, description, next((m for m in more if isinstance(m, tuple)), ())
        self.always: dict[str, str] = {}
        self.told: list[tuple[dict[str, str], float]] = []
        Fake.made[name] = self

    def set_default_tags(self, tags: dict[str, str]) -> Fake:
        self.always = tags
        return self

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert set(self.tags) == {*tags, *self.always}, self.name
        self.told.append((tags, value))

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0, "Ray refuses it"
        self.set(value, tags)


class FakeCounter(Fake):
    kind = "counter"


class FakeGauge(Fake):
    kind = "gauge"


class FakeHistogram(Fake):
    kind = "histogram"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Metrics by name, as they are made while the test runs."""
    monkeypatch.setattr(Fake, "made", {})
    monkeypatch.setattr(meters, "Counter", FakeCounter)
    monkeypatch.setattr(meters, "Gauge", FakeGauge)
    monkeypatch.delenv(RAY_JOB_CONFIG_JSON_ENV_VAR, raising=False)
    return Fake.made


@pytest.fixture
def of_serve(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The endpoint's metrics by name."""
    from ray.serve import metrics

    for kind in (FakeCounter, FakeGauge, FakeHistogram):
        monkeypatch.setattr(metrics, kind.__name__.removeprefix("Fake"), kind)
    ServeMeters()
    return made


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_rows_are_counted_once_by_status(made: dict[str, Any]) -> None:
    tally = _Tally(10, None, RayMeters("s3://m/labels"))
    assert made["raysal_rows_left"].told == [({}, 10)]
    for ok, fetch in ((4, 0), (3, 2)):
        tally.add(pa.table({"shard": ["a"]} | {s: [{"ok": ok, "fetch": fetch}.get(s, 0)] for s in STATUSES}))
    assert made["raysal_rows_total"].told == [({"status": "ok"}, 4), ({"status": "ok"}, 3), ({"status": "fetch"}, 2)]
    assert [value for _, value in made["raysal_rows_left"].told] == [10, 6, 1]
    assert made["raysal_rows_total"].always == {"run": "s3://m/labels", "submission_id": ""}
    with pytest.raises(InputError):
        tally.add(pa.table({"error": ["InputError"], "message": ["no"]}))
    assert len(made["raysal_rows_total"].told) == 3


def test_a_trainings_records_become_numbers(made: dict[str, Any]) -> None:
    told = RayMeters("run/train")
    told.train(STEP, 100)
    told.train(EVALUATION, 100)
    value = {name: metric.told[-1][1] for name, metric in made.items() if metric.told}
    assert (value["raysal_train_step"], value["raysal_train_steps"], value["raysal_train_images_per_second"]) == (40, 100, 9.0)
    assert (value["raysal_train_step_seconds"], value["raysal_train_data_wait_ratio"]) == (2.0, 0.25)
    assert {tags["term"]: v for tags, v in made["raysal_train_loss"].told} == {k: STEP[k] for k in ("loss", "sup1", "sup2", "cps")}
    assert value["raysal_val_miou"] == 0.5
    assert made["raysal_val_iou"].told == [({"class": "sand"}, 0.5)]  # no IoU where a class occurs nowhere


def test_without_ray_nothing_is_counted_and_no_thread_runs() -> None:
    assert not ray.is_initialized()
    with metered("labels") as told:
        assert type(told) is Meters
        told.rows({"ok": 1}, 0)
        told.model("0" * 64, "eager")
        told.train(STEP, 100)
        assert "meters" not in {thread.name for thread in threading.enumerate()}


def test_what_stays_as_it_is_is_told_again_until_the_work_ends(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(meters, "BEAT_S", 0.01)
    with metered("labels") as told:
        told.model("0123456789abcdef" * 4, "eager")
        told.rows({"ok": 2}, 3)
        deadline = time.monotonic() + 30
        while len(made["raysal_rows_left"].told) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert set(map(str, made["raysal_job_model_info"].told)) == {str(({"digest": "0123456789ab", "runtime": "eager"}, 1))}
    assert len(made["raysal_rows_left"].told) >= 3
    assert len(made["raysal_rows_total"].told) == 1, "a counter must not be told again"
    told_so_far = len(made["raysal_rows_left"].told)
    time.sleep(0.1)
    assert len(made["raysal_rows_left"].told) == told_so_far


def test_a_training_is_watched_to_its_last_record(tmp_path: Path) -> None:
    seen: list[dict] = []
    progress: list[tuple] = []
    told = SimpleNamespace(train=lambda record, steps: seen.append(record))
    with _watch(Config(), str(tmp_path), told, lambda *now: progress.append(now)):  # type: ignore[arg-type]
        records = [{"start": 0}, {**STEP, "step": 39}, STEP, EVALUATION]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert seen[-2:] == [STEP, EVALUATION]
    assert progress == [(40, Config().train.steps, STEP)]


def test_ray_tells_a_job_its_submission_id_as_we_look_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RAY_JOB_CONFIG_JSON_ENV_VAR, raising=False)
    assert submission_id() == ""
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, json.dumps({"runtime_env": {}, "metadata": {JOB_ID_METADATA_KEY: "raysal-label-1"}}))
    assert submission_id() == "raysal-label-1"
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, json.dumps({"runtime_env": {}, "metadata": None}))
    assert submission_id() == ""


# --- dashboards and docs ----------------------------------------------------------------------------------------------


def exported(metrics: dict[str, Any]) -> set[str]:
    """Names under which Prometheus finds them."""
    plain = {f"ray_{name}" for name, metric in metrics.items() if metric.kind != "histogram"}
    parts = {f"ray_{n}_{part}" for n, metric in metrics.items() if metric.kind == "histogram" for part in ("bucket", "sum", "count")}
    return plain | parts


def asked(file: str) -> tuple[set[str], str]:
    """Metrics that a dashboard names, and its text."""
    text = (ROOT / "deploy/grafana" / file).read_text()
    queries = [target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"]]
    queries += [str(variable["query"]) for variable in json.loads(text)["templating"]["list"]]
    return {name for query in queries for name in re.findall(r"\bray_\w+", query)}, text


@pytest.mark.parametrize("file", ["jobs.json", "endpoint.json"])
def test_a_dashboard_names_metrics_that_exist(file: str, of_serve: dict[str, Any]) -> None:
    RayMeters("labels")
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    names, _ = asked(file)
    of_ray = {name for name in names if not name.startswith("ray_raysal_")}
    assert names - of_ray <= exported(of_serve), names - exported(of_serve)
    assert of_ray <= {f"ray_{name}" for name in METRICS_GAUGES}


def test_the_dashboard_of_jobs_shows_each_of_their_numbers(made: dict[str, Any]) -> None:
    RayMeters("labels")
    assert exported(made) <= asked("jobs.json")[0]


@pytest.mark.parametrize("file", ["jobs.json", "endpoint.json"])
def test_panels_of_a_dashboard_have_places_of_their_own(file: str) -> None:
    panels = json.loads(asked(file)[1])["panels"]
    assert len({panel["id"] for panel in panels}) == len({(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}) == len(panels)


def documented() -> dict[str, tuple[str, set[str], str]]:
    """Kind, labels and meaning of each metric in docs/metrics.md."""
    rows = re.findall(r"^\| `(raysal_\w+)` \| (\w+) \|([^|]*)\| (.*) \|$", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    assert len({name for name, *_ in rows}) == len(rows)
    return {name: (kind, set(re.findall(r"`(\w+)`", labels)), what) for name, kind, labels, what in rows}


def test_the_docs_list_each_metric_as_it_is(of_serve: dict[str, Any]) -> None:
    RayMeters("labels")
    assert documented() == {n: (metric.kind, {*metric.tags} - {*OF_ALL}, metric.description) for n, metric in of_serve.items()}


# --- lines ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def log() -> Iterator[None]:
    """raysal's logger, as it was afterwards."""
    before = lines.LOG.handlers, lines.LOG.propagate, lines.LOG.level
    yield
    lines.LOG.handlers, lines.LOG.propagate = before[:2]
    lines.LOG.setLevel(before[2])


def json_of(err: str) -> list[dict]:
    return [json.loads(line, parse_constant=pytest.fail) for line in err.splitlines()]


def test_lines_are_json_with_run_and_job_where_that_is_asked(
    log: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, json.dumps({"metadata": {JOB_ID_METADATA_KEY: "raysal-train-1"}}))
    with Ui.of(False, build({"run": "s3://m/run", "compute": {"log_json": True}})) as ui:
        ui.warning("a class is missing")
        ui.stage(1, "train", "start", 0)
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_job_id=lambda: "02000000"))
        ui.progress(40, 40, STEP)
        ui.stage(1, "train", "done", 8.5)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)  # the command has left the cluster
        ui.round({"round": 1, "labels": 9, "miou": 0.25, "seconds": {}})
        ui.progress(1, 1, {"loss": float("nan")})
    ui.result({"run": "s3://m/run"}, lambda: pytest.fail("no table among JSON lines"))
    failed(InputError("no\nroom"))
    out, err = capsys.readouterr()
    said = json_of(err)
    assert out == "" and all(line["run"] == "s3://m/run" and line["submission_id"] == "raysal-train-1" for line in said)
    assert Counter(line["levelname"] for line in said) == {"WARNING": 1, "INFO": 6, "ERROR": 1}
    assert [line.get("job_id") for line in said] == [None, None, *["02000000"] * 6]
    progress, done, round_, diverged, result, error = said[2:]
    assert diverged["loss"] is None
    assert (progress["done"], progress["total"], progress["loss"]) == (40, 40, 3.0)
    assert (done["stage"], done["round"], done["seconds"]) == ("train", 1, 8.5)
    assert (round_["labels"], round_["miou"]) == (9, 0.25)
    assert result["result"] == {"run": "s3://m/run"} and error["message"] == "no\nroom"
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}$", line["asctime"]) for line in said)


def test_lines_are_for_people_unless_asked(log: None, capsys: pytest.CaptureFixture[str]) -> None:
    with Ui.of(False, Config()) as ui:
        ui.warning("a class is missing")
    failed(InputError("no room"))
    assert capsys.readouterr().err == "warning: a class is missing\nraysal: no room\n"


def test_a_refusal_is_a_line_like_all_others(log: None, raysal: Call, tmp_path: Path) -> None:
    code, out, err = raysal(
        "query", tmp_path / "none", "--budget", 3, "--out", tmp_path / "queue.parquet", "--set", "compute.log_json=true"
    )
    [line] = json_of(err)
    assert (code, out, line["levelname"], line["run"]) == (2, "", "ERROR", str(tmp_path / "queue.parquet"))
    assert str(tmp_path / "none") in line["message"]


def test_exceptions_stay_one_line(log: None, capsys: pytest.CaptureFixture[str]) -> None:
    logger = lines.json_lines("run")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("raysal.model").exception("a library's word")
    [line] = json_of(capsys.readouterr().err)
    assert line["message"] == "a library's word" and "ValueError: two\nlines" in line["exc_text"] and logger.name == "raysal"
