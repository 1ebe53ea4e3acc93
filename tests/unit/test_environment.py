"""A job knows by whom it was submitted, and refuses where that was another Python or raysal."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from raysal.environment import CLIENT, check_client, programs
from raysal.errors import InputError


def test_a_job_of_the_same_programs_and_a_command_of_nobody_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CLIENT, programs())
    check_client()
    monkeypatch.delenv(CLIENT)
    check_client()


@pytest.mark.parametrize("theirs", ["Python 3.9, raysal 0.0.1", programs().replace("Python 3", "Python 2")])
def test_a_job_of_other_programs_is_refused_with_both_and_the_fix(monkeypatch: pytest.MonkeyPatch, theirs: str) -> None:
    monkeypatch.setenv(CLIENT, theirs)
    with pytest.raises(InputError, match=rf"submitted by {theirs}, but the cluster has {programs()}; install the cluster's.*--wheel"):
        check_client()


def test_the_command_line_ends_before_it_begins() -> None:
    command = [sys.executable, "-m", "raysal", "index", "/no/such", "--out", "/no/such/either"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {CLIENT: "Python 3.9, raysal 0.0.1"})
    assert done.returncode == InputError.exit_code and "submitted by Python 3.9" in done.stderr
