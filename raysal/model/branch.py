"""One branch: a network of segmentation-models-pytorch (smp) with an encoder of its own or of timm.

Importing either takes seconds, so nothing imports this module before a network is built: Ray's controllers, its data processes and
the driver of a stream hand models on without it.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

from raysal.config import ModelConfig
from raysal.errors import CheckpointError, ConfigError

ARCHITECTURES: dict[str, type[nn.Module]] = {a.__name__: a for a in smp.MODEL_ARCHITECTURES_MAPPING.values()}


def build_branch(cfg: ModelConfig, n_classes: int, seed: int, hub_weights: str | None = None) -> Any:
    """One smp model whose random weights depend on the seed alone; leaves the global random state as it was."""
    architecture = _architecture(cfg.arch)
    options: dict[str, Any] = {"encoder_weights": hub_weights}
    if cfg.encoder.startswith("tu-"):
        _known_timm(cfg.encoder)
        options["encoder_weights"] = True if hub_weights else None  # timm names its weights in the encoder's name
    elif cfg.encoder not in smp.encoders.get_encoder_names():
        raise ConfigError(_unknown("model.encoder", cfg.encoder, smp.encoders.get_encoder_names()))
    parameters = inspect.signature(architecture.__init__).parameters
    if cfg.output_stride is not None:
        if "encoder_output_stride" not in parameters:
            raise ConfigError(f"model.output_stride: {cfg.arch} has no such setting; leave it null or take a DeepLab or PAN")
        options["encoder_output_stride"] = cfg.output_stride
    if cfg.atrous_rates is not None:
        if "decoder_atrous_rates" not in parameters:
            raise ConfigError(f"model.atrous_rates: {cfg.arch} has no such setting; leave it null or take a DeepLab")
        options["decoder_atrous_rates"] = cfg.atrous_rates
    if architecture is smp.DPT:
        options["dynamic_img_size"] = True  # else a vision transformer takes images of one size only
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            branch = architecture(encoder_name=cfg.encoder, classes=n_classes, **options)
            if architecture is smp.DPT:
                _fit_patches(branch)
            return branch
        except OSError as error:
            raise CheckpointError(
                f"model.encoder_weights: {hub_weights!r} can't be downloaded ({error}); check the connection, "
                "or give a .safetensors file or URI"
            ) from error
        except Exception as error:  # smp and timm raise all sorts where parts don't fit each other
            raise ConfigError(
                f"model: {cfg.arch} with encoder {cfg.encoder!r} and encoder weights {hub_weights!r} can't be built "
                f"({type(error).__name__}: {error}); change model.arch, model.encoder, model.output_stride or model.encoder_weights"
            ) from error


def stride_of(branch: Any) -> int:
    """What heights and widths must be multiples of. DPT's decoder halves the grid of patches once."""
    return int(branch.encoder.output_stride) * (2 if isinstance(branch, smp.DPT) else 1)


def _fit_patches(branch: Any) -> None:
    """Gives DPT the decoder of 16 px patches, whatever the encoder's: it makes whole steps from patches to maps, and smp's own
    decoder for 14 px patches (DINOv2) makes maps that don't fit together. The last upsampling reaches the image's size anyway."""
    encoder = branch.encoder
    if set(encoder.output_strides) != {16}:
        branch.decoder = type(branch.decoder)(
            encoder_out_channels=encoder.out_channels,
            encoder_output_strides=[16] * len(encoder.out_channels),
            encoder_has_prefix_tokens=encoder.has_prefix_tokens,
        )
        branch.initialize()


def _architecture(name: str) -> type[nn.Module]:
    for known, architecture in ARCHITECTURES.items():
        if known.lower() == name.lower():
            return architecture
    raise ConfigError(_unknown("model.arch", name, list(ARCHITECTURES)))


def _known_timm(encoder: str) -> None:
    name = encoder.removeprefix("tu-").partition(".")[0]
    if not timm.is_model(name):
        raise ConfigError(_unknown("model.encoder", encoder, [f"tu-{n}" for n in timm.list_models()]))


def _unknown(key: str, name: str, known: list[str]) -> str:
    lower = {n.lower(): n for n in known}
    near = [lower[n] for n in difflib.get_close_matches(name.lower(), lower, 3, 0.5)]
    return f"{key}: {name!r} is not known; " + (f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known[:40])}")
