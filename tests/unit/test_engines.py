"""What computes the network: each engine says what eager float32 says, or is refused."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from raysal.config import ModelConfig, RuntimeConfig
from raysal.datasets.synthetic import scene
from raysal.errors import CheckpointError, ConfigError
from raysal.model import engines
from raysal.model.engines import Runtime, settle
from raysal.model.runtime import Predictor

needs_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="no OpenVINO; install it: pip install -e '.[openvino]'"
)
OPENVINO = Runtime("openvino", "float32", 0.98)
DEEPLAB = ModelConfig()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def scenes(px: int, n: int = 2) -> list[np.ndarray]:
    return [scene(0, i, px)[0] for i in range(n)]


@needs_openvino
def test_openvino_says_what_eager_says_at_any_size(trained: Path) -> None:
    eager, fast = Predictor.load(str(trained)), Predictor.load(str(trained), runtime=OPENVINO)
    for images in (scenes(96), scenes(64), [s[:61, :45] for s in scenes(96)]):
        for want, got in zip(eager.logits_and_features(images), fast.logits_and_features(images), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
        assert (eager.predict(images).masks == fast.predict(images).masks).mean() > 0.999


@needs_openvino
def test_nobody_is_told_that_openvino_is_used(trained: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from raysal.model.engines import Runtime; from raysal.model.runtime import Predictor\n"
        f"Predictor.load({str(trained)!r}, runtime=Runtime('openvino', 'float32', 0.9))\n"
        "assert not [name for name in sys.modules if name.startswith('openvino_telemetry') and sys.modules[name]]"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "intel").exists(), "where it keeps the id that it sends"


@needs_openvino
def test_openvino_gives_the_same_bytes_in_any_batch_and_from_any_thread(trained: Path) -> None:
    images, seen = scenes(96, 4), []
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        predictor = Predictor.load(str(trained), runtime=OPENVINO)
        with ThreadPoolExecutor(3) as callers:
            alone = list(callers.map(lambda image, p=predictor: p.predict([image]).probabilities, images))
        seen += [np.concatenate(alone).tobytes(), predictor.predict(images).probabilities.tobytes()]
    assert len(set(seen)) == 1


@needs_openvino
def test_openvino_runs_one_branch_where_one_predicts(trained: Path) -> None:
    eager, fast = Predictor.load(str(trained)), Predictor.load(str(trained), runtime=OPENVINO)
    for predictor in (eager, fast):
        predictor.info = replace(predictor.info, predict="branch1")
    np.testing.assert_allclose(fast.predict(scenes(64)).probabilities, eager.predict(scenes(64)).probabilities, atol=1e-4)


def test_bfloat16_is_close_and_held_to_what_is_asked(trained: Path) -> None:
    eager, half = (Predictor.load(str(trained), runtime=r) for r in (engines.EAGER, Runtime("eager", "bfloat16", 0.9)))
    z, z16 = eager.logits(scenes(96))[0], half.logits(scenes(96))[0]
    assert z16.dtype == torch.float32 and not torch.equal(z, z16)
    assert (z.argmax(1) == z16.argmax(1)).float().mean() > 0.9
    with pytest.raises(CheckpointError, match=r"runtime eager bfloat16 gives only .*; set runtime\.precision=float32"):
        Predictor.load(str(trained), runtime=Runtime("eager", "bfloat16", 1.0))


@needs_openvino
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process as Linux tells it")
def test_openvino_leaves_nothing_behind_of_a_network_that_is_let_go(trained: Path) -> None:
    """A replica takes one model after another into use; the weights are 115 MB."""
    held_mb = []
    for _ in range(5):
        Predictor.load(str(trained), runtime=OPENVINO).predict(scenes(64, 1))
        gc.collect()
        held_mb.append(psutil.Process().memory_info().rss / 1e6)
    assert held_mb[-1] - held_mb[1] < 200, held_mb


@pytest.mark.slow
def test_a_compiled_network_says_what_eager_says(trained: Path) -> None:
    eager, fast = Predictor.load(str(trained)), Predictor.load(str(trained), runtime=Runtime("compile", "float32", 0.98))
    for want, got in zip(eager.logits_and_features(scenes(96)), fast.logits_and_features(scenes(96)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


def test_an_engine_that_says_something_else_is_refused(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def __init__(self, model: engines.TwoBranch, precision: str, threads: int) -> None:
            self.model = model

        def __call__(self, x: torch.Tensor, branches: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
            *logits, pooled = self.model.core(x, branches)
            return *(z.roll(1, dims=1) for z in logits), pooled

    class Broken(Wrong):
        def __call__(self, x: torch.Tensor, branches: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
            raise RuntimeError("no such\n operation")

    for engine, said in (
        (Wrong, "gives only 0.0%"),
        (Broken, r"can't run this network here \(RuntimeError: no such operation\); set runtime.kind"),
    ):
        monkeypatch.setattr(engines, "_OpenVino", engine)
        with pytest.raises(CheckpointError, match=said):
            Predictor.load(str(trained), runtime=OPENVINO)


@needs_openvino
def test_a_precision_that_the_processor_lacks_is_refused_not_replaced(trained: Path) -> None:
    if engines.processor.has_bfloat16():
        pytest.skip("this processor computes in bfloat16")
    with pytest.raises(CheckpointError, match="computes in f32, not in bfloat16"):
        Predictor.load(str(trained), runtime=Runtime("openvino", "bfloat16", 0.9))


def test_a_runtime_is_what_its_name_says() -> None:
    assert Runtime.of(str(Runtime("compile", "bfloat16", 0.5))) == Runtime("compile", "bfloat16")


def absent() -> None:
    raise ImportError("no OpenVINO here")


def test_auto_takes_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.processor, "capabilities", lambda: ["FP32", "BF16"])
    assert str(settle(RuntimeConfig(), DEEPLAB, "cpu")) == "openvino bfloat16"
    assert str(settle(RuntimeConfig(precision="float32"), DEEPLAB, "cpu")) == "openvino float32"
    assert str(settle(RuntimeConfig(), ModelConfig(arch="DPT", encoder="tu-vit_small_patch14_dinov2"), "cpu")) == "eager float32"
    monkeypatch.setattr(engines.processor, "capabilities", lambda: ["FP32"])
    assert str(settle(RuntimeConfig(), DEEPLAB, "cpu")) == "openvino float32"
    with pytest.raises(ConfigError, match="runs on CPUs"):
        settle(RuntimeConfig(kind="openvino"), DEEPLAB, "cuda")
    monkeypatch.undo()
    monkeypatch.setattr(engines.processor, "openvino", absent)
    assert str(settle(RuntimeConfig(), DEEPLAB, "cpu")) == "eager float32"
    with pytest.raises(ConfigError, match=r"pip install 'raysal\[openvino\]'"):
        settle(RuntimeConfig(kind="openvino"), DEEPLAB, "cpu")


def test_who_goes_on_takes_the_runtime_of_the_rows_where_the_machine_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(before: str, **cfg: str) -> str:
        return str(engines.as_before(RuntimeConfig(**cfg), DEEPLAB, "cpu", before))

    monkeypatch.setattr(engines.processor, "capabilities", lambda: ["FP32", "BF16"])
    assert taken("") == taken("None") == taken("openvino float128") == "openvino bfloat16"
    assert taken("openvino float32") == "openvino float32" and taken("eager float32") == "eager float32"
    assert taken("openvino float32", precision="bfloat16") == "openvino bfloat16"  # what the configuration says goes first
    assert taken("eager float32", kind="openvino") == "openvino bfloat16"
    monkeypatch.setattr(engines.processor, "capabilities", lambda: ["FP32"])
    assert taken("openvino bfloat16") == "openvino float32"  # whose rows are then refused
    monkeypatch.setattr(engines.processor, "openvino", absent)
    monkeypatch.setattr(engines.processor, "capabilities", lambda: None)
    assert taken("openvino float32") == "eager float32"


def test_what_is_remembered_is_the_newest_and_bounded() -> None:
    passes: list[float] = []

    def engine(x_BCHW: torch.Tensor, branches: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        passes.append(x_BCHW.flatten()[0].item())
        return (x_BCHW + len(branches),)

    one = 4 * 3 * 8 * 8  # bytes of an answer
    recent = engines.Recent(engine, 2 * one)
    for value in (1.0, 2.0, 1.0, 3.0, 1.0, 2.0):
        x_BCHW = torch.full((1, 3, 8, 8), value)
        assert torch.equal(recent(x_BCHW, (0,))[0], x_BCHW + 1)
    assert passes == [1, 2, 3, 2]  # the second was forgotten for the third
    assert torch.equal(recent(torch.full((1, 3, 8, 8), 2.0), (0, 1))[0], torch.full((1, 3, 8, 8), 4.0))
    assert torch.equal(recent(torch.full((1, 3, 4, 16), 2.0), (0,))[0], torch.full((1, 3, 4, 16), 3.0))  # the same bytes in another shape
    nothing = engines.Recent(engine, one - 1)
    nothing(torch.ones(1, 3, 8, 8), (0,))
    assert not nothing._said and nothing._held == 0
