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

PX = 96


def train_on_scenes(folder: Path) -> None:
    """A checkpoint of a small net after 80 steps on 16 scenes of another planet: it knows some classes and doubts others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = ModelConfig(arch="DeepLabV3Plus", encoder="tu-mobilenetv3_small_050")
    net = TwoBranch(model, S5MARS.n_classes, seed=0).train()
    images, masks = zip(*(scene(1, i, PX) for i in range(16)), strict=True)
    x, y = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), torch.from_numpy(np.stack(masks)).long()
    share_C = torch.bincount(y.flatten(), minlength=S5MARS.n_classes) / y.numel()
    weight_C = (share_C + 0.005).rsqrt()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for step in range(80):
        batch = torch.randperm(16, generator=torch.Generator().manual_seed(step))[:4]
        loss = sum(functional.cross_entropy(z, y[batch], weight_C) for z in net(x[batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    save(str(folder), net, ModelInfo(S5MARS, model, input_scale=1.0, tile_px=PX))
