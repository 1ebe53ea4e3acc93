"""Encoder weights from a ``.safetensors`` file or URI, for work without a model hub."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from raysal.archive.uris import read_bytes
from raysal.errors import CheckpointError, InputError

log = logging.getLogger(__name__)

LEAST_MATCHED = 0.9
"""Share of an encoder's tensors that a file must hold; below, it is another encoder's."""


@dataclass(frozen=True)
class EncoderWeights:
    """What was loaded into the encoders.

    Attributes:
        source: File, URI or hub name.
        matched: Tensors of the encoder that were loaded.
        missing: Tensors of the encoder that the source lacks; they keep their random values.
        unused: Tensors of the source that the encoder has no place for (its classifier, for example).
    """

    source: str
    matched: int
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def is_file(source: str) -> bool:
    """Whether encoder weights are a file or URI (True) or a hub name such as ``imagenet`` (False)."""
    return source.endswith(".safetensors") or "/" in source or "\\" in source


def load_encoder_weights(encoders: Iterable[nn.Module], source: str) -> EncoderWeights:
    """Loads one file into every encoder. Floats of any width are cast; an encoder's own, timm's and smp's names fit.

    Raises:
        CheckpointError: The file can't be read, is no safetensors file, or matches under 90% of an encoder's tensors.
    """
    tensors = _read(source)
    for encoder in encoders:
        report = _load(encoder, tensors, source)
    if report.missing:
        log.warning("%s: %d tensors of the encoder are not in it and stay random: %s", source, len(report.missing), _some(report.missing))
    return report


def _read(source: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(read_bytes(source))
    except FileNotFoundError as error:
        raise CheckpointError(f"{source}: no such file of encoder weights; correct model.encoder_weights") from error
    except (OSError, InputError) as error:
        raise CheckpointError(f"{source}: encoder weights can't be read: {error}") from error
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{source}: not a whole safetensors file ({error}); copy or convert the encoder weights again") from error


def _load(encoder: nn.Module, tensors: Mapping[str, Tensor], source: str) -> EncoderWeights:
    own = {k: v for k, v in encoder.state_dict().items() if not k.endswith("num_batches_tracked")}
    found = _match(own, tensors)
    missing = tuple(sorted(set(own) - set(found)))
    unused = tuple(sorted(k for k in set(tensors) - set(found.values()) if not k.endswith("num_batches_tracked")))
    if len(found) < LEAST_MATCHED * len(own):
        raise CheckpointError(
            f"{source}: only {len(found)} of the encoder's {len(own)} tensors are in it with the right shape "
            f"(missing {_some(missing)}; it has {_some(unused)}); name the encoder that these weights were made for in model.encoder"
        )
    with torch.no_grad():
        for name, key in found.items():
            own[name].copy_(tensors[key])
    return EncoderWeights(source, len(found), missing, unused)


def _match(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Encoder tensor name -> file key of the same shape, under the prefix that fits best.

    timm's feature extractors rename ``stages.0`` to ``stages_0`` and smp puts ``model.`` in front, so names are compared
    with dots as underscores, and with each of the usual prefixes on either side.
    """
    keys = {k.replace(".", "_"): k for k in tensors}
    best: dict[str, str] = {}
    for drop in ("", "model."):
        for add in ("", "encoder.", "encoder.model.", "branches.0.encoder.", "branches.0.encoder.model.", "module.", "backbone."):
            found = {}
            for name, tensor in own.items():
                key = keys.get((add + name.removeprefix(drop)).replace(".", "_"))
                if key is not None and tensors[key].shape == tensor.shape:
                    found[name] = key
            if len(found) > len(best):
                best = found
    return best


def _some(names: tuple[str, ...], n: int = 3) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "") if names else "none"
