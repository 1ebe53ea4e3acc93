"""What the stream tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from raysal.datasets.synthetic import scene
from raysal.images.masks import encode_mask
from raysal.labels import S5MARS
from raysal.model.checkpoint import ModelInfo, save
from raysal.model.network import TwoBranch
from raysal.stream import pool
from raysal.stream.score import score_pool
from tests.ray.scenes import by_id, configured, manifest_at


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small untrained net with its norms settled on scenes and its heads turned up, so that branches, passes and images differ."""
    torch.set_num_threads(1)
    cfg = configured()
    net = TwoBranch(cfg.model, S5MARS.n_classes, seed=0).train()
    scenes = torch.from_numpy(np.stack([scene(1, i, 64)[0] for i in range(8)])).permute(0, 3, 1, 2)
    with torch.no_grad():
        for _ in range(30):
            net(scenes)
        for parameter in (p for branch in net.branches for p in branch.segmentation_head.parameters()):
            parameter.mul_(5)
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    save(folder, net, ModelInfo(S5MARS, cfg.model, input_scale=1.0, tile_px=64))
    return folder


@pytest.fixture(scope="session")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ of two sizes and masks/ beside them."""
    root = tmp_path_factory.mktemp("archive")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    for i in range(42):
        image_HWC, mask_HW = scene(0, i, 64 if i % 3 else 48)
        Image.fromarray(image_HWC).save(root / "images" / f"{i:03d}.png")
        (root / "masks" / f"{i:03d}.png").write_bytes(encode_mask(mask_HW))
    return root


@pytest.fixture(scope="session")
def scored(
    ray_runtime: None, checkpoint: str, archive: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, dict], list[tuple], pool.Summary, Path]:
    """The archive scored in one shard, in the manifest's order."""
    out, calls = tmp_path_factory.mktemp("scored") / "scores", []
    summary = score_pool(
        manifest_at(archive), checkpoint, str(out), configured(), on_progress=lambda *now: calls.append(now), rows_per_shard=100
    )
    return by_id(out), calls, summary, out
