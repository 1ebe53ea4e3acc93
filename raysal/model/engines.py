"""What computes the network's core: eager PyTorch, torch.compile or OpenVINO, in float32 or bfloat16.

Any of them may round as it likes, so each is held against eager float32 when it is made, and refused where it says something else.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysal.config import ModelConfig, RuntimeConfig
from raysal.errors import CheckpointError, ConfigError
from raysal.model.network import TwoBranch

Engine = Callable[[Tensor, tuple[int, ...]], tuple[Tensor, ...]]
"""Computes `TwoBranch.core`."""

CHECKED_HW = (160, 224)
"""Size of the images that an engine is checked on."""


@dataclass(frozen=True)
class Runtime:
    """A way to run a network, settled for a machine; see `raysal.config.RuntimeConfig`."""

    kind: Literal["eager", "compile", "openvino"] = "eager"
    precision: Literal["float32", "bfloat16"] = "float32"
    agreement: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind} {self.precision}"


EAGER = Runtime()


def settle(cfg: RuntimeConfig, model: ModelConfig, device: str) -> Runtime:
    """What `auto` means for a model on this machine.

    Raises:
        ConfigError: OpenVINO is asked for and not installed, or asked to run on a GPU.
    """
    cpu = not device.startswith("cuda")
    have = importlib.util.find_spec("openvino") is not None
    kind = cfg.kind
    if kind == "auto":
        # A vision transformer's trace holds for images of one size.
        kind = "openvino" if cpu and have and model.arch.lower() != "dpt" else "eager"
    if kind == "openvino" and not have:
        raise ConfigError("runtime.kind=openvino, but OpenVINO is not installed; pip install 'raysal[openvino]', or set runtime.kind=auto")
    if kind == "openvino" and not cpu:
        raise ConfigError("runtime.kind=openvino runs on CPUs; set compute.use_gpu=false, or runtime.kind=eager")
    precision = cfg.precision
    if precision == "auto":
        native = "BF16" in _capabilities() if kind == "openvino" else not cpu and torch.cuda.is_bf16_supported()
        precision = "bfloat16" if native else "float32"
    return Runtime(kind, precision, cfg.agreement)


def build(model: TwoBranch, runtime: Runtime, device: torch.device) -> Engine:
    """An engine for a model in eval mode on its device; calls may come from several threads, each on one.

    Raises:
        CheckpointError: It can't be made, or what it computes differs from eager float32.
    """
    if (runtime.kind, runtime.precision) == ("eager", "float32"):
        return model.core
    try:
        if runtime.kind == "openvino":
            engine: Engine = _OpenVino(model, runtime.precision)
        else:
            run = torch.compile(model.core) if runtime.kind == "compile" else model.core
            engine = _autocast(run, device) if runtime.precision == "bfloat16" else run
        same = _agreement(engine, model, device)
    except Exception as error:  # converters raise all sorts over what they don't know
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"runtime {runtime} can't run this network ({type(error).__name__}: {said}); set runtime.kind=eager"
        ) from error
    if same < runtime.agreement:
        raise CheckpointError(
            f"runtime {runtime} gives only {100 * same:.1f}% of test pixels the class that eager float32 gives, "
            f"{100 * runtime.agreement:g}% are asked for; set runtime.precision=float32 or runtime.kind=eager"
        )
    return engine


def _autocast(run: Engine, device: torch.device) -> Engine:
    def engine(x_BCHW: Tensor, branches: tuple[int, ...]) -> tuple[Tensor, ...]:
        with torch.autocast(device.type, torch.bfloat16):
            return tuple(t.float() for t in run(x_BCHW, branches))

    return engine


class _OpenVino:
    """OpenVINO on the CPU, for images of any size. It is given the threads that the process has when it is first called."""

    def __init__(self, model: TwoBranch, precision: str) -> None:
        self._model, self._precision, self._threads = model, precision, torch.get_num_threads()
        self._compiled: dict[tuple[int, ...], Any] = {}
        self._lock, self._local = threading.Lock(), threading.local()

    def __call__(self, x_BCHW: Tensor, branches: tuple[int, ...]) -> tuple[Tensor, ...]:
        requests = self._local.__dict__
        name = "request" + "".join(map(str, branches))
        if name not in requests:
            requests[name] = self._compile(branches).create_infer_request()
        found = requests[name].infer({0: x_BCHW.contiguous().numpy()}, share_inputs=True)
        return tuple(torch.from_numpy(found[k].copy()) for k in range(len(branches) + 1))

    def _compile(self, branches: tuple[int, ...]) -> Any:
        """The model for some branches; converted once, whoever asks first."""
        ov = _openvino()
        with self._lock:
            if branches not in self._compiled:
                converted = _converted(self._model, branches)
                converted.reshape(ov.PartialShape([1, 3, -1, -1]))
                settings = {
                    "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[self._precision],
                    "INFERENCE_NUM_THREADS": self._threads,
                    "NUM_STREAMS": self._threads,  # as many images at once, each on one thread
                    "ENABLE_CPU_PINNING": False,  # several actors share a machine: pinned, they would share its first cores
                }
                self._compiled[branches] = ov.Core().compile_model(converted, "CPU", settings)
            return self._compiled[branches]


class _Core(nn.Module):
    """`TwoBranch.core` of given branches as a module of its own, which converters want."""

    def __init__(self, model: TwoBranch, branches: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.which = model, branches

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        return self.model.core(x_BCHW, self.which)


def _converted(model: TwoBranch, branches: tuple[int, ...]) -> Any:
    x_BCHW = torch.zeros(1, 3, 64, 64).contiguous(memory_format=model.memory_format)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, on sizes that are fixed by design
        logging.getLogger("openvino").setLevel(logging.ERROR)
        traced = torch.jit.freeze(torch.jit.trace(_Core(model, branches).eval(), x_BCHW, check_trace=False))
        return _openvino().convert_model(traced, example_input=x_BCHW)


def _openvino() -> Any:
    """The library, slow to import, and without the part of it that tells its maker of every import and conversion."""
    sys.modules.setdefault("openvino_telemetry", cast(Any, None))
    return importlib.import_module("openvino")


def _capabilities() -> list[str]:
    return cast("list[str]", _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


@torch.no_grad()
def _agreement(engine: Engine, model: TwoBranch, device: torch.device) -> float:
    """Least share, over a few images, of pixels that get the class that eager float32 gives; 1 for a network that gives no numbers."""
    same = 1.0
    for seed in range(3):
        x_BCHW = model.ready(_landscape(seed).to(device))
        want, got = (_classes(run(x_BCHW, (0, 1))) for run in (model.core, engine))
        if want is not None:  # else its rows will say so
            same = min(same, 0.0 if got is None else (want == got).float().mean().item())
    return same


def _classes(core: tuple[Tensor, ...]) -> Tensor | None:
    p_BChw = torch.stack([z.softmax(1) for z in core[:-1]]).mean(0)
    return p_BChw.argmax(1) if p_BChw.isfinite().all() else None


def _landscape(seed: int) -> Tensor:
    """An image with structure at every scale, [1, 3, H, W] in 0..255: noise of 1/f amplitude under a bright top."""
    random = torch.Generator().manual_seed(seed)
    height, width = CHECKED_HW
    image = torch.linspace(60, -60, height).view(1, 1, -1, 1).expand(1, 3, height, width).clone()
    for octave in range(1, 7):
        noise = torch.randn(1, 3, 2**octave, 2**octave, generator=random)
        image += F.interpolate(noise, size=CHECKED_HW, mode="bilinear") * 64 / octave
    return (image + 128).clamp(0, 255).round()
