"""Submissions on a cluster, through Ray's job client: sent once, followed through broken connections, stopped, listed."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx
import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient
from ray.util.state.api import StateApiClient
from ray.util.state.common import ListApiOptions, StateResource

from raysal.errors import InputError, RaysalError, ResourceError
from raysal.jobs.submission import PREFIX, Submission, check_address, in_clear
from raysal.words import amounts

ANSWER_S = 20.0
"""A dashboard that takes longer for its first answer counts as unreachable."""

REQUEST_S = 300.0
"""One that is up but takes longer for an answer is gone; unpacking what travels with a job takes its time."""

QUIET_S = 60.0
"""After so long without a line of the log the job is asked how it is: a connection that was cut off tells nothing."""

PATIENCE_S = 600.0
"""How long a cluster may be away while its job is followed."""

PENDING_S = 5.0
"""Within which a job that is starting hears that it should stop."""

MARK = 0.001
"""Of a resource that marks nodes, as Ray books none without a number."""

POLL_S = 1.0

MOST_NODES = 10_000
"""Nodes that are asked for; Ray tells of no more at once."""

HOW_TOKEN = "put the cluster's token into ~/.ray/auth_token, or name its file in RAY_AUTH_TOKEN_PATH"

Say = Callable[[str], None]


class Jobs:
    """The jobs of a cluster.

    Args:
        address: Of its dashboard.
        warn: Told what is unsafe about it.
        insecure: Also a cluster that asks for no token will do.

    Raises:
        InputError: Nobody answers there or asks for a token, the token is missing or wrong, or its Ray is of another version than this one.
    """

    def __init__(self, address: str, warn: Say = lambda _: None, insecure: bool = False) -> None:
        self.address = check_address(address)
        wanted = _wants_token(self.address)
        if not wanted:
            said = f"{self.address} asks for no token: whoever reaches it can run programs there, and read what yours do"
            if not insecure:
                raise InputError(f"{said}; start its nodes with RAY_AUTH_MODE=token (docs/security.md), or say --insecure")
            warn(said)
        elif in_clear(self.address):
            warn(f"{self.address}: the token crosses the network in clear; use https or an SSH tunnel")
        # Ray would send the token to whoever is there; a header of that name keeps it from doing so.
        self.headers = {} if wanted else {"Authorization": ""}
        self.warn, self.client = warn, _client(self.address, self.headers)

    def submit(self, made: Submission, again: bool = False) -> tuple[str, JobDetails | None]:
        """Sends a submission, unless its job is under way or done.

        Args:
            made: The submission.
            again: Send it although it has succeeded: an archive may have grown.

        Returns:
            The job's id; and the job where it was there before, None where it is new.

        Raises:
            ResourceError: No node of the cluster has what the job's own process books.
            RaysalError: The cluster refuses the job, or does not answer.
        """
        id_, job = self._newest(made.id)
        if job is not None and not job.status.is_terminal():
            return id_, job
        if job is not None and job.status == JobStatus.SUCCEEDED and not again:
            return id_, job
        if job is not None:
            id_ = f"{made.id}-r{_number(made.id, id_) + 1}"
        self._check_room(made)
        try:
            with made.runtime_env() as runtime_env:
                self.client.submit_job(
                    entrypoint=made.entrypoint,
                    submission_id=id_,
                    runtime_env=runtime_env,
                    metadata=made.metadata,
                    entrypoint_num_cpus=made.cpus,
                    entrypoint_memory=made.memory or None,
                    entrypoint_num_gpus=made.gpus or None,
                    entrypoint_resources={made.on: MARK} if made.on else None,
                )
        except Exception as error:  # of all sorts, as the answer is
            if "already exists" in str(error):  # somebody else sent the same at the same moment
                return id_, self.job(id_)
            raise _refusal(self.address, error) from error
        return id_, None

    def job(self, id_: str) -> JobDetails:
        """What the cluster says of a job.

        Raises:
            InputError: It knows none of that id.
            RaysalError: It does not answer.
        """
        try:
            return self.client.get_job_info(id_)
        except Exception as error:
            if "does not exist" in str(error):
                raise InputError(f"{id_}: {self.address} knows no such job; see: raysal submit list --address {self.address}") from error
            raise _refusal(self.address, error) from error

    def jobs(self) -> list[JobDetails]:
        """All jobs of raysal that the cluster knows, the newest first."""
        try:
            found = [job for job in self.client.list_jobs() if (job.submission_id or "").startswith(PREFIX)]
        except Exception as error:
            raise _refusal(self.address, error) from error
        return sorted(found, key=lambda job: job.start_time or 0, reverse=True)

    def log(self, id_: str) -> str:
        """All that a job has written so far; of one that has ended on a node that is gone, the last lines, which Ray keeps if it failed."""
        job = self.job(id_)
        try:
            return self.client.get_job_logs(id_)
        except Exception as error:
            if not job.status.is_terminal() or isinstance(error, OSError):
                raise _refusal(self.address, error) from error
            self.warn(f"{id_}: the cluster can't read its log any more, its node may be gone; this is what it kept")
            return f"{job.message or ''}\n"

    def stop(self, id_: str, timeout_s: float = 60.0) -> tuple[bool, JobDetails]:
        """Stops a job and waits until it has, unless it waits for a node itself: Ray tells it once it has one. Returns whether it was under
        way, and the job."""
        job = self.job(id_)
        if job.status.is_terminal():
            return False, job
        try:
            self.client.stop_job(id_)
        except Exception as error:
            raise _refusal(self.address, error) from error
        begin = time.monotonic()
        while not (job := self.job(id_)).status.is_terminal():
            if job.status == JobStatus.PENDING and time.monotonic() > begin + PENDING_S:
                break
            if time.monotonic() > begin + timeout_s:
                raise RaysalError(f"{id_}: told to stop, but goes on after {timeout_s:g} s; say so once more")
            time.sleep(POLL_S)
        return True, job

    def follow(self, id_: str, write: Say, say: Say) -> JobDetails:
        """Writes a job's log as it grows, until the job has ended.

        Args:
            id_: The job.
            write: Gets the log, piece by piece.
            say: Gets what is going on besides.

        Raises:
            InputError: The cluster knows no such job (any more).
            RaysalError: The cluster was away for too long; the job may go on.
        """
        log, job, broken = _Log(write), None, 0.0
        while True:
            try:
                before, job, broken = job, self.job(id_), 0.0
                if job.status != JobStatus.PENDING:
                    asyncio.run(log.read(self.client, id_))
                    if job.status.is_terminal():
                        if not log.seen:
                            write(self.log(id_))
                        return job
                elif before is None:
                    say(f"{id_} waits for a node that has room for it")
            except InputError as error:
                if job is None:
                    raise
                raise RaysalError(f"{error}; was its head restarted? The same command sends the job again, and it goes on") from error
            except Exception as error:  # clients raise all sorts where a connection breaks
                if job is not None and job.status.is_terminal():  # its node may be gone, and its log with it
                    return job
                broken = broken or time.monotonic()
                if time.monotonic() - broken > PATIENCE_S:
                    raise RaysalError(
                        f"{self.address} answers no more ({_said(error)}); the job may go on: the same command attaches to it again"
                    ) from error
            time.sleep(POLL_S)

    def _check_room(self, made: Submission) -> None:
        """Refuses a job whose own process fits on no node that is up. Where none is up that takes work, or the configuration waits
        for an autoscaler, the job may be sent, with a warning."""
        have = _nodes(self.address, self.headers)
        need = {what: n for what, n in (("CPU", made.cpus), ("GPU", made.gpus), ("memory", made.memory), (made.on, MARK)) if what and n}
        if any(all(node.get(what, 0) >= n for what, n in need.items()) for node in have):
            return
        most = {what: max((node.get(what, 0) for node in have), default=0) for what in need}
        said = f"the job's own process books {amounts(need)}, but no node has that: of {len(have)} up the largest have {amounts(most)}"
        if made.grows or not any(node.get("CPU") for node in have):
            self.warn(f"{said}; it waits until an autoscaler brings such a node")
            return
        knobs = {"CPU": "lower --cpus", "memory": "lower --memory", "GPU": "set compute.use_gpu=false", made.on: "leave out --on"}
        lacks = [what for what, n in need.items() if n > most[what]] or list(need)
        do = ", ".join(knobs[what] for what in lacks)
        raise ResourceError(f"{said}; {do}, or have it wait for an autoscaler: --set compute.grow_s=600")

    def _newest(self, id_: str) -> tuple[str, JobDetails | None]:
        """The last job of a submission, and its id; the id alone where there was none."""
        mine = {job.submission_id or "": job for job in self.jobs() if _number(id_, job.submission_id or "")}
        if not mine:
            return id_, None
        last = max(mine, key=lambda other: _number(id_, other))
        return last, mine[last]


class _Log:
    """A job's log, of which each read writes what it has not written yet."""

    def __init__(self, write: Say) -> None:
        self.write, self.seen = write, 0

    async def read(self, client: JobSubmissionClient, id_: str) -> None:
        """From the beginning, as Ray sends it; returns at its end, or when nothing came for a while."""
        at, pieces = 0, client.tail_job_logs(id_).__aiter__()
        while True:
            try:
                piece = await asyncio.wait_for(anext(pieces), QUIET_S)
            except (StopAsyncIteration, asyncio.TimeoutError):
                return
            new = piece[max(0, self.seen - at) :]
            at += len(piece)
            if new:
                self.write(new)
                self.seen = at


def exit_code(job: JobDetails) -> int:
    """What a command that waited for a job ends with: the job's own code; 1 where it was stopped or killed."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    code = job.driver_exit_code or 1
    return code if 0 < code < 256 else 1


def why(job: JobDetails) -> str:
    """Why a job failed, in one line: what Ray says, or the last line of its log, which may be gone with its node."""
    if job.status != JobStatus.FAILED:
        return ""
    lines = (job.message or "").strip().splitlines()
    said = lines[-1:] if job.error_type == "JOB_ENTRYPOINT_COMMAND_ERROR" else lines
    return " ".join(" ".join(said).split())[:500]


def described(job: JobDetails) -> dict[str, Any]:
    """A job as the command line prints it."""
    return {
        "id": job.submission_id,
        "status": str(job.status),
        "verb": (job.metadata or {}).get("raysal_verb"),
        "entrypoint": job.entrypoint,
        "started_ms": job.start_time,
        "ended_ms": job.end_time,
        "exit_code": job.driver_exit_code,
        "why": why(job) or None,
    }


def _number(base: str, id_: str) -> int:
    """1 for a submission's first job, 2 for its -r2; 0 for jobs of others."""
    if id_ == base:
        return 1
    tail = id_.removeprefix(f"{base}-r")
    return int(tail) if tail != id_ and tail.isdigit() else 0


def _wants_token(address: str) -> bool:
    """Whether a cluster asks for a token. Raises InputError where no dashboard of Ray answers."""
    how = "is the cluster up, its dashboard (port 8265) reachable from here, the SSH tunnel open?"
    try:
        answer = httpx.get(f"{address}/api/authentication_mode", timeout=ANSWER_S)
        if answer.status_code in (401, 403) or answer.has_redirect_location:  # Ray itself answers everybody
            there = urlsplit(answer.headers.get("location", ""))
            where = f", to {there.scheme}://{there.netloc}" if there.netloc else ""
            raise InputError(
                f"{address}: what stands before the dashboard sends elsewhere or asks for a login of its own (HTTP {answer.status_code}"
                f"{where}); give the dashboard's own address, or reach it through an SSH tunnel or kubectl port-forward"
            )
        if answer.is_server_error:
            raise InputError(f"{address}: HTTP {answer.status_code}, the dashboard is not up yet or no more; {how}")
        return bool(answer.raise_for_status().json()["authentication_mode"] != "disabled")
    except httpx.TransportError as error:
        raise InputError(f"{address}: no answer ({_said(error)}); {how}") from error
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{address}: answers, but is no dashboard of Ray 2.52 or newer; {how}") from error


class _Client(JobSubmissionClient):
    """Ray's, which by itself waits for ever where a tunnel is frozen."""

    def _do_request(self, *args: Any, **options: Any) -> Any:
        return super()._do_request(*args, **{"timeout": REQUEST_S} | options)


def _client(address: str, headers: dict[str, str]) -> JobSubmissionClient:
    for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they greet, and say in two lines what is said here in one
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray lets the environment win over what it is given
    try:
        client = _Client(address, headers=dict(headers))
    except Exception as error:
        raise _refusal(address, error) from error
    theirs = client._server_ray_version  # asked by the constructor; there is no public way to it
    if theirs != ray.__version__:
        raise InputError(
            f"{address}: the cluster runs Ray {theirs}, this machine Ray {ray.__version__}; install the same: pip install ray=={theirs}"
        )
    return client


def _nodes(address: str, headers: dict[str, str]) -> list[Mapping[str, float]]:
    """What the nodes have that are up."""
    up = ListApiOptions(limit=MOST_NODES, filters=[("state", "=", "ALIVE")])
    try:
        client = StateApiClient(address, headers={"Content-Type": "application/json"} | headers)
        found: list[Any] = client.list(StateResource.NODES, up, raise_on_missing_output=False)
        return [node.resources_total or {} for node in found]
    except Exception as error:
        raise _refusal(address, error) from error


def _refusal(address: str, error: Exception) -> RaysalError:
    """What a user is told of what Ray's client raised."""
    text = _said(error)
    if isinstance(error, RaysalError):
        return error
    if isinstance(error, AuthenticationError):
        if text.startswith("Authentication required"):
            return InputError(f"{address}: the cluster asks for a token and none was sent; {HOW_TOKEN}")
        return InputError(f"{address}: the cluster refuses the token; {HOW_TOKEN}")
    if "status code 413" in str(error) or "exceeds the maximum size" in str(error):
        return InputError(f"{address}: what travels with the job is too large for the cluster ({text}); put it into the nodes' image")
    if isinstance(error, OSError):
        return RaysalError(f"{address}: answers no more ({text}); run the same command again once it does")
    return RaysalError(f"{address}: the cluster refuses: {text}")


def _said(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
