"""What several unit tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from filelock import FileLock

from raysal.cli import main
from raysal.model.checkpoint import INFO
from raysal.report import build
from tests import output_folder
from tests.helpers import Call
from tests.run_folder import Fabricator, fabricate, tiny_config
from tests.trained import fit_on_scenes


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors are faster on one thread, and their last bits the same on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A checkpoint that knows a little (`tests.trained`); of several test processes the first makes it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "trained"
    with FileLock(f"{folder}.lock"):
        if not (folder / INFO).exists():
            fit_on_scenes(folder)
    return folder


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


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A bucket of a server on this machine."""
    pytest.importorskip("s3fs", reason="no s3fs; install it: pip install -e '.[s3]'")
    server = pytest.importorskip("moto.server", reason="no moto; install it to test S3: pip install 'moto[server]'").ThreadedMotoServer(
        port=0
    )
    server.start()
    host, port = server.get_host_and_port()
    before = dict(fsspec.config.conf)
    fsspec.config.conf["s3"] = {"endpoint_url": f"http://{host}:{port}", "key": "k", "secret": "s"}
    fsspec.filesystem("s3").mkdir("archive")
    yield "s3://archive"
    fsspec.config.conf.clear()
    fsspec.config.conf.update(before)
    server.stop()


@pytest.fixture
def raysal(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Calls ``raysal ARGUMENTS`` in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["raysal", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not painted, which takes most of a page's time; other tests look at them."""
    monkeypatch.setattr("raysal.report.charts.png", lambda _: output_folder.png(1))
    monkeypatch.setattr("raysal.report.survey_page.write_tiles", lambda *_: None)
