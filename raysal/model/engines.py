"""What computes the network's core: eager PyTorch, torch.compile or OpenVINO, in float32 or bfloat16.

Any of them may round as it likes, so each is held against eager float32 when it is made, and refused where it says something else.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import warnings
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raysal.config import ModelConfig, RuntimeConfig
from raysal.errors import CheckpointError, ConfigError
from raysal.model import processor
from raysal.model.network import Core, TwoBranch

CHECKED_HW = (160, 224)
"""Size of the images that an engine is made and checked with."""

ATTENTION = ("vit", "swin", "mit_", "pvt", "beit", "deit", "dino", "eva", "former", "coat", "cait", "xcit", "hiera", "sam")
"""In names of encoders whose trace may hold for images of one size alone."""


@dataclass(frozen=True)
class Runtime:
    """A way to run a network, settled for a machine; see `raysal.config.RuntimeConfig`."""

    kind: Literal["eager", "compile", "openvino"] = "eager"
    precision: Literal["float32", "bfloat16"] = "float32"
    agreement: float = 0.0

    def __str__(self) -> str:
        return f"{self.kind} {self.precision}"

    @property
    def needs_bfloat16(self) -> bool:
        """Whether the processor must compute in it; PyTorch does without."""
        return (self.kind, self.precision) == ("openvino", "bfloat16")

    @classmethod
    def of(cls, text: str) -> Runtime:
        """From what `str` made of one."""
        kind, precision = text.split()
        return cls(cast(Any, kind), cast(Any, precision))


EAGER = Runtime()


def settle(cfg: RuntimeConfig, model: ModelConfig, device: str) -> Runtime:
    """What `auto` means for a model on this machine.

    Raises:
        ConfigError: OpenVINO is asked for and not installed, or asked to run on a GPU.
    """
    cpu, kind, precision = not device.startswith("cuda"), cfg.kind, cfg.precision
    if kind == "auto":
        traced = cpu and not any(word in model.encoder for word in ATTENTION)
        kind = "openvino" if traced and processor.capabilities() is not None else "eager"
    if kind == "openvino" and not cpu:
        raise ConfigError("runtime.kind=openvino runs on CPUs; set compute.use_gpu=false, or runtime.kind=eager")
    if kind == "openvino" and processor.capabilities() is None:
        raise ConfigError("runtime.kind=openvino, but OpenVINO is not installed; pip install 'raysal[openvino]', or set runtime.kind=auto")
    if precision == "auto" and kind == "openvino":
        precision = "bfloat16" if processor.has_bfloat16() else "float32"
    elif precision == "auto":  # a driver without a GPU can't ask those of its cluster; most compute in bfloat16
        precision = "float32" if cpu or (torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False)) else "bfloat16"
    return Runtime(kind, precision, cfg.agreement)


def as_before(cfg: RuntimeConfig, model: ModelConfig, device: str, before: str) -> Runtime:
    """What `auto` means where rows are there already: what made them, if this machine can do that too; another one rounds otherwise.

    Args:
        cfg, model, device: As in `settle`.
        before: The runtime of the rows, as `str` says it; anything else counts as none.

    Raises:
        ConfigError: As `settle`.
    """
    with contextlib.suppress(ValueError, ConfigError):
        was = Runtime.of(before)
        named = RuntimeConfig(kind=was.kind, precision=was.precision, agreement=cfg.agreement)  # refuses what is none
        can = not was.needs_bfloat16 or processor.has_bfloat16()
        if can and cfg.kind in ("auto", was.kind) and cfg.precision in ("auto", was.precision):
            return settle(named, model, device)
    return settle(cfg, model, device)


def build(model: TwoBranch, runtime: Runtime, device: torch.device, answers: tuple[int, ...] = (0, 1)) -> Core:
    """An engine for a model in eval mode on its device; calls may come from several threads, each on one.

    Args:
        model: Already placed.
        runtime: What to make.
        device: The model's.
        answers: The branches that masks come from; they are checked, beside both.

    Raises:
        CheckpointError: It can't be made, or what it computes differs from eager float32.
    """
    if (runtime.kind, runtime.precision) == ("eager", "float32"):
        return model.core
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tracing and the check are small: one thread is faster, much so where others want the cores
    try:
        if runtime.kind == "openvino":
            engine: Core = _OpenVino(model, runtime.precision, threads)
        else:
            run = torch.compile(model.core, dynamic=True) if runtime.kind == "compile" else model.core
            engine = _autocast(run, device) if runtime.precision == "bfloat16" else run
        same = min(_agreement(engine, model, device, branches) for branches in {(0, 1), answers})
    except Exception as error:  # converters raise all sorts over what they don't know
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"runtime {runtime} can't run this network here ({type(error).__name__}: {said}); set "
            + ("runtime.precision=float32 or " if runtime.precision == "bfloat16" else "")
            + "runtime.kind=eager"
        ) from error
    finally:
        torch.set_num_threads(threads)
    if same < runtime.agreement:
        raise CheckpointError(
            f"runtime {runtime} gives only {100 * same:.1f}% of test pixels the class that eager float32 gives, "
            f"{100 * runtime.agreement:g}% are asked for; set runtime.precision=float32 or runtime.kind=eager"
        )
    return engine


class Recent:
    """An engine on the CPU that remembers what it said of the last images: several questions about one cost one pass.

    Args:
        engine: Computes what is not remembered.
        n_bytes: Of answers to keep.
    """

    def __init__(self, engine: Core, n_bytes: int) -> None:
        self._engine, self._n_bytes, self._held = engine, n_bytes, 0
        self._said: OrderedDict[tuple[object, ...], tuple[Tensor, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, x_BCHW: Tensor, branches: tuple[int, ...]) -> tuple[Tensor, ...]:
        key = (hashlib.blake2b(x_BCHW.contiguous().numpy().data).digest(), x_BCHW.shape, branches)
        with self._lock:
            if key in self._said:
                self._said.move_to_end(key)
                return self._said[key]
        said = self._engine(x_BCHW, branches)
        with self._lock:
            if key not in self._said:
                self._said[key] = said
                self._held += _size(said)
            while self._held > self._n_bytes:
                self._held -= _size(self._said.popitem(last=False)[1])
        return said


def _size(tensors: tuple[Tensor, ...]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _autocast(run: Core, device: torch.device) -> Core:
    def engine(x_BCHW: Tensor, branches: tuple[int, ...]) -> tuple[Tensor, ...]:
        with torch.autocast(device.type, torch.bfloat16):
            return tuple(t.float() for t in run(x_BCHW, branches))

    return engine


class _OpenVino:
    """OpenVINO on the CPU, for images of any size, on so many threads."""

    def __init__(self, model: TwoBranch, precision: str, threads: int) -> None:
        self._model, self._precision, self._threads = model, precision, threads
        self._compiled: dict[tuple[int, ...], Any] = {}
        self._lock, self._local = threading.Lock(), threading.local()

    def __call__(self, x_BCHW: Tensor, branches: tuple[int, ...]) -> tuple[Tensor, ...]:
        requests = self._local.__dict__
        name = "request" + "".join(map(str, branches))
        if name not in requests:
            requests[name] = self._compile(branches).create_infer_request()
        found = requests[name].infer({0: x_BCHW.contiguous().numpy()}, share_inputs=True)
        return tuple(torch.from_numpy(found[k]) for k in range(len(branches) + 1))

    def _compile(self, branches: tuple[int, ...]) -> Any:
        """The model for some branches; converted once, whoever asks first."""
        ov = processor.openvino()
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
                compiled = ov.Core().compile_model(converted, "CPU", settings)
                if (got := compiled.get_property("INFERENCE_PRECISION_HINT").to_string()) != settings["INFERENCE_PRECISION_HINT"]:
                    raise RuntimeError(f"this CPU computes in {got}, not in {self._precision}")  # it would do so without a word
                self._compiled[branches] = compiled
            return self._compiled[branches]


class _CoreModule(nn.Module):
    """`TwoBranch.core` of given branches as a module of its own, which converters want."""

    def __init__(self, model: TwoBranch, branches: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.which = model, branches

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        return self.model.core(x_BCHW, self.which)


def _converted(model: TwoBranch, branches: tuple[int, ...]) -> Any:
    x_BCHW = model.ready(_landscape(0))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, on sizes that are fixed by design
        logging.getLogger("openvino").setLevel(logging.ERROR)
        traced = torch.jit.trace(_CoreModule(model, branches).eval(), x_BCHW, check_trace=False)  # frozen, PyTorch would keep its weights
        return processor.openvino().convert_model(traced, example_input=x_BCHW)


@torch.no_grad()
def _agreement(engine: Core, model: TwoBranch, device: torch.device, branches: tuple[int, ...]) -> float:
    """Least share, over a few images, of pixels that get the class that eager float32 gives; 1 for a network that gives no numbers."""
    same = 1.0
    for seed in range(3):
        x_BCHW = model.ready(_landscape(seed).to(device))
        want, got = (_classes(run(x_BCHW, branches)) for run in (model.core, engine))
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
