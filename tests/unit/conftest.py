"""What several unit tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from raysal.report import build
from tests.run_folder import Fabricator, fabricate, tiny_config


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors are faster on one thread, and their last bits the same on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two rounds, and its report."""
    run = fabricate(tmp_path_factory.mktemp("report") / "run")
    assert build(str(run)) == str(run / "report" / "index.html")
    return run


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    """A run that was stopped after its first labels were bought."""
    made = Fabricator(tiny_config(str(tmp_path / "run")))
    made.choose(0)
    return tmp_path / "run"
