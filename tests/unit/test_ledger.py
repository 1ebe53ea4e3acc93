"""The ledger: finished stages are kept, everything else is done again."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from raysal.archive import uris
from raysal.archive.uris import exists, join, locked, read_bytes
from raysal.errors import ConfigError, InputError
from raysal.rounds.ledger import Ledger
from tests.helpers import tiny


def test_a_finished_stage_is_not_done_again(root: str) -> None:
    calls: list[str] = []
    for _ in range(2):
        ledger = Ledger(root)
        assert ledger.stage(0, "buy", lambda folder: calls.append(folder) or {"labels": 3}) == {"labels": 3}
    assert len(calls) == 1
    assert set(ledger.seconds(0)) == {"buy"}


def test_a_stage_that_failed_leaves_no_marker(root: str) -> None:
    ledger = Ledger(root)

    def fail(_: str) -> dict:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        ledger.stage(0, "train", fail)
    assert ledger.done(0, "train") is None
    assert ledger.stage(0, "train", lambda _: {"ok": True}) == {"ok": True}


def test_stages_are_told_as_they_begin_end_and_are_kept(root: str) -> None:
    told: list[tuple[int, str, str]] = []
    ledger = Ledger(root, lambda round_, name, what, seconds: told.append((round_, name, what)))
    for _ in range(2):
        ledger.stage(1, "score", lambda _: {})
    assert told == [(1, "score", "start"), (1, "score", "done"), (1, "score", "kept")]


def test_a_run_keeps_its_configuration_and_refuses_another(root: str) -> None:
    ledger = Ledger(root)
    ledger.check(tiny(root), "loop")
    assert not exists(join(root, "config.yaml")), "a check changes nothing"
    ledger.open(tiny(root), "loop")
    ledger.check(tiny(root, compute={"train_workers": 2}), "loop")  # where work runs may change
    ledger.check(tiny(root, loop={"rounds": 3}), "loop")  # how far to go may change
    with pytest.raises(ConfigError, match=r"train\.steps: was 12, now 13"):
        ledger.check(tiny(root, loop={"rounds": 3}, train={"steps": 13}), "loop")
    with pytest.raises(ConfigError, match="begun by `raysal loop`, not by `raysal train`"):
        ledger.check(tiny(root), "train")
    assert json.loads(read_bytes(join(root, "run.json")))["raysal_version"]


def test_a_training_keeps_its_labels_and_refuses_others(root: str) -> None:
    ledger = Ledger(root)
    ledger.open(tiny(root), "train", "a")
    ledger.check(tiny(root), "train", "a")
    for other in ("b", None):
        with pytest.raises(ConfigError, match="other labels"):
            ledger.check(tiny(root), "train", other)


def test_a_stage_can_be_had_again_and_a_run_has_stages_of_its_own(root: str) -> None:
    ledger, times = Ledger(root), []
    for _ in range(2):
        ledger.stage(None, "train", lambda _: times.append(1) or {})
    ledger.forget(None, "train")
    ledger.stage(None, "train", lambda _: times.append(1) or {})
    assert len(times) == 2
    assert ledger.done(0, "train") is None


def test_a_damaged_marker_names_the_file_and_the_fix(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    ledger.stage(0, "buy", lambda _: {})
    marker = tmp_path / "rounds" / "000" / "stages" / "buy.json"
    marker.write_text("{")
    with pytest.raises(InputError, match=r"buy\.json: damaged .*delete this file"):
        ledger.done(0, "buy")


def test_only_one_process_works_on_a_run(tmp_path: Path) -> None:
    with Ledger(str(tmp_path)).lock(), pytest.raises(InputError, match="another process is at work"), Ledger(str(tmp_path)).lock():
        pass
    with Ledger(str(tmp_path)).lock():
        assert exists(str(tmp_path / ".lock"))


def test_a_file_system_without_locks_is_worked_on_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Lustre without flock says ENOSYS, which is no sign of another process."""

    def refuse(number: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(uris.fcntl, "flock", lambda *_: refuse(errno.ENOSYS))
    with locked(str(tmp_path), "busy"):
        assert "no locks" in caplog.text
    monkeypatch.setattr(uris.fcntl, "flock", lambda *_: refuse(errno.EWOULDBLOCK))
    with pytest.raises(InputError, match="busy"), locked(str(tmp_path), "busy"):
        raise AssertionError("another process has it")
