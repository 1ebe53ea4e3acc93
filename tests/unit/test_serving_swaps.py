"""Models are swapped while the endpoint answers, and bad ones are refused."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch

from raysal.config import ModelConfig
from raysal.datasets.synthetic import scene
from raysal.errors import CheckpointError
from raysal.labels import AI4MARS, S5MARS, LabelSet
from raysal.model.checkpoint import ModelInfo, load, save
from raysal.model.network import TwoBranch
from raysal.serving.meters import Meters
from raysal.serving.service import Service
from raysal.serving.settings import Gate, ModelSpec, Settings
from tests.trained import PX
from tests.unit.endpoint import EAGER, SCENE, ask, encoded


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Callable[..., Path]:
    """Makes checkpoints that are like the trained one, but for something."""

    def make(name: str, noise: float = 0.0, label_set: LabelSet = S5MARS) -> Path:
        folder = tmp_path_factory.mktemp(name)
        found = load(str(trained))
        if label_set is not S5MARS:
            small = ModelConfig(arch="Unet", encoder="tu-mobilenetv3_small_050")
            net = TwoBranch(small, label_set.n_classes, 0)
            save(str(folder), net, ModelInfo(label_set, small, 1.0, PX))
            return folder
        for k, parameter in enumerate(found.model.parameters()):
            drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k))
            parameter.data += noise * float(parameter.data.abs().mean()) * drawn
        save(str(folder), found.model, found.info)
        return folder

    return make


def test_a_good_model_takes_over_and_a_bad_one_is_refused(trained: Path, other: Callable[..., Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("model.json", "model.safetensors"):
        (damaged / name).write_bytes((trained / name).read_bytes())
    (damaged / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes()[:-7] + b"1234567")
    reference = tmp_path / "reference"
    reference.mkdir()
    for i in range(3):
        (reference / f"{i}.png").write_bytes(encoded(scene(5, i, PX)[0]))
    better, worse, classes = other("better", 1e-3), other("worse", 2.0), other("classes", label_set=AI4MARS)

    async def asked(http: httpx.AsyncClient, service: Service) -> None:
        async def in_use() -> tuple[str, str | None]:
            told = (await http.get("/v1/model")).json()
            return told["digest"], told["refusal"]

        first, _ = await in_use()
        for bad, why in ((damaged, "damaged|sha256"), (classes, "classes"), (worse, "agreement"), (tmp_path / "none", "no checkpoint")):
            await service.use(ModelSpec(checkpoint=str(bad)))
            digest, refusal = await in_use()
            assert digest == first and refusal, bad
            assert re.search(why, refusal), refusal
        await service.use(ModelSpec(checkpoint=str(better), digest="0" * 64))
        assert (await in_use())[0] == first
        await service.use(ModelSpec(checkpoint=str(better)))
        second, refusal = await in_use()
        assert second != first and refusal is None
        assert (await http.post("/v1/masks", content=encoded(SCENE))).headers["x-model-digest"] == second
        await service.use(ModelSpec(checkpoint=str(trained), digest=first[:12]))
        assert await in_use() == (first, None)

    ask(trained, asked, gate=Gate(reference=str(reference), agreement=0.8))


def test_a_replica_that_starts_late_holds_the_new_model_against_the_one_before(trained: Path, other: Callable[..., Path]) -> None:
    classes = other("classes", label_set=AI4MARS)

    async def run() -> None:
        made = Settings(checkpoint=str(trained), runtime=EAGER, threads=1)
        service = Service(made, Meters())
        await service.use(ModelSpec(checkpoint=str(classes)))
        assert service.model is not None and service.model.spec.checkpoint == str(trained) and "classes" in str(service.refusal)
        alone = Service(made.model_copy(update={"checkpoint": "/nowhere"}), Meters())
        with pytest.raises(CheckpointError):
            await alone.use(ModelSpec(checkpoint="/nowhere"))

    asyncio.run(run())


def test_answers_that_began_with_the_old_model_end_with_it(trained: Path, other: Callable[..., Path]) -> None:
    better = other("better", 1e-3)

    async def asked(http: httpx.AsyncClient, service: Service) -> None:
        old = service.model.digest
        answers = [asyncio.ensure_future(http.post("/v1/masks", content=encoded(scene(0, i, PX)[0]))) for i in range(12)]
        await asyncio.sleep(0.02)
        await service.use(ModelSpec(checkpoint=str(better)))
        responses = await asyncio.gather(*answers)
        assert {r.status_code for r in responses} == {200}
        assert {r.headers["x-model-digest"] for r in responses} <= {old, service.model.digest}

    ask(trained, asked)
