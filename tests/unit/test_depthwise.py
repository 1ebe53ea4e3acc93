"""Gradients by sub-grids are the gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from raysal.config import ModelConfig
from raysal.model.depthwise import DilatedDepthwise, from_sub_grids, speed_up, sub_grids
from raysal.model.network import TwoBranch, prepare


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9), st.sampled_from([3, 5]), st.integers(2, 4), st.booleans())
def test_output_and_gradients_are_those_of_the_plain_convolution(batch, height, width, kernel, dilation, last):
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 6, kernel, padding=dilation * (kernel // 2), dilation=dilation, groups=6, bias=False)
    fast = copy.deepcopy(plain)
    assert speed_up(fast) == 1 and type(fast) is DilatedDepthwise
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(batch, 6, height, width).contiguous(memory_format=layout)
    inputs, outputs = [], []
    for conv in (plain, fast):
        inputs.append(x.clone().requires_grad_())
        outputs.append(conv(inputs[-1]))
        (outputs[-1] ** 2).sum().backward()
    assert torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-4)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 4))
def test_sub_grids_come_back(height, width, d):
    x = torch.arange(2 * 3 * height * width, dtype=torch.float32).reshape(2, 3, height, width)
    assert torch.equal(from_sub_grids(sub_grids(x, d), d, height, width), x)


@pytest.mark.parametrize(
    "other",
    [
        {"groups": 1},
        {"dilation": 1, "padding": 1},
        {"stride": 2},
        {"padding": 0},
        {"bias": True},
        {"padding_mode": "reflect"},
    ],
)
def test_other_convolutions_are_left_alone(other):
    given = {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 4, "bias": False} | other
    assert speed_up(nn.Sequential(nn.Conv2d(4, 4, **given))) == 0


def test_a_prepared_model_has_them_and_keeps_its_keys_and_its_predictions():
    cfg = ModelConfig(encoder="tu-tf_efficientnet_lite0", atrous_rates=(2, 3, 4))
    model = TwoBranch(cfg, 4, 0)
    keys, image = list(model.state_dict()), torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    ready = prepare(copy.deepcopy(model), cfg, "cpu")
    assert list(ready.state_dict()) == keys
    assert sum(type(m) is DilatedDepthwise for m in ready.modules()) >= 6
    plain = [m for m in ready.modules() if type(m) is DilatedDepthwise]
    with torch.no_grad():
        fast = ready.eval()(image)
        for m in plain:
            m.__class__ = nn.Conv2d
        slow = ready(image)
    assert all(torch.equal(a, b) for a, b in zip(fast, slow, strict=True))


def test_frozen_weights_get_no_gradient_and_images_still_do():
    conv = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False).requires_grad_(False)
    speed_up(conv)
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    conv(x).sum().backward()
    assert x.grad is not None and conv.weight.grad is None
