"""A checkpoint comes back to the bit, or says why not; nothing in it is ever executed."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from raysal.archive.uris import list_names, read_bytes
from raysal.config import ModelConfig
from raysal.errors import CheckpointError
from raysal.labels import AI4MARS, S5MARS, LabelSet
from raysal.model.checkpoint import ModelInfo, digest_at, load, read_info, require_classes, save
from raysal.model.network import TwoBranch, place

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL = ModelConfig(encoder="tu-mobilenetv3_small_050", mean=(0.6, 0.5, 0.4))
INFO = ModelInfo(AI4MARS, MODEL, input_scale=0.5, tile_px=96, parents={"round": 2, "metrics": {"miou": 0.31}})


@pytest.fixture(scope="module")
def model() -> TwoBranch:
    model = TwoBranch(MODEL, AI4MARS.n_classes, seed=4)
    model.train()(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))  # batch statistics that are not the initial ones
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path, model: TwoBranch) -> Path:
    save(str(tmp_path / "checkpoint"), model, INFO)
    return tmp_path / "checkpoint"


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    raw = json.loads((folder / "model.json").read_text())
    change(raw)
    (folder / "model.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_checkpoint_comes_back_to_the_bit_at_any_uri(root: str, channels_last: bool) -> None:
    model = TwoBranch(MODEL, 4, seed=4)
    place(model, MODEL.model_copy(update={"channels_last": channels_last}), "cpu").eval()
    digest = save(root, model, INFO)
    loaded = load(root)
    assert list_names(root) == ["model.json", "model.safetensors"]
    assert loaded.info == INFO
    assert loaded.digest == digest == digest_at(root)
    assert not loaded.model.training
    model.memory_format = torch.contiguous_format
    model.to(memory_format=torch.contiguous_format)
    x = torch.randint(0, 256, (2, 3, 50, 41), dtype=torch.uint8)
    with torch.no_grad():
        for z, back in zip(model(x), loaded.model(x), strict=True):
            assert torch.equal(z, back)


def test_the_digest_is_the_sha256_over_both_files(folder: Path) -> None:
    both = (folder / "model.safetensors").read_bytes() + (folder / "model.json").read_bytes()
    assert digest_at(str(folder)) == hashlib.sha256(both).hexdigest()


def test_the_same_model_has_the_same_digest_and_any_other_another(tmp_path: Path, model: TwoBranch) -> None:
    first = save(str(tmp_path / "a"), model, INFO)
    assert save(str(tmp_path / "b"), model, INFO) == first
    assert save(str(tmp_path / "c"), model, ModelInfo(AI4MARS, MODEL, 0.5, 96, parents={"round": 3})) != first
    other = TwoBranch(MODEL, 4, seed=4)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    assert save(str(tmp_path / "d"), other, INFO) != first


def test_saving_over_an_older_checkpoint_replaces_it(folder: Path) -> None:
    new = TwoBranch(MODEL, 4, seed=5)
    digest = save(str(folder), new, INFO)
    assert load(str(folder)).digest == digest


def test_loading_needs_neither_hub_nor_encoder_file(tmp_path: Path, model: TwoBranch) -> None:
    gone = MODEL.model_copy(update={"encoder_weights": str(tmp_path / "gone.safetensors")})
    save(str(tmp_path / "c"), model, ModelInfo(AI4MARS, gone, 1.0, 96))
    loaded = load(str(tmp_path / "c"))
    assert loaded.info.model == gone  # where the weights came from stays known


def test_any_label_set_and_calibration_come_back(tmp_path: Path, model: TwoBranch) -> None:
    rare = LabelSet("mine", ("a", "b", "c", "d"), ((1, 2, 3), (4, 5, 6), (7, 8, 9), (0, 0, 0)), values=(9, 3, 4, 200), null_values=(0, 255))
    info = ModelInfo(rare, MODEL, 1.5, 64, "branch1", calibration={"temperature": [1.0, 2.0]})
    save(str(tmp_path), model, info)
    assert load(str(tmp_path)).info == read_info(str(tmp_path)) == info


def test_metrics_without_a_value_are_written_as_null(tmp_path: Path, model: TwoBranch) -> None:
    save(str(tmp_path), model, ModelInfo(AI4MARS, MODEL, 1.0, 96, parents={"iou": [0.5, math.nan], "best": math.inf}))
    text = (tmp_path / "model.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert load(str(tmp_path)).info.parents == {"iou": [0.5, None], "best": None}


@pytest.mark.parametrize("where", [0.02, 0.5, 0.999])
def test_one_changed_byte_of_the_weights_is_found(folder: Path, where: float) -> None:
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[int(where * len(data))] ^= 1
    file.write_bytes(data)
    for read in (load, digest_at):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: .*damaged.*copy both files again"):
            read(str(folder))


def test_one_changed_byte_of_the_description_changes_the_digest(folder: Path) -> None:
    before = digest_at(str(folder))
    file = folder / "model.json"
    file.write_bytes(file.read_bytes().replace(b'"round": 2', b'"round": 3'))
    assert digest_at(str(folder)) != before


def test_truncated_weights_say_so(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"5000 bytes.*truncated"):
        load(str(folder))


@pytest.mark.parametrize("name", ["model.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    for read in (load, digest_at):
        with pytest.raises(CheckpointError, match=f"no checkpoint there, {name} is missing"):
            read(str(folder))


def test_a_missing_folder_a_file_and_an_unknown_scheme_say_so(folder: Path) -> None:
    for uri in (str(folder / "none"), str(folder / "model.json"), f"memory://{uuid.uuid4().hex}"):
        with pytest.raises(CheckpointError, match=r"no checkpoint there|can't be read"):
            load(uri)
    with pytest.raises(CheckpointError, match="nowhere"):
        load("nowhere://bucket/checkpoint")


@pytest.mark.parametrize("text", ['{"a": 1}', "[1, 2]", '"text"', "null", '{"format": "other", "format_version": 1}'])
def test_json_of_others_is_not_ours(folder: Path, text: str) -> None:
    (folder / "model.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.json: not a raysal checkpoint"):
        load(str(folder))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"not json"])
def test_what_is_no_json_says_so(folder: Path, data: bytes) -> None:
    (folder / "model.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.json: not JSON"):
        load(str(folder))


def test_a_newer_format_asks_for_an_upgrade(folder: Path) -> None:
    edit(folder, lambda raw: raw.update(format_version=2, raysal_version="9.9"))
    with pytest.raises(CheckpointError, match=r"format_version 2, written by raysal 9\.9.*upgrade raysal"):
        load(str(folder))


@pytest.mark.parametrize("version", [None, "1", 0, True, 1.0])
def test_a_format_version_that_is_none_is_refused(folder: Path, version: object) -> None:
    edit(folder, lambda raw: raw.update(format_version=version))
    with pytest.raises(CheckpointError, match="format_version is"):
        load(str(folder))


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.pop("label_set"),
        lambda raw: raw.pop("parents"),
        lambda raw: raw.update(label_set=[]),
        lambda raw: raw["label_set"]["classes"].pop(1),
        lambda raw: raw["model"].update(unknown=1),
        lambda raw: raw["model"].update(dropout=7),
        lambda raw: raw.update(input_scale=0),
        lambda raw: raw.update(input_scale="wide"),
        lambda raw: raw.update(tile_px=None),
        lambda raw: raw.update(predict="vote"),
        lambda raw: raw.update(parents=3),
    ],
)
def test_a_description_that_cannot_be_used_is_named(folder: Path, change: Callable) -> None:
    edit(folder, change)
    with pytest.raises(CheckpointError, match=r"model\.json: .*damaged"):
        load(str(folder))


def test_a_description_of_a_model_that_is_not_known_here_is_named(folder: Path) -> None:
    edit(folder, lambda raw: raw["model"].update(arch="Unett"))
    with pytest.raises(CheckpointError, match=r"model\.json: .*did you mean Unet"):
        load(str(folder))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: raw.update(label_set=S5MARS.to_dict()), r"expected \[9, "),
        (lambda raw: raw["model"].update(arch="Unet"), "is missing"),
        (lambda raw: raw["model"].update(encoder="resnet18"), "tensors don't fit"),
    ],
)
def test_weights_of_other_classes_or_another_model_are_refused(folder: Path, change: Callable, said: str) -> None:
    edit(folder, change)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: \d+ tensors don't fit.*{said}|{said}"):
        load(str(folder))


def test_a_checkpoint_for_other_classes_is_refused_by_name() -> None:
    require_classes("here", INFO, AI4MARS)
    with pytest.raises(CheckpointError, match=r"here: made for 4 classes \(soil.*'s5mars' has 9 \(sky"):
        require_classes("here", INFO, S5MARS)


def test_a_pickle_in_place_of_the_weights_is_never_executed(folder: Path, tmp_path: Path) -> None:
    """Also one whose checksum the description vouches for."""
    trap = tmp_path / "executed"

    class Trap:
        def __reduce__(self) -> tuple:
            return Path.touch, (trap,)

    payload = pickle.dumps(Trap())
    pickle.loads(payload)
    assert trap.exists()
    trap.unlink()
    (folder / "model.safetensors").write_bytes(payload)
    edit(folder, lambda raw: raw.update(weights_sha256=hashlib.sha256(payload).hexdigest()))
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load(str(folder))
    assert not trap.exists()


def test_both_files_are_plain_data(folder: Path, model: TwoBranch) -> None:
    json.loads(read_bytes(str(folder / "model.json")))
    tensors = safetensors.torch.load(read_bytes(str(folder / "model.safetensors")))
    assert tensors.keys() == model.state_dict().keys()
