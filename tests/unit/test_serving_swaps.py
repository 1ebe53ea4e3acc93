"""Models are swapped while the endpoint answers, and bad ones are refused."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch

from raysal.config import ModelConfig
from raysal.datasets.synthetic import scene
from raysal.errors import CheckpointError, InputError
from raysal.labels import AI4MARS, S5MARS, LabelSet
from raysal.model.checkpoint import ModelInfo, load, save
from raysal.model.network import TwoBranch
from raysal.serving.meters import Meters
from raysal.serving.models import check_successor, following, load as load_model
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
        if name == "random":
            save(str(folder), TwoBranch(found.info.model, S5MARS.n_classes, 5), found.info)
            return folder
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


def swapping(trained: Path, swaps: Callable[[Service], Awaitable[None]], gate: Gate = Gate()) -> None:  # noqa: B008
    """Runs swaps of a service that begins with the trained model."""

    async def run() -> None:
        made = Settings(checkpoint=str(trained), runtime=EAGER, threads=1, gate=gate)
        service = Service(made, Meters())
        await service.use(made.first)
        await swaps(service)

    asyncio.run(run())


def test_without_a_reference_a_broken_model_is_refused(trained: Path, other: Callable[..., Path]) -> None:
    async def swaps(service: Service) -> None:
        first = service.model.digest
        await service.use(ModelSpec(checkpoint=str(other("random"))))
        assert service.model.digest == first and "made-up scenes" in service.refusal and "gate.reference" in service.refusal
        await service.use(ModelSpec(checkpoint=str(other("better", 1e-3))))
        assert service.model.digest != first and service.refusal is None

    swapping(trained, swaps)


def test_the_model_before_may_always_come_back(trained: Path, other: Callable[..., Path]) -> None:
    async def swaps(service: Service) -> None:
        first = service.model
        await service.use(ModelSpec(checkpoint=str(other("random"))))
        second = service.model
        assert second.digest != first.digest and second.spec.previous.digest == first.digest
        service.settings = service.settings.model_copy(update={"gate": Gate(made_up=1.0)})
        await service.use(ModelSpec(checkpoint=str(other("worse", 2.0))))
        assert service.model is second and service.refusal
        back = following(first, second)
        late = Service(service.settings, Meters())  # a replica that starts now knows it from the spec alone
        await late.use(back)
        await service.use(ModelSpec(checkpoint=str(trained)))
        assert (service.model.digest, service.refusal, late.model.digest, late.refusal) == (first.digest, None, first.digest, None)

    swapping(trained, swaps, Gate(made_up=0.0))


def test_a_model_that_is_asked_for_again_is_not_loaded_again(
    trained: Path, other: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr("raysal.serving.service.load", lambda spec, settings: loaded.append(spec.checkpoint) or load_model(spec, settings))

    async def swaps(service: Service) -> None:
        model = service.model
        await service.use({"checkpoint": str(trained)})
        assert service.model is model and len(loaded) == 1
        await service.use(ModelSpec(checkpoint="/nowhere"))
        assert service.refusal
        await service.use(ModelSpec(checkpoint=str(trained)))
        assert service.model is model and service.refusal is None and loaded == [str(trained), "/nowhere"]

    swapping(trained, swaps)


@pytest.mark.parametrize("error", [MemoryError("no memory"), RuntimeError("CUDA out of memory"), None])
def test_whatever_is_wrong_with_a_new_model_the_old_one_stays(
    trained: Path, error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def swaps(service: Service) -> None:
        model = service.model
        if error is not None:
            monkeypatch.setattr("raysal.serving.service.load", lambda *_: (_ for _ in ()).throw(error))
        await service.use({"checkpoint": "x", "digset": "y"} if error is None else {"checkpoint": "x"})
        assert service.model is model and ("digset" if error is None else str(error)) in service.refusal

    swapping(trained, swaps)


def test_a_reference_of_other_classes_is_refused(trained: Path, tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(encoded(SCENE if name == "images" else np.zeros((PX, PX), np.uint8)))
    (tmp_path / "classes.json").write_text(json.dumps(AI4MARS.to_dict()))
    (tmp_path / "splits.json").write_text('{"train": [], "val": ["a"]}')
    model = load_model(ModelSpec(checkpoint=str(trained)), Settings(checkpoint=str(trained), runtime=EAGER))
    with pytest.raises(InputError, match=r"its classes \(soil, bedrock, sand, big rock\) are not the model's"):
        check_successor(model, model, Gate(reference=str(tmp_path)))


@pytest.mark.parametrize(("key", "value"), [("tile_px", 300_000), ("input_scale", 1e6), ("input_scale", float("nan"))])
def test_a_description_that_no_memory_would_hold_is_refused_at_reading(trained: Path, key: str, value: float) -> None:
    with pytest.raises(CheckpointError, match=f"{key}.*at most"):
        replace(load(str(trained)).info, **{key: value})
