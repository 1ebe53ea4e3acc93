"""`raysal submit`: the verbs as jobs of a Ray cluster, and what has become of them."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raysal.cli.options import DASHBOARD, Json
from raysal.cli.tokens import authenticated
from raysal.errors import InputError
from raysal.jobs.submission import VERBS, submission
from raysal.progress import Ui

if TYPE_CHECKING:
    from raysal.jobs.cluster import JobDetails, Jobs

INTERRUPTED = 130
"""Exit code of a command that was left with Ctrl-C."""

Address = Annotated[
    str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard; through an SSH tunnel it is on this machine.")
]
Id = Annotated[str, typer.Argument(metavar="ID", help="The job's id, as raysal submit said it.")]

Insecure = Annotated[bool, typer.Option("--insecure", help="Also to a cluster that asks for no token.")]

app = typer.Typer(
    no_args_is_help=True,
    help="The verbs as jobs of a Ray cluster. The same submission twice is one job; one that failed is sent again and goes on.",
)


def verb(
    context: typer.Context,
    address: Address = DASHBOARD,
    wheel: Annotated[
        Path | None, typer.Option(help="Wheel of raysal for the job. Default: the cluster's image has raysal.", show_default=False)
    ] = None,
    cpus: Annotated[
        float, typer.Option(min=0.01, help="Logical CPUs of the job's own process; above 0, so that it is kept off a head without any.")
    ] = 1.0,
    memory: Annotated[str | None, typer.Option(help="Memory that it books, for example 4G.")] = None,
    on: Annotated[
        str, typer.Option(metavar="RESOURCE", help="Only on nodes with this custom resource: a job ends with the node of its own process.")
    ] = "",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the job's log to its end, and exit as it does.")] = True,
    again: Annotated[bool, typer.Option("--again", help="Also where the same has succeeded before: archives grow.")] = False,
    insecure: Insecure = False,
    json_: Json = False,
) -> None:
    """As a job on a cluster, with the verb's own arguments and options."""
    authenticated(starts=False)
    from raysal.archive.filters import size
    from raysal.jobs.cluster import Jobs, described

    name = context.command.name or ""
    made = submission(name, context.args, _parsed(name, context.args), wheel, cpus, size(memory, "--memory") or 0, on)
    ui = Ui(json_)
    jobs = Jobs(address, ui.warning, insecure)
    id_, before = jobs.submit(made, again)
    if before is not None and before.status.is_terminal():
        return _report(ui, before, f"{id_} succeeded before, nothing to do; once more, for what is new since: --again")
    ui.say(f"{id_}: {'under way already, attached' if before is not None else 'submitted'}")
    if not wait:
        return ui.result(described(jobs.job(id_)), f"its log: {_how('logs', id_, jobs)}")
    job = _followed(ui, jobs, id_)
    if job.driver_exit_code == InputError.exit_code and made.here:
        ui.say(f"these exist on this machine; can the cluster's nodes see them too? {', '.join(made.here)}")
    _ended(ui, job)


for _name in VERBS:
    app.command(
        _name,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        help=f"Submits raysal {_name}, with the arguments and options of that verb (raysal {_name} --help).\n\n"
        f"Example: raysal submit {_name} ... --address {DASHBOARD}",
    )(verb)


@app.command()
def status(id_: Id, address: Address = DASHBOARD, json_: Json = False) -> None:
    """How a job is.

    Example: raysal submit status raysal-label-0123456789ab
    """
    ui, jobs = Ui(json_), _jobs(address, json_)
    _report(ui, jobs.job(id_))


@app.command()
def logs(
    id_: Id,
    follow: Annotated[bool, typer.Option("--follow", help="Until the job has ended; exit as it does.")] = False,
    address: Address = DASHBOARD,
) -> None:
    """What a job has written.

    Example: raysal submit logs raysal-label-0123456789ab --follow
    """
    jobs = _jobs(address, False)
    if follow:
        ui = Ui(False)
        _ended(ui, _followed(ui, jobs, id_))
    else:
        _write(jobs.log(id_))


@app.command()
def stop(id_: Id, address: Address = DASHBOARD, json_: Json = False) -> None:
    """Stops a job. The same submission goes on from there.

    Example: raysal submit stop raysal-label-0123456789ab
    """
    jobs = _jobs(address, json_)
    stopped, job = jobs.stop(id_)
    if job.status.is_terminal():
        _report(Ui(json_), job, None if stopped else f"{id_}: ended before ({job.status})")
    else:
        waits = "told to stop, but it waits for a node itself and hears of it once it has one, or has waited too long (docs/cluster.md)"
        _report(Ui(json_), job, f"{id_}: {waits}")


@app.command("list")
def list_(address: Address = DASHBOARD, json_: Json = False) -> None:
    """All jobs of raysal that the cluster knows, the newest first.

    Example: raysal submit list --address http://127.0.0.1:8265
    """
    from raysal.jobs.cluster import described

    found = _jobs(address, json_).jobs()
    Ui(json_).result({"jobs": [described(job) for job in found]}, "\n".join(map(_line, found)) or "no jobs")


def _parsed(name: str, arguments: list[str]) -> dict[str, Any]:
    """The arguments as the verb itself reads them; it refuses what it would refuse."""
    from raysal.cli import app as whole

    commands = typer.main.get_group(whole).commands
    values: dict[str, Any] = commands[name].make_context(f"raysal submit {name}", list(arguments)).params
    return values


def _jobs(address: str, as_json: bool) -> Jobs:
    authenticated(starts=False)
    from raysal.jobs.cluster import Jobs

    return Jobs(address, Ui(as_json).warning, insecure=True)  # nothing of ours goes there


def _followed(ui: Ui, jobs: Jobs, id_: str) -> JobDetails:
    """Shows a job's log to its end. Ctrl-C leaves the job alone."""
    try:
        return jobs.follow(id_, _to_stderr if ui.as_json else _write, ui.say)
    except KeyboardInterrupt:
        ui.say(
            f"\n{id_} goes on without this command; to see it: {_how('logs', id_, jobs)} --follow; to stop it: {_how('stop', id_, jobs)}"
        )
        raise typer.Exit(INTERRUPTED) from None


def _ended(ui: Ui, job: JobDetails) -> None:
    """Reports a job that has ended, and exits as it did."""
    from raysal.jobs.cluster import exit_code

    _report(ui, job)
    if code := exit_code(job):
        ui.say("the same submission goes on from where it was")
        raise typer.Exit(code)


def _report(ui: Ui, job: JobDetails, text: str | None = None) -> None:
    from raysal.jobs.cluster import described

    ui.result(described(job), text or _line(job))


def _line(job: JobDetails) -> str:
    """A job in one line."""
    from raysal.jobs.cluster import why

    began = datetime.fromtimestamp((job.start_time or 0) / 1000).strftime("%Y-%m-%d %H:%M:%S")
    reason = why(job)
    return f"{job.submission_id}  {job.status}  since {began}" + (f"  {reason}" if reason else "")


def _how(what: str, id_: str, jobs: Jobs) -> str:
    return f"raysal submit {what} {id_} --address {jobs.address}"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _to_stderr(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
