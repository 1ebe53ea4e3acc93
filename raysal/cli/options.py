"""Options that several verbs have."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from raysal import __version__


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"raysal {__version__}, Ray {metadata.version('ray')}, Python {platform.python_version()}")
        raise typer.Exit


DASHBOARD = "http://127.0.0.1:8265"
"""Address of Ray's dashboard on this machine, or at the near end of an SSH tunnel."""

Set = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a config value, for example --set train.steps=200. Repeatable.")
]
ConfigFile = Annotated[Path, typer.Option("--config", help="YAML file; see configs/ for examples and raysal/config.py for every knob.")]
OptionalConfig = Annotated[Path | None, typer.Option("--config", help="YAML file for the knobs of this stage; defaults otherwise.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout; logs go to stderr.")]
Version = Annotated[bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Which raysal, Ray and Python this is.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and an estimate of time from a short measurement; change nothing.")]
