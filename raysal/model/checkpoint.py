"""The checkpoint format: a folder with ``model.safetensors`` (both branches) and ``model.json`` (all else). Never pickle.

``model.json`` is written last and holds the sha256 of the weights, so that a folder half written, half copied or damaged is
told from a whole one. The digest of a checkpoint is the sha256 over both files, weights first.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import nn

import raysal
from raysal.archive.uris import join, read_bytes, write_bytes
from raysal.config import ModelConfig
from raysal.errors import CheckpointError, ConfigError, DataError, InputError
from raysal.labels import LabelSet
from raysal.model.network import TwoBranch

FORMAT = "raysal checkpoint"
FORMAT_VERSION = 1
WEIGHTS, INFO = "model.safetensors", "model.json"

MAX_SCALE, MAX_TILE_PX = 4.0, 2**14
"""Beyond these a description is damaged: no memory would hold one pass."""

PREDICT = ("mean", "branch1")
"""How one prediction is made of two branches: the mean of their probabilities, or branch 1 alone (the CPS authors' choice)."""


@dataclass(frozen=True)
class ModelInfo:
    """What a model says about itself.

    Attributes:
        label_set: Its classes, in the order of the logits' channels.
        model: Architecture, encoder, normalisation.
        input_scale: Images are resized by this before the network, masks back after it.
        tile_px: Side of the crops it was trained on.
        predict: ``mean`` of both branches or ``branch1``.
        calibration: Temperatures and thresholds, where they were fitted.
        parents: Where it comes from: labels used, round, config digest, metrics. JSON-able.
    """

    label_set: LabelSet
    model: ModelConfig
    input_scale: float
    tile_px: int
    predict: str = "mean"
    calibration: dict[str, Any] | None = None
    parents: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.predict not in PREDICT:
            raise CheckpointError(f"predict is {self.predict!r}; it must be one of {', '.join(PREDICT)}")
        if not 0 < self.input_scale <= MAX_SCALE or not 0 < self.tile_px <= MAX_TILE_PX:
            raise CheckpointError(
                f"input_scale {self.input_scale} and tile_px {self.tile_px} must be above 0, and at most {MAX_SCALE} and {MAX_TILE_PX}"
            )


@dataclass(frozen=True)
class Loaded:
    """A checkpoint in memory: the model in eval mode, its description, and the digest of the files it came from."""

    model: TwoBranch
    info: ModelInfo
    digest: str


def save(folder_uri: str, model: nn.Module, info: ModelInfo) -> str:
    """Writes a checkpoint; each file appears whole or not at all, ``model.json`` last.

    Args:
        folder_uri: Folder at any fsspec URI; an older checkpoint in it is replaced.
        model: A TwoBranch, wrapped in DDP or not, on any device.
        info: What to say about it.

    Returns:
        The digest.
    """
    model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    # safetensors wants one plain layout; channels_last weights are put back in order.
    weights = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()})
    description = _describe(info, hashlib.sha256(weights).hexdigest())
    write_bytes(join(folder_uri, WEIGHTS), weights)
    write_bytes(join(folder_uri, INFO), description)
    return _digest(weights, description)


def load(folder_uri: str, device: torch.device | str = "cpu") -> Loaded:
    """Reads and checks a checkpoint. Needs no encoder weights and no connection but to the folder itself.

    Raises:
        CheckpointError: Nothing there, not ours, written by a newer version, damaged, or weights that don't fit the description.
    """
    description, raw = _read_info(folder_uri)
    info = _parse(folder_uri, raw)
    weights = _read(folder_uri, WEIGHTS)
    _check_weights(folder_uri, raw, weights)
    try:
        tensors = safetensors.torch.load(weights)
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{join(folder_uri, WEIGHTS)}: no safetensors file ({error}); copy the checkpoint again") from error
    try:
        model = TwoBranch(info.model.model_copy(update={"encoder_weights": None}), info.label_set.n_classes, seed=0)
    except ConfigError as error:
        raise CheckpointError(f"{join(folder_uri, INFO)}: this model can't be built here: {error}") from error
    _check_fit(folder_uri, model, tensors)
    model.load_state_dict(tensors)
    return Loaded(model.to(device).eval(), info, _digest(weights, description))


def digest_at(folder_uri: str) -> str:
    """The digest of the checkpoint in a folder: sha256 hex over both files. Raises CheckpointError as `load` does."""
    description, raw = _read_info(folder_uri)
    weights = _read(folder_uri, WEIGHTS)
    _check_weights(folder_uri, raw, weights)
    return _digest(weights, description)


def read_info(folder_uri: str) -> ModelInfo:
    """The description alone, without reading the weights. Raises CheckpointError as `load` does."""
    return _parse(folder_uri, _read_info(folder_uri)[1])


def require_classes(folder_uri: str, info: ModelInfo, label_set: LabelSet) -> None:
    """Refuses a checkpoint made for other classes, or the same in another order, than a data set's.

    Raises:
        CheckpointError: The classes differ.
    """
    if info.label_set.classes != label_set.classes:
        raise CheckpointError(
            f"{folder_uri}: made for {len(info.label_set.classes)} classes ({', '.join(info.label_set.classes)}), but "
            f"{label_set.name!r} has {len(label_set.classes)} ({', '.join(label_set.classes)}); "
            "name a checkpoint of this label set, or set data.label_set"
        )


def _describe(info: ModelInfo, weights_sha256: str) -> bytes:
    raw = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "raysal_version": raysal.__version__,
        "weights_sha256": weights_sha256,
        "label_set": info.label_set.to_dict(),
        "model": info.model.model_dump(mode="json"),
        "input_scale": info.input_scale,
        "tile_px": info.tile_px,
        "predict": info.predict,
        "calibration": info.calibration,
        "parents": info.parents,
    }
    return (json.dumps(_finite(raw), indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _finite(value: Any) -> Any:
    """The same with null for nan and infinity, which JSON does not know: a metric of 0/0 must not cost a training its result."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_info(folder_uri: str) -> tuple[bytes, dict[str, Any]]:
    """``model.json`` as bytes and as a dictionary that claims to be ours."""
    where = join(folder_uri, INFO)
    description = _read(folder_uri, INFO)
    try:
        raw = json.loads(description)
    except ValueError as error:  # also what is no UTF-8
        raise CheckpointError(f"{where}: not JSON ({error}); the checkpoint is damaged: copy it again") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise CheckpointError(f'{where}: not a raysal checkpoint (no "format": "{FORMAT}"); name a folder that `raysal train` wrote')
    version = raw.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CheckpointError(f"{where}: format_version is {version!r}, expected a whole number; the checkpoint is damaged: copy it again")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format_version {version}, written by raysal {raw.get('raysal_version')}; this is raysal {raysal.__version__}, "
            f"which reads up to {FORMAT_VERSION}: upgrade raysal"
        )
    return description, raw


def _parse(folder_uri: str, raw: dict[str, Any]) -> ModelInfo:
    where = join(folder_uri, INFO)
    try:
        return ModelInfo(
            label_set=LabelSet.from_dict(raw["label_set"], "checkpoint"),
            model=ModelConfig.model_validate(raw["model"]),
            input_scale=float(raw["input_scale"]),
            tile_px=int(raw["tile_px"]),
            predict=raw["predict"],
            calibration=raw["calibration"],
            parents=dict(raw["parents"]),
        )
    except KeyError as error:
        problem = f"{error} is missing"
    except ValidationError as error:
        problem = "; ".join(f"model.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
    except (TypeError, ValueError, DataError, CheckpointError) as error:
        problem = str(error)
    raise CheckpointError(
        f"{where}: can't be used ({problem}); damaged, or changed since raysal {raw.get('raysal_version')} wrote it: copy it again"
    )


def _read(folder_uri: str, name: str) -> bytes:
    where = join(folder_uri, name)
    try:
        return read_bytes(where)
    except (FileNotFoundError, NotADirectoryError) as error:
        other = "; it may be half copied" if name == WEIGHTS else ""
        raise CheckpointError(
            f"{folder_uri}: no checkpoint there, {name} is missing{other}; name a folder that holds {INFO} and {WEIGHTS}"
        ) from error
    except (OSError, InputError) as error:
        raise CheckpointError(f"{where}: can't be read: {error}") from error


def _check_weights(folder_uri: str, raw: dict[str, Any], weights: bytes) -> None:
    found = hashlib.sha256(weights).hexdigest()
    if found != raw.get("weights_sha256"):
        raise CheckpointError(
            f"{join(folder_uri, WEIGHTS)}: {len(weights)} bytes with sha256 {found[:12]}, but {INFO} expects "
            f"{str(raw.get('weights_sha256'))[:12]}; truncated, damaged or from another checkpoint: copy both files again"
        )


def _check_fit(folder_uri: str, model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    own = model.state_dict()
    problems = [f"{k} is missing" for k in own if k not in tensors]
    problems += [f"{k} has no place" for k in tensors if k not in own]
    problems += [
        f"{k} is {list(tensors[k].shape)}, expected {list(own[k].shape)}" for k in own if k in tensors and own[k].shape != tensors[k].shape
    ]
    if problems:
        raise CheckpointError(
            f"{join(folder_uri, WEIGHTS)}: {len(problems)} tensors don't fit the model that {INFO} describes ({'; '.join(problems[:3])}); "
            "the two files are not of one checkpoint, or it was made with another version of segmentation-models-pytorch"
        )


def _digest(weights: bytes, description: bytes) -> str:
    digest = hashlib.sha256(weights)
    digest.update(description)
    return digest.hexdigest()
