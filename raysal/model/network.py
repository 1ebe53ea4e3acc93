"""Two segmentation branches of one architecture that share an input and nothing else.

The architectures and encoders are those of segmentation-models-pytorch (smp) and timm. Cross pseudo supervision
(Chen et al., CVPR 2021) wants two networks with the same encoder weights and differently drawn decoders and heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from raysal.config import ModelConfig
from raysal.errors import ConfigError
from raysal.model.depthwise import speed_up
from raysal.model.encoder_weights import EncoderWeights, is_file, load_encoder_weights

Resolution = Literal["full", "decoder"]

Core = Callable[[Tensor, tuple[int, ...]], tuple[Tensor, ...]]
"""What `TwoBranch.core` computes, by whatever means."""

_SMALLEST_PX = {"PAN": 128}  # its feature pyramid halves the encoder's last map three times


@dataclass(frozen=True)
class Encoded:
    """What the encoders made of a batch of images.

    Attributes:
        stages: By branch: the encoder's stages, [B, D, h, w] each, and what else its decoder wants.
        size_HW: Of the images.
        padded_HW: Of what the encoders saw.
    """

    stages: dict[int, tuple[list[Tensor], tuple[Any, ...]]]
    size_HW: torch.Size
    padded_HW: torch.Size


class TwoBranch(nn.Module):
    """Both branches in one module, so that one forward pass and one DDP wrapper serve them.

    Args:
        cfg: Architecture, encoder, its weights, normalisation, dropout.
        n_classes: Channels of the logits.
        seed: Decides every random weight. Branches draw from different streams: with encoder weights their encoders are
            equal and their decoders and heads differ; without, all weights differ.

    Attributes:
        branches: The two smp models; their heads end before the last upsampling, which `forward` does.
        n_classes: Channels of the logits.
        encoder_weights: What was loaded into the encoders, None for random weights.
        smallest_px: Shorter sides of images are padded to this.
        memory_format: Layout of the images that the branches see; `prepare` sets it.

    Raises:
        ConfigError: The architecture or encoder is unknown, or the two don't fit each other.
        CheckpointError: The encoder weights can't be had or don't fit the encoder.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, cfg: ModelConfig, n_classes: int, seed: int) -> None:
        from raysal.model.branch import build_branch, stride_of  # loads the libraries

        super().__init__()
        self.n_classes = n_classes
        self.encoder_weights: EncoderWeights | None = None
        self.memory_format = torch.contiguous_format
        self._frozen = False
        # Not persistent: they belong to the configuration, which a checkpoint carries beside the weights.
        self.register_buffer("mean", 255 * torch.tensor(cfg.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(cfg.std).view(1, 3, 1, 1), persistent=False)
        branches = [build_branch(cfg, n_classes, 2 * seed + k) for k in (0, 1)]
        if cfg.encoder_weights is not None:
            encoders = [branch.encoder for branch in branches]
            if is_file(cfg.encoder_weights):
                self.encoder_weights = load_encoder_weights(encoders, cfg.encoder_weights)
            else:
                pretrained = build_branch(cfg, n_classes, seed, cfg.encoder_weights).encoder.state_dict()
                for encoder in encoders:
                    encoder.load_state_dict(pretrained)
                self.encoder_weights = EncoderWeights(cfg.encoder_weights, len(pretrained), (), ())
        for branch in branches:
            _take_upsampling(branch.segmentation_head)
            if cfg.dropout > 0 and not _has_dropout(branch):
                branch.segmentation_head = nn.Sequential(nn.Dropout2d(cfg.dropout), branch.segmentation_head)
        self.branches = nn.ModuleList(branches)
        self._stride = stride_of(branches[0])
        self.smallest_px = max(self._stride, _SMALLEST_PX.get(type(branches[0]).__name__, 1))

    def freeze_encoders(self) -> None:
        """From here on the encoders keep their weights and batch-norm statistics, in train mode too."""
        self._frozen = True
        for branch in self.branches:
            branch.get_submodule("encoder").requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> TwoBranch:
        """As of any module; frozen encoders stay in eval mode."""
        super().train(mode)
        if self._frozen:
            for branch in self.branches:
                branch.get_submodule("encoder").eval()
        return self

    def forward(self, images_BCHW: Tensor, resolution: Resolution = "full") -> tuple[Tensor, Tensor]:
        """Logits of both branches.

        Args:
            images_BCHW: [B, 3, H, W] RGB, uint8 or float in 0..255, of any height and width: inside, the bottom and the
                right are padded to what the encoder divides by, and the logits cropped back.
            resolution: ``full`` gives [B, C, H, W]; ``decoder`` stops before the last upsampling (DeepLab: H/4, rounded up).

        Returns:
            Two float32 tensors, also under autocast.
        """
        z1, z2 = self.decode(self.encode(images_BCHW), resolution)
        return z1, z2

    def answers(
        self, images_BCHW: Tensor, branches: tuple[int, ...] = (0, 1), resolution: Resolution = "full", core: Core | None = None
    ) -> tuple[Tensor, ...]:
        """Logits of some branches as `forward` gives them, then the images' embeddings, from one pass.

        Args:
            images_BCHW, resolution: As in `forward`.
            branches: Which of them answer, in order.
            core: What computes `core`; default: PyTorch.

        Returns:
            float32; embeddings are [B, D], the L2-normalised mean of the first branch's last encoder stage over positions.
        """
        ready_BCHW = self.ready(images_BCHW)
        *logits, pooled_BD = (core or self.core)(ready_BCHW, branches)
        sizes = images_BCHW.shape[-2:], ready_BCHW.shape[-2:]
        return *(self.finish(z, *sizes, resolution) for z in logits), F.normalize(pooled_BD, dim=1)

    def core(self, x_BCHW: Tensor, branches: tuple[int, ...] = (0, 1)) -> tuple[Tensor, ...]:
        """The part of `answers` between `ready` and `finish`, which `raysal.model.engines` run.

        Args:
            x_BCHW: Images made `ready`.
            branches: Which of them answer.

        Returns:
            float32 logits at decoder resolution [B, C, h, w] of each branch, then the mean [B, D] of the first one's last encoder stage.
        """
        logits, pooled = [], None
        for k in branches:
            stages, prefix = _encode(self.branches[k], x_BCHW)
            pooled = _pooled(stages) if pooled is None else pooled
            logits.append(self._decoded(k, stages, prefix))
        assert pooled is not None
        return *logits, pooled

    def encode(self, images_BCHW: Tensor) -> Encoded:
        """The encoders' half of `forward`, to be decoded once or, by MC dropout, several times."""
        x_BCHW = self.ready(images_BCHW)
        stages = {k: _encode(branch, x_BCHW) for k, branch in enumerate(self.branches)}
        return Encoded(stages, images_BCHW.shape[-2:], x_BCHW.shape[-2:])

    def decode(self, encoded: Encoded, resolution: Resolution = "full") -> tuple[Tensor, ...]:
        """Logits of each encoded branch, cropped to the image; see `forward`."""
        return tuple(
            self.finish(self._decoded(k, *stages), encoded.size_HW, encoded.padded_HW, resolution) for k, stages in encoded.stages.items()
        )

    def ready(self, images_BCHW: Tensor) -> Tensor:
        """Float images in units of std around mean, padded to the stride by repeating the border (zeros would draw an edge)."""
        x_BCHW = (images_BCHW.float() - self.mean) / self.std
        height, width = x_BCHW.shape[-2:]
        bottom, right = (max(self.smallest_px, math.ceil(n / self._stride) * self._stride) - n for n in (height, width))
        if bottom or right:
            x_BCHW = F.pad(x_BCHW, (0, right, 0, bottom), mode="replicate")
        return x_BCHW.contiguous(memory_format=self.memory_format)

    def _decoded(self, k: int, stages: list[Tensor], prefix: tuple[Any, ...]) -> Tensor:
        branch: Any = self.branches[k]
        z_BChw: Tensor = branch.segmentation_head(branch.decoder(stages, *prefix)).float()
        return z_BChw

    def finish(self, z_BChw: Tensor, size_HW: Sequence[int], padded_HW: Sequence[int], resolution: Resolution) -> Tensor:
        """Logits of images `ready` made of them, upsampled where wanted and cropped to what is theirs."""
        if resolution == "full" and z_BChw.shape[-2:] != tuple(padded_HW):
            z_BChw = F.interpolate(z_BChw, size=tuple(padded_HW), mode="bilinear", align_corners=True)  # as smp's own heads do
        sizes = zip(size_HW, z_BChw.shape[-2:], padded_HW, strict=True)
        height, width = (math.ceil(n * z / p) for n, z, p in sizes)
        return z_BChw[..., :height, :width]


def prepare(model: TwoBranch, cfg: ModelConfig, device: torch.device | str) -> TwoBranch:
    """Readies a model for training on a device, before DDP wraps it: placement, layout, synchronised norms, compilation.

    Parameters that no logit depends on (PSPNet's and DPT's encoders have some) are frozen, as DDP waits for every gradient.

    Raises:
        ConfigError: `model.sync_bn` on several CPU workers; PyTorch synchronises batch norm on accelerators only.
    """
    _freeze_unused(model)
    if not cfg.compile:  # a compiler finds its own way
        speed_up(model)
    place(model, cfg, device)
    if cfg.sync_bn and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        if torch.device(device).type == "cpu":
            raise ConfigError("model.sync_bn: true, but the workers train on CPUs, where PyTorch has no such norm; set it false")
        from timm.layers import convert_sync_batchnorm

        for k, branch in enumerate(model.branches):
            model.branches[k] = convert_sync_batchnorm(branch)  # timm's: torch's own loses the activation of fused norms
    if cfg.compile:
        for part in (p for branch in model.branches for p in branch.children()):
            part.compile()  # encoder, decoder, head; in place, so that checkpoint keys stay the same
    return model


def place(model: TwoBranch, cfg: ModelConfig, device: torch.device | str) -> TwoBranch:
    """Moves a model to a device, in the memory layout that the configuration asks for."""
    model.memory_format = torch.channels_last if cfg.channels_last else torch.contiguous_format
    model.to(device)
    for branch in model.branches:
        branch.to(memory_format=model.memory_format)
    return model


def dropouts(model: nn.Module) -> list[nn.Module]:
    """All modules of a model that drop something; MC dropout turns these alone to train mode."""
    return [m for m in model.modules() if isinstance(m, _DropoutNd) and m.p > 0]


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Nothing is dropped inside; batch norm keeps its mode."""
    modules = [m for m in dropouts(model) if m.training]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for module in modules:
            module.train()


def _encode(branch: Any, x_BCHW: Tensor) -> tuple[list[Tensor], tuple[Any, ...]]:
    """The encoder's stages, and what else its decoder wants (vision transformers: the prefix tokens)."""
    out = branch.encoder(x_BCHW)
    return (out[0], out[1:]) if isinstance(out, tuple) else (out, ())


def _pooled(stages: list[Tensor]) -> Tensor:
    return stages[-1].float().mean(dim=(2, 3))


def _take_upsampling(head: Any) -> None:
    """Ends a head before its upsampling, so that logits are to be had at decoder resolution. No key of the weights changes."""
    for name, child in head.named_children():
        if isinstance(child, nn.Upsample):
            setattr(head, name, nn.Identity())
    if hasattr(head, "upsampling_factor"):  # DPT's head upsamples inside its forward
        head.upsampling_factor = 1


def _has_dropout(branch: Any) -> bool:
    return bool(dropouts(branch.decoder) or dropouts(branch.segmentation_head))


def _freeze_unused(model: TwoBranch) -> None:
    """Freezes parameters without influence on the logits, found by one backward pass of a small image in eval mode."""
    was_training = model.training
    model.eval()
    side = max(64, model.smallest_px)
    with torch.enable_grad():
        z1, z2 = model(torch.zeros(1, 3, side, side, device=model.mean.device))
        (z1.sum() + z2.sum()).backward()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.grad is not None)
    model.zero_grad(set_to_none=True)
    model.train(was_training)
