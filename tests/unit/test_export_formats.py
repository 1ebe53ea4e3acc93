"""Each format, read back by the library of those who use it, gives the masks back to the pixel."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from raysal.config import DataConfig
from raysal.datasets.folder import read as read_folder
from raysal.errors import InputError
from raysal.export import cvat, hugging_face, label_studio
from raysal.export.run import Summary, export_labels
from raysal.labels import S5MARS, LabelSet
from tests.unit.exports import DIGEST, THREE, id_of, mask, masks, put_labels, row, uris

Masks = dict[str, np.ndarray]
"""Masks by uri."""

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools with newer numpy
any_labels = given(st.lists(masks, min_size=8, max_size=8), uris)
few = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow])


def export(format_: str, given_: Masks, place: Path, label_set: LabelSet = THREE, **options: object) -> tuple[Path, Summary]:
    """Writes a table of these masks and a failed image, exports it, and returns where."""
    rows = [row(uri, m) for uri, m in given_.items()]
    labels = put_labels(str(place / "labels"), [*rows, row(next(iter(given_)) + ".gone")], label_set)
    done = export_labels(labels, format_, str(place / "out"), **options)  # type: ignore[arg-type]
    assert (done.written, done.left_out, done.warnings) == (len(rows), {"fetch": 1}, [])
    return place / "out", done


def names_in(out: Path) -> dict[str, dict[str, str]]:
    """The table of names: uri -> its line."""
    with open(out / "names.csv", newline="", encoding="utf-8") as file:
        return {line["uri"]: line for line in csv.DictReader(file)}


def round_trip(format_: str, back: Callable[[Path], Masks], found: list[np.ndarray], addresses: list[str]) -> None:
    """Exports masks under these URIs and compares what `back` reads."""
    wanted = dict(zip(addresses, found, strict=False))
    with tempfile.TemporaryDirectory() as place:
        out, _ = export(format_, wanted, Path(place))
        read = back(out)
    assert read.keys() == wanted.keys()
    for uri, mask_HW in wanted.items():
        np.testing.assert_array_equal(read[uri], mask_HW, err_msg=uri)


# --- PNG --------------------------------------------------------------------------------------------------------------


def from_png(out: Path) -> Masks:
    return {uri: np.asarray(Image.open(out / line["file"])) for uri, line in names_in(out).items()}


@few
@any_labels
def test_png_files_hold_class_ids(found: list[np.ndarray], addresses: list[str]) -> None:
    round_trip("png", from_png, found, addresses)


@few
@any_labels
def test_coloured_png_files_hold_class_ids_too(found: list[np.ndarray], addresses: list[str]) -> None:
    round_trip("png-colour", from_png, found, addresses)


def test_png_files_are_those_of_the_table_to_the_byte_and_colours_those_of_the_label_set(tmp_path: Path) -> None:
    m = mask(0, 1, 2, 255)
    out, _ = export("png", {"/m/a.jpg": m}, tmp_path / "1")
    assert (out / "masks/a.png").read_bytes() == row("/m/a.jpg", m)["mask_png"]
    out, _ = export("png-colour", {"/m/a.jpg": m}, tmp_path / "2")
    image = Image.open(out / "masks/a.png")
    assert image.mode == "P"
    np.testing.assert_array_equal(np.asarray(image.convert("RGB")), THREE.colorize(m))


def test_an_export_beside_its_images_is_a_data_set_that_raysal_reads(tmp_path: Path) -> None:
    """Also for a label set whose own mask files have other values than class ids."""
    m = mask(0, 8, 255)
    out, _ = export("png", {"/m/a.jpg": m}, tmp_path, S5MARS)
    (out / "images").mkdir()
    Image.new("RGB", (3, 1)).save(out / "images/a.png")
    (out / "splits.json").write_text('{"train": ["a"], "val": ["a"]}')
    dataset = read_folder(DataConfig(reader="folder", root=str(out)))
    assert dataset.label_set.classes == S5MARS.classes and dataset.label_set.colors == S5MARS.colors
    np.testing.assert_array_equal(dataset.mask(dataset.split("train")[0], (1, 3)), m)


# --- COCO -------------------------------------------------------------------------------------------------------------


def from_coco(out: Path) -> Masks:
    coco = pytest.importorskip("pycocotools.coco").COCO(str(out / "annotations.json"))
    read = {}
    for image in coco.loadImgs(coco.getImgIds()):
        read[image["raysal"]["uri"]] = mask_HW = np.full((image["height"], image["width"]), 255, np.uint8)
        for annotation in coco.loadAnns(coco.getAnnIds([image["id"]])):
            inside = coco.annToMask(annotation).astype(bool)
            assert annotation["iscrowd"] == 0 and annotation["area"] == inside.sum() > 0
            assert (mask_HW[inside] == 255).all(), "two annotations share a pixel"
            mask_HW[inside] = annotation["category_id"] - 1
    return read


@few
@any_labels
def test_coco_gives_the_masks_back(found: list[np.ndarray], addresses: list[str]) -> None:
    round_trip("coco", from_coco, found, addresses)


def test_coco_counts_from_one_names_categories_and_files(tmp_path: Path) -> None:
    out, _ = export("coco", {"/m/x/a b.jpg": mask(1, 255), "/m/y/a b.jpg": mask(255, 255)}, tmp_path)
    coco = pytest.importorskip("pycocotools.coco").COCO(str(out / "annotations.json"))
    assert coco.getImgIds() == [1, 2] and coco.getAnnIds() == [1]  # an image without any class has an entry, but no annotation
    assert [c["name"] for c in coco.loadCats([1, 2, 3])] == list(THREE.classes)
    assert coco.imgs[1]["raysal"]["model_digest"] == DIGEST
    assert {i["raysal"]["uri"]: i["file_name"] for i in coco.imgs.values()} == {
        "/m/x/a b.jpg": "x/a b.jpg",
        "/m/y/a b.jpg": "y/a b.jpg",
    }


def test_coco_evaluates_an_export_against_itself_as_perfect(tmp_path: Path) -> None:
    """Ids from 1 and iscrowd 0 matter here: its evaluation skips what has an id of 0, and ignores crowds."""
    pytest.importorskip("pycocotools.coco")
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(0)
    out, _ = export("coco", {f"/m/{i}.jpg": rng.choice([0, 1, 255], (40, 40)).astype(np.uint8) for i in range(3)}, tmp_path)
    truth = COCO(str(out / "annotations.json"))
    guess = truth.loadRes(
        [{k: a[k] for k in ("image_id", "category_id", "segmentation")} | {"score": 1.0} for a in truth.dataset["annotations"]]
    )
    evaluation = COCOeval(truth, guess, "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


# --- CVAT -------------------------------------------------------------------------------------------------------------


def from_cvat(out: Path) -> Masks:
    """As CVAT reads them: by datumaro, its importer of the VOC family."""
    dataset_of = pytest.importorskip("datumaro.components.dataset", exc_type=ImportError).Dataset
    by_name = {line["name"]: uri for uri, line in names_in(out).items()}
    assert len(by_name) == len(names_in(out))
    read: Masks = {}
    with tempfile.TemporaryDirectory() as place, zipfile.ZipFile(out / "cvat-0000.zip") as archive:
        assert archive.testzip() is None
        archive.extractall(place)
        dataset = dataset_of.import_from(place, "voc")
        labels = [label.name for label in next(iter(dataset.categories().values())).items]
        assert labels[1:4] == list(THREE.classes)
        for item in dataset:
            png = Image.open(f"{place}/SegmentationClass/{item.id}.png")
            read[by_name[item.id]] = mask_HW = np.full(png.size[::-1], 255, np.uint8)
            for annotation in item.annotations:
                assert labels[annotation.label] != "background", "CVAT refuses a label that the task does not have"
                assert (mask_HW[annotation.image] == 255).all()
                mask_HW[annotation.image.astype(bool)] = annotation.label - 1
    return read


@few
@any_labels
def test_cvat_gives_the_masks_back(found: list[np.ndarray], addresses: list[str]) -> None:
    round_trip("cvat", from_cvat, found, addresses)


def test_a_cvat_zip_has_the_files_and_colours_that_its_page_shows(tmp_path: Path) -> None:
    out, _ = export("cvat", {"/m/sol 1/a.b.jpg": mask(0, 2, 255)}, tmp_path)
    with zipfile.ZipFile(out / "cvat-0000.zip") as archive:
        assert archive.namelist() == [
            "labelmap.txt",
            "SegmentationClass/a.b.png",
            "SegmentationObject/a.b.png",
            "ImageSets/Segmentation/default.txt",
        ]
        assert archive.read("ImageSets/Segmentation/default.txt") == b"a.b\n"
        assert archive.read("labelmap.txt").decode() == (
            "# label:color_rgb:parts:actions\nbackground:0,0,0::\nsoil:0,0,255::\nbig rock:0,255,0::\nFels & Geröll:255,0,255::\n"
        )
        shown = np.asarray(Image.open(io.BytesIO(archive.read("SegmentationClass/a.b.png"))).convert("RGB"))
    np.testing.assert_array_equal(shown, [[(0, 0, 255), (255, 0, 255), (0, 0, 0)]])


def test_cvat_colours_stay_distinct_where_a_label_sets_are_not(tmp_path: Path) -> None:
    alike = LabelSet("alike", ("background", "b", "c"), ((0, 0, 0), (9, 9, 9), (9, 9, 9)))
    out, _ = export("cvat", {"/m/a.jpg": mask(0, 1, 2, 255)}, tmp_path, alike)
    with zipfile.ZipFile(out / "cvat-0000.zip") as archive:
        lines = [line.split(":")[:2] for line in archive.read("labelmap.txt").decode().splitlines()[1:]]
        shown = Image.open(io.BytesIO(archive.read("SegmentationClass/a.png"))).convert("RGB")
    assert [name for name, _ in lines] == ["no class", "background", "b", "c"] and lines[0][1] == "0,0,0" and lines[2][1] == "9,9,9"
    assert len({colour for _, colour in lines}) == 4
    assert [",".join(map(str, shown.getpixel((x, 0)))) for x in range(4)] == [lines[i][1] for i in (1, 2, 3, 0)]


@pytest.mark.parametrize("name", ["a:b", "#a", " a", "a\nb"])
def test_a_class_name_that_a_label_map_cannot_hold_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"label map has no name with .* --classes"):
        export("cvat", {"/m/a.jpg": mask(0)}, tmp_path, replace(THREE, classes=("x", name, "y")))


def test_cvat_zips_begin_anew_before_their_contents_grow_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cvat, "IMAGES_PER_ZIP", 2)
    out, done = export("cvat", {f"/m/{i}.jpg": mask(i) for i in range(3)}, tmp_path)
    listed = []
    for file in ("cvat-0000.zip", "cvat-0001.zip"):
        assert file in done.files
        with zipfile.ZipFile(out / file) as archive:
            names = archive.read("ImageSets/Segmentation/default.txt").decode().split()
            assert {f"SegmentationClass/{n}.png" for n in names} <= set(archive.namelist()) and "labelmap.txt" in archive.namelist()
        assert [line["name"] for line in names_in(out).values() if line["file"] == file] == names
        listed += names
    assert sorted(listed) == ["0", "1", "2"] and len(names) < 3


# --- Label Studio -----------------------------------------------------------------------------------------------------


def tasks_in(out: Path) -> list[dict]:
    return [task for file in sorted(out.glob("tasks-*.json")) for task in json.loads(file.read_text())]


def from_label_studio(out: Path) -> Masks:
    brush = pytest.importorskip("label_studio_converter.brush")
    read: Masks = {}
    for task in tasks_in(out):
        (prediction,) = task["predictions"]
        assert prediction["model_version"] == DIGEST
        mask_HW = None
        for region in prediction["result"]:
            # What its own exporter does with a region: the layer is the alpha channel of what the code holds.
            flat = {"type": region["type"], "original_width": region["original_width"], "original_height": region["original_height"]}
            (layer_HW,) = brush.decode_from_annotation("x", [flat | region["value"]]).values()
            mask_HW = np.full(layer_HW.shape, 255, np.uint8) if mask_HW is None else mask_HW
            assert set(np.unique(layer_HW)) <= {0, 255} and (mask_HW[layer_HW > 0] == 255).all()
            mask_HW[layer_HW > 0] = THREE.classes.index(*region["value"]["brushlabels"])
        read[task["data"]["uri"]] = mask_HW if mask_HW is not None else np.uint8(255)
    return read


@few
@any_labels
def test_label_studio_gives_the_masks_back(found: list[np.ndarray], addresses: list[str]) -> None:
    def back(out: Path) -> Masks:
        wanted = dict(zip(addresses, found, strict=False))
        return {uri: np.broadcast_to(m, wanted[uri].shape) for uri, m in from_label_studio(out).items()}

    with tempfile.TemporaryDirectory() as place:
        wanted = dict(zip(addresses, found, strict=False))
        labels = put_labels(f"{place}/labels", [row(u, m) for u, m in wanted.items()])
        export_labels(labels, "label-studio", f"{place}/out")
        for uri, mask_HW in back(Path(place) / "out").items():
            np.testing.assert_array_equal(mask_HW, wanted[uri])


def test_label_studios_own_check_accepts_the_tasks(tmp_path: Path) -> None:
    interface = pytest.importorskip("label_studio_sdk.label_interface", reason="label-studio-sdk pins other libraries").LabelInterface
    out, _ = export("label-studio", {"s3://m/a.jpg": mask(0, 1, 255), "s3://m/b.jpg": mask(255)}, tmp_path)
    config = interface((out / "label-config.xml").read_text())
    config.validate()
    for task in tasks_in(out):
        assert config.validate_prediction(task["predictions"][0], return_errors=True) == []


def test_label_studio_sorts_by_confidence_and_shows_the_label_sets_colours(tmp_path: Path) -> None:
    out, _ = export("label-studio", {"s3://m/a.jpg": mask(0), "s3://m/b.jpg": mask(255)}, tmp_path)
    by_uri = {task["data"]["uri"]: task["predictions"][0] for task in tasks_in(out)}
    assert by_uri["s3://m/a.jpg"]["score"] == 0.75
    assert "score" not in by_uri["s3://m/b.jpg"] and by_uri["s3://m/b.jpg"]["result"] == []
    config = (out / "label-config.xml").read_text()
    assert '<Label value="Fels &amp; Geröll" background="#ff00ff"/>' in config


@pytest.mark.parametrize(
    ("root", "address"),
    [
        ("/data/local-files/?d=mars", "/data/local-files/?d=mars/x/a%20%23b.jpg"),
        ("/data/local-files/?d=", "/data/local-files/?d=x/a%20%23b.jpg"),
        ("https://host/mars/", "https://host/mars/x/a%20%23b.jpg"),
        ("s3://bucket/mars", "s3://bucket/mars/x/a #b.jpg"),
    ],
)
def test_label_studio_finds_images_under_another_root(tmp_path: Path, root: str, address: str) -> None:
    out, _ = export("label-studio", {"/m/x/a #b.jpg": mask(0), "/m/y/c.jpg": mask(0)}, tmp_path, image_root=root)
    assert address in {task["data"]["image"] for task in tasks_in(out)}


def test_label_studio_is_warned_of_paths_that_it_cannot_open(tmp_path: Path) -> None:
    done = export_labels(put_labels(str(tmp_path / "l"), [row("/m/a.jpg", mask(0))]), "label-studio", str(tmp_path / "out"))
    assert len(done.warnings) == 1 and "--image-root" in done.warnings[0]


def test_label_studio_files_stay_under_its_upload_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_studio, "TASKS_BYTES", 1500)
    out, done = export("label-studio", {f"s3://m/{i}.jpg": mask(0, 1, 2) for i in range(6)}, tmp_path)
    files = sorted(out.glob("tasks-*.json"))
    assert len(files) > 1 and {f.name for f in files} <= set(done.files)
    assert len(tasks_in(out)) == 6


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def load_dataset(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """`datasets.load_dataset` with a cache of its own and no network."""
    before = {k: os.environ.get(k) for k in ("HF_HOME", "HF_HUB_OFFLINE", "HF_DATASETS_DISABLE_PROGRESS_BARS")}
    os.environ.update(HF_HOME=str(tmp_path_factory.mktemp("hf")), HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    library = pytest.importorskip("datasets")
    for key, value in before.items():
        os.environ.pop(key, None) if value is None else os.environ.update({key: value})
    return library.load_dataset  # type: ignore[no-any-return]


@settings(few, max_examples=5)
@any_labels
def test_hugging_face_gives_the_masks_back(load_dataset: Callable, found: list[np.ndarray], addresses: list[str]) -> None:
    def back(out: Path) -> Masks:
        dataset = load_dataset("parquet", data_files=str(out / "data/*.parquet"), split="train")
        return {r["uri"]: np.asarray(r["mask"]) for r in dataset}

    round_trip("hf", back, found, addresses)


def test_hugging_face_knows_images_and_class_names(tmp_path: Path, load_dataset: Callable) -> None:
    import datasets

    out, _ = export("hf", {"/m/a.jpg": mask(2, 0, 255), "/m/b.jpg": mask(255)}, tmp_path)
    dataset = load_dataset(str(out))["train"]
    assert isinstance(dataset.features["mask"], datasets.Image)
    names = dataset.features["classes"].feature.names
    assert names == list(THREE.classes)
    by_uri = {r["uri"]: r for r in dataset}
    assert [names[c] for c in by_uri["/m/a.jpg"]["classes"]] == ["soil", "Fels & Geröll"] and by_uri["/m/b.jpg"]["classes"] == []
    assert by_uri["/m/a.jpg"]["mask"].mode == "L" and by_uri["/m/a.jpg"]["model_digest"] == DIGEST
    assert by_uri["/m/a.jpg"]["id"] == id_of("/m/a.jpg") and by_uri["/m/b.jpg"]["confidence"] is None


def test_hugging_face_shards_and_row_groups_stay_small(tmp_path: Path, load_dataset: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugging_face, "SHARD_BYTES", 300)
    monkeypatch.setattr(hugging_face, "GROUP_ROWS", 2)
    out, done = export("hf", {f"/m/{i}.jpg": mask(i % 3) for i in range(9)}, tmp_path)
    shards = sorted((out / "data").iterdir())
    assert len(shards) > 1 and {f"data/{s.name}" for s in shards} <= set(done.files)
    assert sorted(load_dataset(str(out))["train"]["uri"]) == [f"/m/{i}.jpg" for i in range(9)]


def test_hugging_face_takes_image_files_in_as_masks_see_them(tmp_path: Path, load_dataset: Callable) -> None:
    """A JPEG stays as it is, one with EXIF orientation is not turned away from its mask; what changed or is gone is left out."""
    import datasets

    rng = np.random.default_rng(0)
    for name in ("plain", "turned", "changed"):
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "turned" else 1
        Image.fromarray(rng.integers(0, 255, (8, 12, 3), dtype=np.uint8)).save(tmp_path / f"{name}.jpg", exif=exif)
    (tmp_path / "notes.jpg").write_text("no image")
    found = [f"{tmp_path}/{n}.jpg" for n in ("plain", "turned", "changed", "notes", "gone")]
    rows = [row(u, np.zeros((8, 12), np.uint8), source_sha256=None) for u in found]
    rows[0]["source_sha256"] = hashlib.sha256((tmp_path / "plain.jpg").read_bytes()).hexdigest()
    rows[2]["source_sha256"] = "0" * 64
    done = export_labels(put_labels(str(tmp_path / "l"), rows), "hf", str(tmp_path / "out"), with_images=True)
    assert (done.written, done.left_out) == (2, {"changed": 1, "decode": 1, "fetch": 1})
    dataset = load_dataset(str(tmp_path / "out"))["train"]
    by_uri = {r["uri"]: r for r in dataset}
    for uri in found[:2]:
        assert by_uri[uri]["image"].size == by_uri[uri]["mask"].size == (12, 8)
        np.testing.assert_array_equal(np.asarray(by_uri[uri]["image"]), np.asarray(Image.open(uri)))
    stored = {r["uri"]: r["image"] for r in dataset.cast_column("image", datasets.Image(decode=False))}
    assert stored[found[0]] == {"bytes": (tmp_path / "plain.jpg").read_bytes(), "path": f"{id_of(found[0])}.jpg"}
    assert stored[found[1]]["bytes"].startswith(b"\x89PNG") and stored[found[1]]["path"].endswith(".png")
