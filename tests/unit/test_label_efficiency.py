"""The label-efficiency benchmark's own logic: rows share trainings, results keep by digest, tables say what was measured."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from raysal.config import build, load
from raysal.datasets.synthetic import write_archive
from raysal.errors import InputError
from tests.helpers import tiny_tree

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="benchmarks/ is part of a checkout only")


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("label_efficiency")
    for name in ("label_efficiency", "common", "parts", "parts.lab", "parts.plain", "parts.probes", "parts.table"):
        sys.modules.pop(name, None)


class Ledger:
    """A lab that trains nothing: an image's worth is its number, a training's mIoU the mean of its labels'."""

    def __init__(self) -> None:
        self.trainings: list[Any] = []
        self.lock = threading.Lock()

    def started_with(self, cfg: Any, split: Any, budget: int) -> tuple[str, ...]:
        first = 100 * cfg.seed + (50 if cfg.loop.cold_start == "typical" else 0)
        return tuple(str(first + i) for i in range(budget))

    def trained(self, training: Any) -> dict:
        with self.lock:
            self.trainings.append(training)
        value = sum(map(int, training.labels)) / len(training.labels) / 2000
        counts = {"rock": len(training.labels), "sky": 0}
        record = {"miou": value, "iou": {"rock": value, "sky": None}, "class_images": counts, "panoramas": 3, "sites": 2}
        record["rest"] = {"miou": value / 2, "iou": {}} if len(training.labels) < 100 else None
        return record | {"labels": "all" if len(training.labels) > 100 else list(training.labels)}

    def predicted(self, training: Any, model: dict) -> dict:
        return self.trained(training)

    def asked(self, training: Any, cfg: Any, budget: int) -> tuple[str, ...]:
        rest = [n for n in map(str, range(999, 0, -1)) if n not in training.labels]
        return tuple(rest[:budget] if cfg.query.strategy == "ueq" else rest[-budget:])


@pytest.fixture
def comparison(program: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    cfg = build(tiny_tree(tmp_path))
    items = [type("Item", (), {"name": str(i)})() for i in range(1017)]
    monkeypatch.setattr(program.Split, "open", lambda self, cfg: (None, items, []))
    return program.Comparison(Ledger(), cfg, program.Split())


def test_the_budget_is_the_papers_share_of_the_pool(comparison: Any) -> None:
    assert (comparison.initial, comparison.final) == (16, 32)


@pytest.mark.parametrize(("rounds", "sizes"), [(1, [16, 32]), (2, [16, 24, 32]), (4, [16, 20, 24, 28, 32]), (3, [16, 21, 26, 32])])
def test_rounds_divide_one_final_budget_and_never_buy_twice(program: ModuleType, comparison: Any, rounds: int, sizes: list[int]) -> None:
    steps = comparison.bought(program.Row("row", rounds=rounds, strategy="ueq"), seed=1)
    assert [len(labels) for _, labels in steps] == sizes
    for (_, before), (_, after) in itertools.pairwise(steps):
        assert after[: len(before)] == before and len(set(after)) == len(after)


def test_rows_of_one_seed_share_their_first_training(program: ModuleType, comparison: Any) -> None:
    rows = {row.name: row for row in program.ROWS}
    firsts = {comparison.run(rows[n], 0, rows)[0].record["miou"] for n in ("Random", "BALD", "UEQ, 1 round", "UEQ, 4 rounds", "k-center")}
    assert len(firsts) == 1
    digests = {t.digest() for t in comparison.lab.trainings if len(t.labels) == 16}
    assert len(digests) == 1, "a query's settings must not change a training"
    cold = comparison.run(rows["Random, typical start"], 0, rows)[0]
    assert cold.record["miou"] not in firsts


def test_baselines_train_on_the_labels_they_name(program: ModuleType, comparison: Any) -> None:
    rows = {row.name: row for row in program.ROWS}
    bought = comparison.bought(rows["UEQ, 4 rounds"], 0)[-1][1]
    alone = comparison.run(rows["Labelled only, labels of UEQ, 4 rounds"], 0, rows)
    assert tuple(alone[0].record["labels"]) == bought
    assert comparison.lab.trainings[-1].cfg.cps.weight == 0
    full = comparison.run(rows["Full supervision, 6x steps"], 0, rows)
    assert full[0].labels == 1017 and comparison.lab.trainings[-1].cfg.train.steps == 6 * 12


def test_only_the_first_trainings_of_a_row_are_frozen(program: ModuleType, comparison: Any) -> None:
    row = program.Row("row", rounds=2, strategy="ueq", settings={"loop": {"frozen_rounds": 1}})
    comparison.run(row, 0, {})
    assert [t.cfg.optim.freeze_encoder for t in comparison.trainings(row, 0)] == [True, False, False]


def test_a_digest_knows_what_decides_and_no_path(program: ModuleType, comparison: Any, tmp_path: Path) -> None:
    lab = program.parts_lab
    base = lab.Training(comparison.cfg, ("1", "2"), program.Split())
    moved = lab.with_(comparison.cfg, data={"root": "/elsewhere"}, query={"strategy": "entropy"}, loop={"rounds": 9})
    assert lab.Training(moved.model_copy(update={"run": "other"}), ("1", "2"), program.Split()).digest() == base.digest()
    others = [
        lab.Training(comparison.cfg, ("2", "1"), program.Split()),  # the order of labels decides the draws
        lab.Training(comparison.cfg.model_copy(update={"seed": 5}), ("1", "2"), program.Split()),
        lab.Training(lab.with_(comparison.cfg, cps={"ema": True}), ("1", "2"), program.Split()),
        lab.Training(comparison.cfg, ("1", "2"), program.Split(fold=(0, 3))),
        lab.Training(comparison.cfg, ("1", "2"), program.Split(), start=base),
    ]
    assert len({t.digest() for t in others} | {base.digest()}) == len(others) + 1


def test_what_is_known_is_not_done_again_and_what_was_used_is_kept(program: ModuleType, tmp_path: Path) -> None:
    Lab = program.parts_lab.Lab
    known = tmp_path / "kept.jsonl"
    entries = [{"key": "query-known", "value": ["a"]}, {"key": "data", "value": "mine"}]
    known.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    lab = Lab(str(tmp_path / "cache"), "mine", known, say=lambda _: None)

    def never() -> Any:
        raise AssertionError("done again")

    assert lab._once("query-known", never) == ["a"]
    (tmp_path / "cache" / "query-cached.json").write_text('["b"]')
    assert lab._once("query-cached", never) == ["b"]
    with pytest.raises(AssertionError):
        lab._once("query-new", never)
    (tmp_path / "cache" / "models").mkdir()
    lab.export(tmp_path / "out.jsonl")
    again = Lab(str(tmp_path / "other"), "mine", tmp_path / "out.jsonl")
    assert again._once("query-known", never) == ["a"] and again._once("query-cached", never) == ["b"]
    said: list[str] = []
    other = Lab(str(tmp_path / "third"), "other data", tmp_path / "out.jsonl", said.append)
    assert "other data, not used" in said[0]
    with pytest.raises(AssertionError):
        other._once("query-known", never)
    with pytest.raises(InputError, match="other data"):
        Lab(str(tmp_path / "cache"), "other data")


def test_a_fold_measures_on_whole_sites_and_buys_from_the_others(program: ModuleType, tmp_path: Path) -> None:
    write_archive(str(tmp_path / "data"), 40, 4, 32, 0)
    cfg = build(tiny_tree(tmp_path, data={"reader": "folder", "root": str(tmp_path / "data")}))
    whole = {i.name for i in program.Split().open(cfg)[1]}
    seen: set[str] = set()
    for k in range(3):
        _, pool, held = program.Split(fold=(k, 3)).open(cfg)
        assert {i.name for i in pool} | {i.name for i in held} == whole and pool and held
        assert not {i.group for i in pool} & {i.group for i in held}
        seen |= {i.name for i in held}
    assert seen == whole
    for fold in ((3, 3), (0, 1000)):
        with pytest.raises(InputError, match="site groups"):
            program.Split(fold=fold).open(cfg)
    first = program.parts_lab.fingerprint(cfg)
    mask = next((tmp_path / "data" / "masks").glob("*.png"))
    mask.write_bytes(mask.read_bytes() + b" ")
    assert program.parts_lab.fingerprint(cfg) != first


def test_tables_say_what_was_measured(program: ModuleType, comparison: Any) -> None:
    table, rows = program.table, {row.name: row for row in program.ROWS}
    found = {name: [comparison.run(rows[name], seed, rows) for seed in range(3)] for name in rows}
    paper = {row.name: row.paper for row in program.ROWS}
    values = [points[-1].record["miou"] for points in found["UEQ, 4 rounds"]]
    assert table.final(found, "UEQ, 4 rounds").mean == pytest.approx(sum(values) / 3)
    text = table.main_table(found, paper, {row.name: row.full for row in program.ROWS})
    assert f"| UEQ, 4 rounds | 32 | {table.final(found, 'UEQ, 4 rounds')} |" in text and "76.73 (95.7%)" in text
    assert len(text.splitlines()) == 2 + len(rows)
    long = next(line for line in text.splitlines() if line.startswith(f"| {table.LONG} |"))
    assert "| - |" in long and "%" not in long, "six times the steps have no row with all labels to be compared with"
    pairs = table.pairs_table(found, {"UEQ, 4 rounds": ("Random", "Not run"), "Random": ("Random",)}, ["seed 0", "seed 1", "seed 2"])
    line = pairs.splitlines()[2]
    a, b = table.final(found, "UEQ, 4 rounds").values, table.final(found, "Random").values
    gains = [f"{x - y:+.3f}" for x, y in zip(a, b, strict=True)]
    halves = [f"{(x - y) / 2:+.3f}" for x, y in zip(a, b, strict=True)]
    assert len(pairs.splitlines()) == 3 and line.startswith(f"| UEQ, 4 rounds | Random | {' | '.join(gains)} | ")
    assert line.endswith(f"({', '.join(halves)}) |")
    told = table.rows_of(found, ["seed 0", "seed 1", "seed 2"])["UEQ, 4 rounds"]["seed 2"]
    assert told["miou"][-1] == values[2] and told["labels"][-1] == 32 and told["area"] == table.area(found["UEQ, 4 rounds"][2])
    row = next(line for line in text.splitlines() if line.startswith("| Random | "))
    assert f"| {table.rest(found, 'Random')} |" in row and table.rest(found, "Random").mean == pytest.approx(
        table.final(found, "Random").mean / 2
    )
    assert table.rest(found, "Full supervision") is None
    assert "| 32.0 | 0.0 | 1.0 | 3.0 | 2.0 |" in table.bought_table(found)
    assert table.class_table(found).splitlines()[2].endswith("| - |")  # a class that nobody met has no number
    assert table.area(found["UEQ, 2 rounds"][0]) == pytest.approx(
        sum(
            (a.record["miou"] + b.record["miou"]) / 4
            for a, b in zip(found["UEQ, 2 rounds"][0], found["UEQ, 2 rounds"][0][1:], strict=False)
        )
    )
    gain = table.gain(found, "UEQ, 1 round", "Random")
    assert gain.mean > 0 and gain.half >= 0
    assert table.order({n: found[n] for n in list(found)[:7]}, paper) == pytest.approx(table.order(found, paper))


def test_every_variant_is_a_row_that_changes_what_it_says(program: ModuleType, comparison: Any) -> None:
    variants = program.variant_rows(program.VARIANTS)
    assert len(variants) >= 20 and not {v.name for v in variants} & {r.name for r in program.ROWS}
    settled = program.Comparison(comparison.lab, load(program.PROTOCOL, ["data.root=anywhere"]), comparison.split)
    plain = settled.config(program.Row("plain", strategy="ueq"), 0)
    for row in variants:
        cfg = settled.config(row, 0)
        for section, knobs in row.settings.items():
            for knob in knobs:
                assert getattr(getattr(cfg, section), knob) != getattr(getattr(plain, section), knob), row.name


def test_every_kept_training_is_in_the_table_of_probes(program: ModuleType, tmp_path: Path) -> None:
    def entry(k: int, seed: int, weight: float, miou: float, labels: list[str] | str) -> dict:
        config = {"seed": seed, "cps": {"weight": weight}, "train": {"steps": 10}}
        value = {"config": config, "seed": seed, "fold": [1, 3], "labels_n": 2, "labels": labels, "miou": miou}
        return {"key": f"training-{k}", "value": value}

    trainings = [
        entry(0, 0, 0.3, 0.25, ["a", "b"]),
        entry(1, 0, 0.3, 0.125, ["a", "c"]),
        entry(2, 1, 0.3, 0.5, "all"),
        entry(3, 1, 1.0, 0.75, "all"),
    ]
    kept = tmp_path / "kept.jsonl"
    kept.write_text("".join(json.dumps(e) + "\n" for e in [{"key": "data", "value": "x"}, *trainings]))
    text = program.probes.told(kept)
    assert "4 trainings" in text and "the same in all: train.steps=10." in text
    assert [line for line in text.splitlines() if line.startswith("| fold")] == [
        "| fold 1/3 | 2 | cps.weight=0.3 | 0: 0.125, 0.250 |",
        "| fold 1/3 | all | cps.weight=0.3 | 1: 0.500 |",
        "| fold 1/3 | all | cps.weight=1.0 | 1: 0.750 |",
    ]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--data", "nowhere"], "nowhere"),
        (["--data", ".", "--weights", "no.safetensors"], "--weights"),
        (["--data", "DATA", "--rows", "Rnadom"], "no row is called 'Rnadom'"),
    ],
)
def test_bad_usage_is_one_message_and_no_traceback(
    program: ModuleType, given: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_archive(str(tmp_path / "data"), 4, 2, 32, 0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["label_efficiency.py", "--out", "out", "--quick", *(x.replace("DATA", "data") for x in given)])
    with pytest.raises(SystemExit) as ended:
        program.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and told in said and "Traceback" not in said, said
    assert not (tmp_path / "out").exists() and not (tmp_path / "runs").exists(), "nothing was begun"


def test_pictures_are_drawn(program: ModuleType, comparison: Any, tmp_path: Path) -> None:
    rows = {row.name: row for row in program.ROWS}
    found = {
        name: [comparison.run(rows[name], seed, rows) for seed in range(2)] for name in ("Random", "UEQ, 2 rounds", "Full supervision")
    }
    program.table.curves(found, tmp_path / "curves.png", "title")
    program.table.heat(found, tmp_path / "heat.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("curves.png", "heat.png"))


def test_a_class_that_gains_by_its_images_is_told_from_one_that_does_not(program: ModuleType) -> None:
    def point(rocks: int, sky: int) -> Any:
        iou = {"rock": rocks / 10, "sky": 0.5}
        record = {"iou": iou, "class_images": {"rock": rocks, "sky": sky}, "rest": {"iou": {"rock": 1 - rocks / 10, "sky": None}}}
        return type("Point", (), {"record": record, "labels": 32})()

    trained = [[point(0, 0), point(n, 5)] for n in (1, 4, 2, 3)]
    alone = {"Labelled only": [[point(9, 9)]]}  # one point: it bought nothing itself
    val, within, rest, _ = program.table.worth_table({"UEQ": trained} | alone).splitlines()[3:]
    assert val == "| with IoU on val | +1.00 | - |" and rest.endswith("| -1.00 | - |")
    assert within.endswith("| - | - |"), "one training a seed: nothing is left within it"
    assert "| with IoU on the folds | +1.00 | - |" in program.table.worth_table({"UEQ": trained} | alone, "the folds")
    more = {"Other": [[point(0, 0), point(n, 5)] for n in (2, 5, 3, 4)]}
    assert "| the same within seeds | +1.00 | - |" in program.table.worth_table({"UEQ": trained} | more)
    assert program.table.worth_table({"UEQ": trained[:3]} | alone) == ""
