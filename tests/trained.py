"""A network that has learnt a little, for what random weights can't show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from raysal.config import ModelConfig
from raysal.datasets.synthetic import scene
from raysal.labels import S5MARS
from raysal.model.checkpoint import ModelInfo, save
from raysal.model.network import TwoBranch

PX = 64


def train_on_scenes(folder: Path) -> None:
    """A checkpoint of a small net after 50 steps on 32 scenes of another planet: it knows some classes and doubts others."""
    threads, steps, most = torch.get_num_threads(), 50, 1e-3
    torch.set_num_threads(1)
    model = ModelConfig(arch="Unet", encoder="resnet18")  # pools nothing over the image: what it says is local
    net = TwoBranch(model, S5MARS.n_classes, seed=0).train()
    images, masks = zip(*(scene(1, i, PX) for i in range(32)), strict=True)
    x, y = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(masks)).long()
    weight_C = (torch.bincount(y.flatten(), minlength=S5MARS.n_classes) / y.numel() + 0.01).rsqrt()
    optimizer = torch.optim.AdamW(net.parameters(), most)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = most * (1 - step / steps) ** 0.9
        batch = torch.randperm(32, generator=torch.Generator().manual_seed(step))[:8]
        loss = sum(functional.cross_entropy(z, y[batch], weight_C) for z in net(x[batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    save(str(folder), net, ModelInfo(S5MARS, model, input_scale=1.0, tile_px=PX))
