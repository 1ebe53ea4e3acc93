"""A network that has learnt a little, for what random weights can't show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from raysal.config import ModelConfig
from raysal.datasets.synthetic import scene
from raysal.labels import S5MARS
from raysal.model.checkpoint import ModelInfo, save
from raysal.model.network import TwoBranch

PX, SCENES, SHARPNESS, RIDGE = 64, 32, 6.0, 0.01


def fit_on_scenes(folder: Path) -> None:
    """A checkpoint of a small net that knows some classes and doubts others.

    Its last layers are fitted to the random features below them, by linear regression on 32 scenes of another planet: a training
    by gradients takes most of a minute, and ends elsewhere each time as sums round otherwise. What it says of a pixel comes from less
    than 12 px around it, so that tiles can be held to the untiled answer.
    """
    model = ModelConfig(arch="Unet", encoder="resnet18")
    net = TwoBranch(model, S5MARS.n_classes, seed=0)
    images, masks = zip(*(scene(1, i, PX) for i in range(SCENES)), strict=True)
    x, y = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(masks)).long()
    with torch.no_grad():
        for branch in net.branches:
            join = branch.decoder.blocks[3].conv1[0]  # of what comes from below and the encoder's first map: the second alone
            join.weight[:, : join.weight.shape[1] - branch.encoder.out_channels[1]] = 0
        net.train()
        for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = None  # the plain mean over all batches
        for part in x.split(8):
            net(part)
        net.eval()
        for k, branch in enumerate(net.branches):
            features: list[Tensor] = []
            head = next(m for m in branch.segmentation_head.modules() if isinstance(m, nn.Conv2d))
            with head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0])):  # noqa: B023
                for part in x.split(8):
                    net.core(net.ready(part), (k,))
            _fit(head, torch.cat(features), y)
    save(str(folder), net, ModelInfo(S5MARS, model, input_scale=1.0, tile_px=PX))


def _fit(head: nn.Conv2d, features_BChw: Tensor, truth_BHW: Tensor) -> None:
    """Ridge regression of the classes on what the head sees of each pixel."""
    side = head.kernel_size[0]
    seen = functional.unfold(features_BChw, side, padding=side // 2).transpose(1, 2).flatten(0, 1).double()
    seen = torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)
    wanted = functional.one_hot(truth_BHW.flatten(), S5MARS.n_classes).double()
    weighed = seen * (wanted @ (wanted.mean(0) + 0.01).rsqrt())[:, None]  # else rare classes are never named
    found = torch.linalg.solve(weighed.T @ seen + RIDGE * torch.eye(seen.shape[1]), weighed.T @ wanted) * SHARPNESS
    head.weight.copy_(found[:-1].T.reshape(head.weight.shape))
    assert head.bias is not None
    head.bias.copy_(found[-1])
