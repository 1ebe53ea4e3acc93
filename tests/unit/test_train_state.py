"""Training state and logs: what is written is what is read, without pickle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from raysal.errors import CheckpointError
from raysal.train.logs import Log, read_log
from raysal.train.state import Progress, load_state, save_state

CPU = torch.device("cpu")


def learned(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    cls = {"sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "adamw": lambda p: torch.optim.AdamW(p, lr=0.1)}[name]
    return model, cls(model.parameters())


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randn(2, 3, 8, 8)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_restored_optimizer_takes_the_same_next_step(tmp_path: Path, name: str) -> None:
    model, optimizer = learned(name)
    for seed in range(3):
        step(model, optimizer, seed)
    save_state(tmp_path, Progress(step=3, best_miou=0.25, schedule="abc"), model, optimizer)
    other, fresh = learned(name)
    progress = load_state(tmp_path, other, fresh, CPU)
    assert progress == Progress(step=3, best_miou=0.25, schedule="abc")
    step(model, optimizer, 9)
    step(other, fresh, 9)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_half_a_state_is_refused_with_the_fix(tmp_path: Path) -> None:
    model, optimizer = learned("sgd")
    step(model, optimizer, 0)
    save_state(tmp_path, Progress(), None, optimizer)
    whole = (tmp_path / "state.safetensors").read_bytes()
    (tmp_path / "state.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="delete the run's train folder"):
        load_state(tmp_path, None, optimizer, CPU)


def test_a_resumed_log_drops_the_steps_that_will_be_done_again(root: str) -> None:
    log = Log(root)
    log.start(0)
    for n in range(1, 6):
        log.add({"step": n, "loss": 1 / n})
    again = Log(root)
    again.start(3)
    again.add({"step": 4, "loss": 0.5})
    assert [r["step"] for r in read_log(root)] == [1, 2, 3, 4]


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    Log(str(tmp_path)).add({"step": 1})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert read_log(str(tmp_path)) == [{"step": 1}]


def test_tensorboard_reads_the_same_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log(str(tmp_path))
    log.start(0)
    for n in range(1, 4):
        log.add({"step": n, "loss": float(n), "agreement": {"sky": 0.5}})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert events.Scalars("agreement/sky")[0].value == 0.5
