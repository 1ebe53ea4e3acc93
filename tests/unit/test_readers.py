"""Readers: what becomes of each file of a folder, and errors that name the file and the fix."""

from __future__ import annotations

import uuid
from collections import Counter
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, strategies as st

from raysal.archive.uris import absolute, open_fs
from raysal.datasets import folder
from raysal.datasets.base import Item
from raysal.datasets.build import READERS
from raysal.datasets.listing import group_of, hold_out, label_set_of, stable_order
from raysal.errors import DataError, InputError
from raysal.labels import LABEL_SETS, S5MARS
from tests.unit.layouts import PIXEL, TWO_CLASSES, config, names, put, put_ai4mars, put_folder, put_json

# ---------------------------------------------------------------- folder


def test_the_plain_layout_is_read_in_the_order_of_its_splits(root: str) -> None:
    put_folder(root, ["b", "a"])
    put(root, "images/d.JPG", "unlabeled/e.jpeg", "unlabeled/a.png", "images/notes.txt", "images/._a.png")
    put_json(root, "splits.json", {"train": ["b", "a.png"], "val": ["c"], "unlabeled": ["e", "d", "a"]})
    put(root, "groups.csv", data=b"name,group\na,058/0000\n")
    dataset = folder.read(config("folder", root))
    assert names(dataset) == {"train": ["b", "a"], "val": ["c"], "unlabeled": ["e", "d", "a"]}
    at = absolute(root)
    assert dataset.splits["train"][1] == Item("a", f"{at}/images/a.png", f"{at}/masks/a.png", (), "058/0000")
    assert [i.image for i in dataset.splits["unlabeled"]] == [f"{at}/unlabeled/e.jpeg", f"{at}/images/d.JPG", f"{at}/unlabeled/a.png"]
    assert all(i.mask is None for i in dataset.splits["unlabeled"])
    assert dataset.label_set.classes == ("soil", "rock") and dataset.label_set.name == "data"


def test_an_image_without_a_mask_has_none(root: str) -> None:
    put_folder(root)
    put(root, "images/d.png")
    put_json(root, "splits.json", {"train": ["a", "d"], "val": ["c"]})
    assert [i.mask is None for i in folder.read(config("folder", root)).split("train")] == [False, True]


@pytest.mark.parametrize(
    ("file", "text", "group"),
    [
        ("tiles.csv", "name,split,panorama,site_group\na,train,122_1,7\n", "122_1"),
        ("tiles.csv", "name,site_group\na,7\n", "7"),
        ("groups.csv", "\ufeffname,panorama,group\na,x,y\n", "y"),
    ],
)
def test_groups_come_from_whichever_file_has_them(root: str, file: str, text: str, group: str) -> None:
    put_folder(root)
    put(root, file, data=text.encode())
    assert [i.group for i in folder.read(config("folder", root)).split("train")] == [group, ""]


def test_groups_may_stand_in_the_split_file(root: str) -> None:
    put_folder(root)
    put_json(root, "splits.json", {"train": ["a"], "val": ["c"], "groups": {"a": "g1"}})
    dataset = folder.read(config("folder", root))
    assert dataset.split("train")[0].group == "g1" and set(dataset.splits) == {"train", "val"}


def test_a_split_of_other_files_is_left_out_unless_it_is_asked_for(root: str) -> None:
    put_folder(root)
    put_json(root, "splits.json", {"train": ["a"], "val": ["c"], "panoramas": ["p"]})
    assert set(folder.read(config("folder", root)).splits) == {"train", "val"}
    with pytest.raises(DataError, match=r"split 'panoramas' names 1 of 1 images that are not in images/: p"):
        folder.read(config("folder", root, val_split="panoramas"))


@pytest.mark.parametrize(
    ("broken", "value", "words"),
    [
        ("splits.json", {"train": ["a", "x", "y"], "val": ["c"]}, "names 2 of 3 images that are not in images/: x, y; restore"),
        ("splits.json", {"train": ["a", "a.png"], "val": ["c"]}, "names 'a' twice"),
        ("splits.json", {"train": "a", "val": ["c"]}, "expected a list of image names"),
        ("splits.json", {"train": [1]}, "expected a list of image names"),
        ("splits.json", ["a"], "holds a list; expected"),
        ("splits.json", {"train": ["a"], "groups": ["a"]}, "must map names to groups"),
        ("classes.json", {"classes": [{"id": 0, "name": "soil"}]}, "classes.json: label set 'data' can't be read"),
    ],
)
def test_what_is_wrong_with_a_json_file_is_said(root: str, broken: str, value: object, words: str) -> None:
    put_folder(root)
    put_json(root, broken, value)
    with pytest.raises(DataError, match=words) as caught:
        folder.read(config("folder", root))
    assert absolute(root) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "data", "words"),
    [
        ("splits.json", b"{'train'", r"splits\.json: is not JSON"),
        ("splits.json", b"\xff\xfe{", r"splits\.json: is not UTF-8"),
        ("classes.json", b"", r"classes\.json: label set 'data' is not JSON"),
        ("tiles.csv", b"id,place\na,1\n", r"tiles\.csv: has columns id, place; expected name and one of group, panorama, site_group"),
        ("images/a.tif", PIXEL, r"a\.png and a\.tif are both called 'a'"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(root: str, file: str, data: bytes, words: str) -> None:
    put_folder(root)
    put(root, file, data=data)
    with pytest.raises(DataError, match=words):
        folder.read(config("folder", root))


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["images/a.png"], r"has no splits\.json; write one such as"),
        (["splits.json", "classes.json"], r"images/ holds no image"),
        (["splits.json", "images/a.png"], r"classes\.json: there is no such file; write the classes there, or set data\.label_set"),
    ],
)
def test_what_is_missing_from_a_folder_is_said(root: str, paths: list[str], words: str) -> None:
    put_folder(root + "/whole")
    fs, whole = open_fs(root + "/whole")
    for path in paths:
        put(root, path, data=fs.cat_file(f"{whole}/{path}"))
    with pytest.raises(DataError, match=words):
        folder.read(config("folder", root))


# ---------------------------------------------------------------- roots and label sets


@pytest.mark.parametrize("reader", sorted(READERS))
def test_a_root_that_is_none_is_said(reader: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "set.zip").write_bytes(b"PK")
    for root, words in (
        (None, "set data.root"),
        (str(tmp_path / "nowhere"), "nowhere: there is no such folder"),
        (str(tmp_path / "empty"), "empty: is empty"),
        (str(tmp_path / "set.zip"), "set.zip: is a file; unpack it"),
    ):
        with pytest.raises(DataError, match=words):
            READERS[reader](config(reader, root))


def test_a_store_that_refuses_is_said(tmp_path: Path) -> None:
    class Refusing(MemoryFileSystem):
        protocol = "refusing"

        def ls(self, path: str, detail: bool = True, **kwargs: object) -> list:
            raise PermissionError("no rights")

    fsspec.register_implementation("refusing", Refusing, clobber=True)
    with pytest.raises(InputError, match=r"refusing://.*may not be read \(PermissionError: no rights\); ask for the right to"):
        folder.read(config("folder", "refusing://bucket/data"))


def test_label_sets_come_by_name_or_file(root: str) -> None:
    put_json(root, "mine/labels.json", TWO_CLASSES)
    for name, known in LABEL_SETS.items():
        assert label_set_of(config("folder", root, label_set=name), None) == known
    assert label_set_of(config("folder", root, label_set=f"{root}/mine/labels.json"), S5MARS).classes == ("soil", "rock")
    assert label_set_of(config("folder", root), S5MARS) == S5MARS
    with pytest.raises(DataError, match="'s5mar' is not known; did you mean 's5mars'"):
        label_set_of(config("folder", root, label_set="s5mar"), None)
    with pytest.raises(DataError, match="give s5mars, ai4mars, marsscapes or a"):
        label_set_of(config("folder", root, label_set="?"), None)
    with pytest.raises(DataError, match=r"other\.json: there is no such file"):
        label_set_of(config("folder", root, label_set=f"{root}/other.json"), S5MARS)


def test_readers_list_each_folder_once_and_ask_after_no_file() -> None:
    """A listing of an archive with 16,000 images must not become 16,000 requests."""
    calls: Counter[str] = Counter()

    class Counting(MemoryFileSystem):
        protocol = "counting"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(MemoryFileSystem._strip_protocol(path.replace("counting://", "memory://")))

        def ls(self, path: str, detail: bool = True, **kwargs: object) -> list:
            calls["ls"] += 1
            return super().ls(path, detail=detail)

        def info(self, path: str, **kwargs: object) -> dict:
            calls["info"] += 1
            return super().info(path, **kwargs)

    fsspec.register_implementation("counting", Counting, clobber=True)
    seen = []
    for n in (10, 100):
        base = f"memory://{uuid.uuid4().hex}"
        put_folder(f"{base}/folder", [f"a{i}" for i in range(n)])
        put_ai4mars(f"{base}/ai4mars/msl/ncam", n)
        put(f"{base}/s5mars", *(f"images/{i}.jpg" for i in range(n)), *(f"labels/{i}.png" for i in range(n)))
        for reader in sorted(READERS):
            calls.clear()
            READERS[reader](config(reader, f"{base}/{reader}".replace("memory:", "counting:")))
            seen.append((n, reader, dict(calls)))
    assert all(c["ls"] <= 12 and c.get("info", 0) <= 6 for _, _, c in seen), seen
    assert [c for n, _, c in seen if n == 10] == [c for n, _, c in seen if n == 100]


# ---------------------------------------------------------------- groups and hold-outs


@pytest.mark.parametrize(
    ("stem", "group"),
    [
        ("NLB_527820640EDR_F0580000NCAM00253M1", "058/0000"),
        ("NLA_397681586EDR_F0020000AUT_04096M1", "002/0000"),
        ("NRB_602664178RASLF0732958NCAM00271M1", "073/2958"),
        ("0001ML0000001000C0_DXXX", "sol0001"),
        ("sol0122_1_r0c00", ""),
        ("", ""),
    ],
)
def test_groups_are_read_from_product_names(stem: str, group: str) -> None:
    assert group_of(stem) == group


@given(st.dictionaries(st.text(min_size=1, max_size=4), st.sampled_from(["", "a", "b", "c", "d", "e"]), max_size=60), st.integers(0, 9))
def test_a_hold_out_takes_whole_groups_and_about_its_share(groups: dict[str, str], seed: int) -> None:
    held = hold_out(groups, 0.2, seed)
    assert held <= set(groups) and held == hold_out(dict(reversed(list(groups.items()))), 0.2, seed)
    if len(groups) < 2:
        assert not held
        return
    assert 0 < len(held) < len(groups)
    if len(set(groups.values()) - {""}) + ("" in groups.values()) > 1:
        assert not {groups[n] for n in held} & {groups[n] for n in groups if n not in held} - {""}
    counts = Counter(g or n for n, g in groups.items())
    assert len(held) <= max(0.2 * len(groups), min(counts.values()))


@given(st.sets(st.text(max_size=5), max_size=30), st.text(max_size=5), st.integers(0, 5))
def test_a_stable_order_does_not_change_when_a_name_is_added(some: set[str], extra: str, seed: int) -> None:
    order = stable_order(some, seed)
    assert sorted(order) == sorted(some)
    assert [n for n in stable_order(some | {extra}, seed) if n in some] == order
