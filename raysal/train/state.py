"""Training state beside a checkpoint: optimiser, student weights, step. Safetensors and JSON, never pickle."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from raysal.errors import CheckpointError


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        step: Steps done.
        best_miou: Best val mIoU so far, -1 before the first evaluation.
        schedule: Digest of what the schedule depends on; another digest refuses to resume.
    """

    step: int = 0
    best_miou: float = -1.0
    schedule: str = ""


def save_state(folder: Path, progress: Progress, student: nn.Module | None, optimizer: torch.optim.Optimizer) -> None:
    """Writes ``state.safetensors`` and ``state.json``; `student` only where the checkpoint's model is its average."""
    tensors: dict[str, torch.Tensor] = {}
    for index, (slot, value) in _slots(optimizer):
        tensors[f"optimizer.{index}.{slot}"] = value.detach().cpu().contiguous().clone()
    if student is not None:
        tensors |= {f"student.{k}": v.detach().cpu().contiguous().clone() for k, v in student.state_dict().items()}
    save_file(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(asdict(progress)))


def load_state(folder: Path, student: nn.Module | None, optimizer: torch.optim.Optimizer, device: torch.device) -> Progress:
    """Puts back what `save_state` wrote. Raises CheckpointError where files are missing or don't fit."""
    try:
        progress = Progress(**json.loads((folder / "state.json").read_text()))
        tensors = load_file(folder / "state.safetensors", device=str(device))
        if student is not None:
            student.load_state_dict({k.removeprefix("student."): v for k, v in tensors.items() if k.startswith("student.")})
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: training state can't be read ({error}); delete the run's train folder to start over") from error
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, slot = key.split(".", 2)
            # Adam counts steps on the CPU whatever the parameters' device.
            optimizer.state[parameters[int(index)]][slot] = value.cpu() if slot == "step" else value
    return progress


def _slots(optimizer: torch.optim.Optimizer) -> list[tuple[int, tuple[str, torch.Tensor]]]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [
        (i, (slot, value)) for i, p in enumerate(parameters) for slot, value in optimizer.state.get(p, {}).items() if torch.is_tensor(value)
    ]
