"""What tests of submissions share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from raysal.cli import app
from raysal.jobs.submission import Submission, submission

ADDRESS = "http://127.0.0.1:9"
LABEL = ("s3://m/model", "s3://m/manifest", "--out", "s3://m/labels")


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever lies in the home of who runs the tests."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)


def made(verb: str, *arguments: str, **more: Any) -> Submission:
    """As the command line makes it."""
    values = typer.main.get_group(app).commands[verb].make_context(verb, list(arguments)).params
    return submission(verb, arguments, values, **more)


def config(folder: Path, text: str, name: str = "c.yaml") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)
