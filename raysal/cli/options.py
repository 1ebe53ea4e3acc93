"""Options that several verbs have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DASHBOARD = "http://127.0.0.1:8265"
"""Address of Ray's dashboard on this machine, or at the near end of an SSH tunnel."""

Set = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a config value, for example --set train.steps=200. Repeatable.")
]
ConfigFile = Annotated[Path, typer.Option("--config", help="YAML file; see configs/ for examples and raysal/config.py for every knob.")]
OptionalConfig = Annotated[Path | None, typer.Option("--config", help="YAML file for the knobs of this stage; defaults otherwise.")]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable result on stdout; logs go to stderr.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and an estimate of time from a short measurement; change nothing.")]
