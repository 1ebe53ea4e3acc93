"""The report: complete on a whole run, honest on half a run, harmless whatever the files say."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from raysal.archive.tables import labels_schema, queue_schema, read_table, write_table
from raysal.datasets.base import Item
from raysal.errors import InputError
from raysal.labels import S5MARS, LabelSet
from raysal.model.network import TwoBranch
from raysal.model.runtime import Predictor
from raysal.report import build, examples, figures, page, sections
from raysal.report.asked import THUMBS, THUMBS_IN_ALL, pool_masks, requests
from raysal.report.examples import VAL_IMAGES
from raysal.report.gather import Round, Run, label_set, mean_fractions, read_run
from raysal.report.pictures import Limits
from raysal.report.theme import THEMES, plain, png
from raysal.train.evaluate import evaluate
from raysal.words import duration, percent
from tests.pages import EVIL, Page
from tests.run_folder import CLASSES, Fabricator, dataset_of, put, tiny_config

CHARTS = (
    "learning_curve",
    "class_iou",
    "class_balance",
    "confusion",
    "reliability",
    "audit",
    "losses",
    "agreement",
    "seconds",
    "throughput",
)
SHEETS = ("val_best", "val_worst", "asked_round_000", "asked_round_001", "pool_masks")
MB = 2**20


def text_of(run: Path) -> str:
    return (run / "report" / "index.html").read_text(encoding="utf-8")


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_a_whole_run_gives_every_figure_on_the_page_and_as_a_file(whole: Path) -> None:
    html = text_of(whole)
    for name in (*CHARTS, *SHEETS):
        with Image.open(whole / "report" / f"{name}.png") as picture:
            assert min(picture.size) > 300, name
    for name in CHARTS:
        assert base64.b64encode((whole / "report" / f"{name}.png").read_bytes()).decode() in html, name
    assert "could not show" not in html


def test_the_page_needs_nothing_but_itself(whole: Path) -> None:
    seen = Page(text_of(whole))
    assert not [tag for tag, _ in seen.tags if tag in ("script", "iframe", "object", "embed", "base", "form")]
    links = [a[key] for _, a in seen.tags for key in ("src", "srcset", "href", "action", "poster", "data") if a.get(key)]
    assert links
    assert all(str(link).startswith(("data:", "#")) for link in links)
    assert not re.search(r"url\((?!\s*data:)|@import", text_of(whole))
    assert not [a for _, a in seen.tags for key in a if key.startswith("on")]


def test_every_chart_says_how_to_read_it(whole: Path) -> None:
    seen = Page(text_of(whole))
    charts = [
        a for a in seen.all("img") if any(str(a.get("alt", "")).startswith(t) for t in ("Learning curve", "Quality of", "Class balance of"))
    ]
    assert len(charts) == 3
    assert all(len(str(a["alt"])) > 60 for a in charts)
    assert all(a.get("alt") for a in seen.all("img"))
    assert len(seen.all("source")) == len(CHARTS)
    assert len(seen.all("figcaption")) == len(CHARTS) + 1


def test_the_first_screen_tells_quality_labels_and_share_of_full_supervision(whole: Path) -> None:
    metrics = json.loads((whole / "rounds/001/metrics.json").read_text())
    text = Page(text_of(whole)).text
    assert percent(metrics["miou"]) in text
    assert "7 of 16" in text
    assert f"{percent(metrics['miou'] / 0.8)} of full supervision (80.0\N{NO-BREAK SPACE}%)" in text
    assert duration(2 * 0.4 + 2 * 0.2 + 61.5 + 62.5 + 8.1 + 5.5) in text


def test_the_page_says_what_an_audit_and_thresholds_came_to(whole: Path) -> None:
    found = json.loads((whole / "audit.json").read_text())
    text = " ".join(Page(text_of(whole)).text.split())
    assert f"Experts labelled {len(found['images'])} random images of {found['population']}" in text
    for entry in found["abstention"]:
        assert percent(entry["kept_of_all"]) in text and percent(entry["precision"]) in text
    assert "audit: right" in text


@pytest.mark.parametrize(
    "audit", [[], "text", {"miou": 3}, {"iou": [1], "images": 5}, {"abstention": [1, {"precision": None}], "miou": {}}]
)
def test_an_audit_of_any_shape_makes_a_page(partial: Path, audit: object) -> None:
    put(partial / "audit.json", audit)
    assert "raysal report" in Path(build(str(partial))).read_text()


def test_an_audit_of_another_model_is_not_shown_as_this_ones(whole: Path, tmp_path: Path) -> None:
    run = copy_of(whole, tmp_path / "run", without="audit.json")
    put(run / "audit.json", json.loads((whole / "audit.json").read_text()) | {"model_digest": "other"})
    found = read_run(str(run))
    assert not found.audit and any("another model" in note for note in found.notes)


def test_rows_that_are_not_ok_are_listed_with_their_reason(whole: Path) -> None:
    html = text_of(whole)
    assert "not &lt;i&gt;an&lt;/i&gt; image" in html
    assert [(t.where, t.status, t.count) for t in page.trouble(read_run(str(whole)))] == [("scores of round 0", "decode", 1)]


def test_two_reports_of_one_run_differ_only_in_their_time_and_leave_nothing_out(whole: Path) -> None:
    def without_time(html: str) -> str:
        return re.sub(r"Written .*? UTC", "", html)

    run = read_run(str(whole))
    assert without_time(page.render(run, str(whole / "report"))) == without_time(text_of(whole))
    assert run.notes == []


def test_val_images_are_ranked_by_their_own_miou(whole: Path) -> None:
    run = read_run(str(whole))
    assert run.config is not None
    seen = examples.examples(run, run.config, str(whole / "rounds/001/checkpoint"))
    predictor = Predictor.load(str(whole / "rounds/001/checkpoint"))
    dataset = dataset_of(whole, run.config)
    expected = {item.name: evaluate(predictor, dataset, [item], 1).miou for item in dataset.split("val")}
    shown = [(e.item.name, e.miou) for e in (*seen.worst, *reversed(seen.best))]
    assert shown == [pair for pair in sorted(expected.items(), key=lambda pair: pair[1]) if pair in shown]
    assert seen.best[0].miou == max(expected.values())
    assert seen.worst[0].miou == min(expected.values())
    assert seen.looked == seen.total == 5
    assert all(e.uncertainty is not None and 0 <= e.uncertainty.min() <= e.uncertainty.max() <= 1.0001 for e in (*seen.best, *seen.worst))


def test_the_longer_last_training_is_the_one_that_is_shown(whole: Path, tmp_path: Path) -> None:
    made = Fabricator(tiny_config(str(tmp_path)))
    made.choose(0)
    made.evaluate(0, TwoBranch(made.cfg.model, len(CLASSES), 0))
    assert str(read_run(str(tmp_path)).rounds[0].checkpoint).endswith("/checkpoint")
    final = tmp_path / "rounds/000/checkpoint-final"
    (tmp_path / "rounds/000/checkpoint").rename(final)
    put(tmp_path / "rounds/000/final/metrics.jsonl", '{"step": 7, "loss": 1.0}\n{"half a li')
    this = read_run(str(tmp_path)).rounds[0]
    assert this.checkpoint == str(final)
    assert this.steps == ({"step": 7, "loss": 1.0},)


# --- half a run, and damaged files ------------------------------------------------------------------------------------


def test_a_run_without_a_finished_round_says_so(partial: Path) -> None:
    build(str(partial))
    text = Page(text_of(partial)).text
    assert "No round has finished yet" in text
    assert "choose, buy done" in text
    assert "4 of 16" in text
    assert "no curve to draw" in text
    assert "could not show" not in text


def test_a_folder_with_nothing_but_a_config_makes_a_page(tmp_path: Path) -> None:
    put(tmp_path / "config.yaml", tiny_config(str(tmp_path)).to_yaml())
    assert "no round has begun" in Page(Path(build(str(tmp_path))).read_text()).text


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, there: bool) -> None:
    with pytest.raises(InputError, match=r"no run folder.*raysal loop"):
        build(str(tmp_path if there else tmp_path / "missing"))
    assert not (tmp_path / "report").exists()


def copy_of(run: Path, to: Path, without: str) -> Path:
    """A copy by hard links, whose files are replaced and never written into, without files of one name."""
    for source in run.rglob("*"):
        if source.is_file() and "report" not in source.relative_to(run).parts and source.name != without:
            target = to / source.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(source)
    return to


EVERY_FILE = (
    "config.yaml", "run.json", "manifest.parquet", "data/splits.json", "rounds/001/chosen.parquet", "rounds/001/labels.parquet",
    "rounds/001/metrics.json", "rounds/001/train/metrics.jsonl", "rounds/001/checkpoint/model.json",
    "rounds/001/checkpoint/model.safetensors", "rounds/000/scores/part-0.parquet", "rounds/001/stages/train.json", "labels/part-0.parquet",
    "audit.json",
)  # fmt: skip


@pytest.mark.parametrize("damage", ["missing", "garbage"])
@pytest.mark.parametrize("name", EVERY_FILE)
def test_no_missing_or_damaged_file_costs_the_page(
    whole: Path, tmp_path: Path, name: str, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections.Desk, "draw", lambda *_, **__: [])  # other tests draw; 26 pages of charts would take minutes
    monkeypatch.setattr(page, "write_sheets", lambda *_: None)
    needs_model = name.startswith(("data/", "rounds/001/checkpoint"))
    run = copy_of(whole, tmp_path / "run", without="" if needs_model else "model.json")
    (run / name).unlink()
    if damage == "garbage":
        (run / name).write_bytes(b"\x00\xff{[garbage")
    html = Path(build(str(run))).read_text()
    assert "Where this comes from" in html
    if damage == "garbage" and not name.endswith(".jsonl"):  # a line of a log that was cut short is no news
        assert "could not show" in html, "damage that was seen is told"


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        "text",
        {"miou": "0.5"},
        {"miou": 0.4, "labels": None, "iou": [1, 2], "confusion": [[1, 2], [3]], "calibration": 7, "seconds": {"train": "long"}},
        {"miou": 0.4, "labels": 3, "iou": {"sky": None}, "confusion": {}, "calibration": {"pixels": [1], "accuracy": None}},
        {"miou": float("nan"), "labels": 3},
        {"miou": 0.4, "labels": 3, "abstention": 7},
        {"miou": 0.4, "labels": 3, "abstention": [3, {"precision": "x", "threshold": {"sky": None}}]},
    ],
)
def test_metrics_of_any_shape_make_a_page(partial: Path, metrics: object) -> None:
    put(partial / "rounds/000/metrics.json", metrics)
    assert "raysal report" in Path(build(str(partial))).read_text()


def test_the_first_screen_shows_masks_of_the_pool_where_there_are_no_val_images(whole: Path, tmp_path: Path) -> None:
    assert "Held-out images, an even spread" in text_of(whole)
    run = read_run(str(copy_of(whole, tmp_path / "run", without="model.json")))
    hero = page._hero(None, pool_masks(run, S5MARS, Limits()), S5MARS)
    assert len(hero["tiles"]) == 6
    assert "Images of the archive under their masks" in page.render(run, str(tmp_path / "run" / "report"))


@pytest.mark.parametrize(("side_px", "shown"), [(128, 6), (512, 0)])
def test_small_images_stand_in_a_row_and_large_ones_alone(side_px: int, shown: int) -> None:
    ids = np.zeros((side_px, side_px), dtype=np.uint8)
    one = examples.Example(Item("a", "a"), 0.5, np.zeros((side_px, side_px, 3), dtype=np.uint8), ids, ids)
    seen = examples.Examples((one,), (one,), one, (one,) * 6, 6, 6, 0.1, S5MARS)
    assert len(page._hero(seen, [], S5MARS)["many"]) == shown


def test_images_that_are_gone_leave_a_sentence_in_their_place(partial: Path) -> None:
    gone = read_table(str(partial / "rounds/000/chosen.parquet"))["uri"][0].as_py()
    Path(gone).unlink()
    build(str(partial))
    assert re.search(r'<div class="gone">fetch: [^<]*scene', text_of(partial))


# --- hostile files ----------------------------------------------------------------------------------------------------


def test_text_from_files_is_never_markup(partial: Path) -> None:
    cfg = tiny_config(str(partial)).model_copy(update={"name": EVIL})
    put(partial / "config.yaml", cfg.to_yaml())
    put(partial / "run.json", {EVIL: EVIL, "warnings": [EVIL]})
    put(partial / "rounds/000/stages" / "buy.json", {"seconds": 1, "outputs": {"images_per_second": 3, "warnings": [EVIL]}})
    put(
        partial / "rounds/000/metrics.json", {"miou": 0.3, "labels": 4, "iou": {EVIL: 0.5}, "checkpoint_digest": EVIL, "seconds": {EVIL: 3}}
    )
    chosen = [{"rank": 1, "id": "a", "uri": f"/nowhere/{EVIL}", "strategy": EVIL, "score": 0.5, "reasons": [(EVIL, 0.5)], "round": 0}]
    write_table(str(partial / "rounds/000/chosen.parquet"), pa.Table.from_pylist(chosen, schema=queue_schema()))
    bad = [{"id": "a", "uri": EVIL, "status": EVIL, "error": EVIL}]
    write_table(str(partial / "labels/part-0.parquet"), pa.Table.from_pylist(bad, schema=labels_schema()))
    build(str(partial))
    html = text_of(partial)
    assert html.count("&lt;script&gt;") >= 8
    seen = Page(html)
    assert not seen.all("script")
    assert not [a for a in seen.all("img") if a.get("src") == "x"]
    assert not [a for _, a in seen.tags if any(key.startswith("on") for key in a)]
    assert "default-src 'none'" in html


def test_class_names_of_any_kind_are_drawn(partial: Path) -> None:
    names = ("$\\frac", "a\nb", "x" * 500, "岩", "\\$5$", "<b>", "%s {0}", "", "\x00")
    odd = LabelSet("odd", names, S5MARS.colors)
    rng = np.random.default_rng(0)
    for theme in THEMES:
        png(figures.class_iou(["0"], names, odd.colors, rng.random((1, 9)), theme))
        png(figures.confusion(names, odd.colors, rng.integers(0, 9, (9, 9)), theme))


@settings(deadline=None)
@given(st.text())
def test_text_for_figures_is_one_short_line_without_mathematics(text: str) -> None:
    drawn = plain(text, 12)
    assert drawn.isprintable()
    assert len(drawn.replace(r"\$", "$")) <= 12
    assert drawn.count("$") == drawn.count(r"\$")


# --- size -------------------------------------------------------------------------------------------------------------


def test_a_long_run_of_noisy_images_stays_light_enough_to_mail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny_config(str(tmp_path), rounds=29, per_round=40)
    put(tmp_path / "config.yaml", cfg.to_yaml())
    uris = []
    for i in range(40):
        uris.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(uris[-1])
    for n in range(30):
        rows = [{"rank": i, "id": f"{n}-{i}", "uri": uri, "strategy": "ueq", "score": 0.5, "round": n} for i, uri in enumerate(uris)]
        write_table(str(tmp_path / f"rounds/{n:03d}/chosen.parquet"), pa.Table.from_pylist(rows, schema=queue_schema()))
    monkeypatch.setattr(page, "write_sheets", lambda *_: None)
    seen = requests(read_run(str(tmp_path)), Limits(), 9)
    assert sum(len(r.images) for r in seen) == THUMBS_IN_ALL
    assert {r.total for r in seen} == {40}
    assert len(build(str(tmp_path))) > 0
    noise = (tmp_path / "report/index.html").stat().st_size
    assert 2 * MB < noise < 12 * MB, f"{noise / MB:.1f} MB leave no room for charts and strips under 15 MB"


def test_a_round_shows_its_first_images_by_rank(partial: Path) -> None:
    table = read_table(str(partial / "rounds/000/chosen.parquet"))
    many = pa.concat_tables([table] * 20).to_pylist()
    rows = [row | {"rank": len(many) - i} for i, row in enumerate(many)]
    write_table(str(partial / "rounds/000/chosen.parquet"), pa.Table.from_pylist(rows, schema=queue_schema()))
    [request] = requests(read_run(str(partial)), Limits(), 9)
    assert [i.rank for i in request.images] == [str(n) for n in range(1, THUMBS + 1)]
    assert request.total == 80


def test_a_large_val_split_is_sampled_evenly(whole: Path) -> None:
    run = read_run(str(whole))
    assert run.config is not None
    dataset = dataset_of(whole, run.config)
    items = [Item(str(i), dataset.split("val")[0].image) for i in range(1000)]
    names = [int(item.name) for item in examples._sample(items, run.config, dataset)]
    assert len(names) == VAL_IMAGES
    assert names[0] == 0
    assert names[-1] == 999
    assert max(np.diff(names)) - min(np.diff(names)) <= 1


def test_masks_of_a_large_pool_are_a_spread_over_its_shards(whole: Path) -> None:
    run = read_run(str(whole))
    masks = pool_masks(run, S5MARS, Limits(), tiles=6)
    names = read_table(str(whole / "labels"), ["uri"])["uri"].to_pylist()
    where = [names.index(m.uri) for m in masks]
    assert where == [0, 4, 7, 8, 12, 15]
    assert all(not isinstance(m.picture, str) for m in masks)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_reasons_and_fractions_of_a_choice_come_from_the_scores_it_was_made_on(whole: Path) -> None:
    first, second = requests(read_run(str(whole)), Limits(), 9)
    assert first.words == "drawn by lot"
    assert all(i.fractions is None and not i.reasons for i in first.images)
    scores = {row["id"]: row for row in read_table(str(whole / "rounds/000/scores")).to_pylist()}
    chosen = read_table(str(whole / "rounds/001/chosen.parquet")).to_pylist()
    for image, row in zip(second.images, chosen, strict=True):
        assert image.fractions == pytest.approx(scores[row["id"]]["class_fractions"])
        assert dict(image.reasons) == {"uncertainty": scores[row["id"]]["uncertainty"], "entropy": scores[row["id"]]["entropy"]}


def test_class_balance_counts_the_pixels_and_images_that_were_bought(whole: Path) -> None:
    run = read_run(str(whole))
    rows = [row for n in range(2) for row in read_table(str(whole / f"rounds/{n:03d}/labels.parquet"))["class_pixels"].to_pylist()]
    assert sections.bought_pixels(run, 9).tolist() == np.sum(rows, axis=0).tolist()
    assert sections.bought_images(run, 9).tolist() == (np.array(rows) > 0).sum(0).tolist()


def test_mean_fractions_leave_out_rows_without_any() -> None:
    table = pa.table({"class_fractions": pa.array([[0.5, 0.5], None, [1.0, 0.0], [1.0]], pa.list_(pa.float32()))})
    mean = mean_fractions(table, 2)
    assert mean is not None
    assert mean.tolist() == [0.75, 0.25]
    assert mean_fractions(table.slice(1, 1), 2) is None
    assert mean_fractions(None, 2) is None


def test_speed_is_the_last_measured_and_time_the_sum_of_all_stages(whole: Path) -> None:
    run = read_run(str(whole))
    assert sections.rates(run) == {"train": 20.0, "score": 31.4, "label": 25.0}
    assert sections.times(run)["round 0"] == {"choose": 0.4, "buy": 0.2, "train": 61.5, "score": 8.1}


def test_the_label_set_is_the_checkpoints_and_else_the_configurations(whole: Path, partial: Path, tmp_path: Path) -> None:
    assert label_set(read_run(str(whole))) == S5MARS
    assert label_set(read_run(str(partial))).name == "s5mars"
    metrics = {"miou": 0.5, "iou": {"dune": 0.5, "crater": 0.5}}
    unknown = Run(str(tmp_path), rounds=(Round(0, str(tmp_path), metrics, (), (), (), {}),))
    assert label_set(unknown).classes == ("dune", "crater")
