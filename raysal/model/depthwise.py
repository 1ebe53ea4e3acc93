"""A fast backward pass on CPUs for dilated depthwise convolutions, which PyTorch's CPU kernels handle several times slower than plain ones.

A convolution of dilation d reads pixels d apart, so it is d x d plain convolutions, one on each of the d x d sub-grids of the image.
The gradients are computed that way; the forward pass, and so every prediction, is PyTorch's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _DilatedDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, weight: Tensor, dilation: int) -> Tensor:
        ctx.save_for_backward(x_BCHW, weight)
        ctx.dilation = dilation
        return F.conv2d(x_BCHW, weight, padding=dilation * (weight.shape[-1] // 2), dilation=dilation, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_BCHW, weight = ctx.saved_tensors
        d, half = ctx.dilation, weight.shape[-1] // 2
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            sub_grids(grads[0], d), sub_grids(x_BCHW, d), weight, None, [1, 1], [half, half], [1, 1], False, [0, 0], len(weight), wanted
        )
        height, width = x_BCHW.shape[-2:]
        return from_sub_grids(grad_x, d, height, width) if wanted[0] else grad_x, grad_weight, None


class DilatedDepthwise(nn.Conv2d):
    """`nn.Conv2d` with gradients by sub-grids where that pays: float32 training on a CPU."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        learning = torch.is_grad_enabled() and (x_BCHW.requires_grad or self.weight.requires_grad)
        if not learning or x_BCHW.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return super().forward(x_BCHW)
        return _DilatedDepthwise.apply(x_BCHW, self.weight, self.dilation[0])


def speed_up(model: nn.Module) -> int:
    """Turns the dilated depthwise convolutions of a model into `DilatedDepthwise`, in place; weights and keys stay. Returns how many."""
    found = [m for m in model.modules() if type(m) is nn.Conv2d and _fits(m)]
    for module in found:
        module.__class__ = DilatedDepthwise
    return len(found)


def _fits(conv: nn.Conv2d) -> bool:
    """Depthwise, dilated, same size in and out, without a bias."""
    (k, k2), (d, d2) = conv.kernel_size, conv.dilation
    same = k % 2 == 1 and conv.padding == (d * (k // 2), d * (k // 2)) and conv.stride == (1, 1) and conv.padding_mode == "zeros"
    return conv.groups == conv.in_channels == conv.out_channels and k == k2 and d == d2 > 1 and same and conv.bias is None


def sub_grids(x_BCHW: Tensor, d: int) -> Tensor:
    """The d x d grids of pixels d apart, as images [d * d * B, C, ceil(H / d), ceil(W / d)], zeros where the size does not divide."""
    batch, channels, height, width = x_BCHW.shape
    x_BCHW = F.pad(x_BCHW, (0, -width % d, 0, -height % d))
    h, w = x_BCHW.shape[-2] // d, x_BCHW.shape[-1] // d
    grids = x_BCHW.reshape(batch, channels, h, d, w, d).permute(3, 5, 0, 1, 2, 4).reshape(d * d * batch, channels, h, w)
    return grids.contiguous(memory_format=torch.channels_last)


def from_sub_grids(grids: Tensor, d: int, height: int, width: int) -> Tensor:
    """The inverse of `sub_grids`, cut to [B, C, height, width]."""
    n, channels, h, w = grids.shape
    x_BCHW = grids.reshape(d, d, n // (d * d), channels, h, w).permute(2, 3, 4, 0, 5, 1).reshape(n // (d * d), channels, h * d, w * d)
    return x_BCHW[..., :height, :width]
