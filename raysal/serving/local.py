"""The endpoint on this machine: starts Ray and Serve, deploys, swaps models."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

from raysal.archive.uris import absolute
from raysal.client import Endpoint, Refused
from raysal.cluster import start_here
from raysal.errors import InputError, RaysalError, ResourceError
from raysal.serving.deployment import NAME, behind_haproxy
from raysal.serving.models import check_successor, following, load
from raysal.serving.settings import ModelSpec, Settings
from raysal.serving.tokens import HOW, Tokens

APPLICATION = "raysal"
IMPORT_PATH = "raysal.serving.deployment:build"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
ANYWHERE = ("0.0.0.0", "::")
POLL_S = 0.5
TOLD_S = 60.0
"""Until every replica has told which model it answers with."""

DRAIN_S = 60.0
"""For answers that take longer than the minute that Serve waits for them."""


def config(settings: Settings, host: str, port: int, replicas: int) -> dict[str, Any]:
    """A Serve config file's content; `serve deploy` takes the same."""
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": host, "port": port},
        "logging_config": {"encoding": "JSON", "enable_access_log": False},  # the guard logs each request, with its id
        "applications": [
            {
                "name": APPLICATION,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": settings.model_dump(mode="json"),
                "deployments": [{"name": NAME, "num_replicas": replicas}],
            }
        ],
    }


def check_exposure(settings: Settings, host: str) -> None:
    """Refuses to listen to the network without tokens. HAProxy listens on every address, and lets clients seem to be on this machine.

    Raises:
        InputError: It says how to make some.
    """
    if behind_haproxy() and not Tokens(settings.tokens_file).wanted:
        raise InputError(f"behind HAProxy every client needs a token, but there are none: {HOW}; or unset RAY_SERVE_ENABLE_HA_PROXY")
    if host not in LOOPBACK and not Tokens(settings.tokens_file).wanted:
        raise InputError(f"--host {host} listens to the network, but there are no tokens: {HOW}; or leave --host out: 127.0.0.1")


def promote(
    spec: ModelSpec,
    dashboard: str,
    on_wait: Callable[[str], None] = lambda _: None,
    timeout_s: float = 600.0,
    url: str | None = None,
    token: str | None = None,
) -> str:
    """Takes another checkpoint into use, on any cluster whose Serve runs the application.

    It is checked here first, on the CPU, as every replica will, so that a bad one changes nothing. Then every replica is asked what it
    answers with.

    Args:
        spec: The model.
        dashboard: Address of the cluster's dashboard, http://HOST:8265.
        on_wait: Called with what is going on.
        timeout_s: How long it may take.
        url: Address of the endpoint, where replicas are asked; None: those that Serve says it listens on.
        token: Bearer token of the endpoint, where it wants one.

    Returns:
        What the check found.

    Raises:
        InputError: No such application there, the model is refused, here or by a replica, or not all replicas could be asked.
        RaysalError: It took too long.
    """
    try:
        client = ServeSubmissionClient(dashboard)
        details: dict[str, Any] = client.get_serve_details()
    except Exception as error:  # the client raises all sorts where nobody answers
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{dashboard}: no dashboard of Ray answers ({said}); name it: --dashboard") from error
    configs = {name: app["deployed_app_config"] for name, app in details.get("applications", {}).items() if app.get("deployed_app_config")}
    mine = next((app for app in configs.values() if app.get("import_path") == IMPORT_PATH), None)
    if mine is None:
        raise InputError(f"{dashboard}: serves no application of {IMPORT_PATH}; start one: raysal serve CHECKPOINT")
    settings = Settings.model_validate(mine.get("args", {}))
    deployment = next((d for d in mine.get("deployments", []) if d["name"] == NAME), {"name": NAME})
    current = ModelSpec.model_validate(deployment.get("user_config") or settings.first)
    on_wait("checking the new model against the one in use")
    here = settings.model_copy(update={"use_gpu": False})
    old, new = load(current, here), load(spec, here)
    found = check_successor(new, old, settings.gate)
    wanted = following(new, old)
    others = [d for d in mine.get("deployments", []) if d["name"] != NAME]
    mine["deployments"] = [*others, {**deployment, "user_config": wanted.model_dump(mode="json")}]
    client.deploy_applications({"applications": list(configs.values())})
    _wait(client, mine["name"], on_wait, timeout_s)
    on_wait("asking each replica which model it answers with")
    _check_replicas(client, mine["name"], new.digest, url, token)
    return found


def _check_replicas(client: Any, name: str, digest: str, url: str | None, token: str | None) -> None:
    """Asks until every replica has told that it answers with a model. Raises InputError where one refused it, or did not tell."""
    end, taken, said = time.monotonic() + TOLD_S, set[str](), "each answer names one of them, by chance"
    while True:
        details = _details(client)
        of_app = details["applications"][name]
        replicas = {r["replica_id"] for r in of_app["deployments"][NAME]["replicas"] if r["state"] == "RUNNING"}
        for address in [url] if url else _addresses(details, of_app.get("route_prefix") or "/"):
            try:
                told = Endpoint(address, token, tries=1, timeout_s=10.0).model()
            except Refused as error:
                raise InputError(
                    f"the model is deployed, but {address} does not tell who answers with it ({error}); see --tokens"
                ) from error
            except RaysalError as error:
                said = str(error)
                continue
            if told["digest"] == digest:
                taken.add(told["replica"])
            elif told["refusal"]:
                raise InputError(
                    f"replica {told['replica']} refuses the model, {len(taken)} of {len(replicas)} are known to answer with it "
                    f"({told['refusal']}); go back: raysal serve promote with the old checkpoint"
                )
        if replicas and replicas <= taken:
            return
        if time.monotonic() > end:
            raise InputError(
                f"the model is deployed, but only {len(replicas & taken)} of {len(replicas)} replicas told that they answer with it "
                f"({said}); name the endpoint's address, --url, and ask it: GET /v1/model"
            )
        time.sleep(POLL_S / 5)


def _addresses(details: dict[str, Any], prefix: str) -> list[str]:
    """Where Serve's proxies listen."""
    http = details.get("http_options") or {}
    host, scheme = http.get("host", "127.0.0.1"), "https" if http.get("ssl_certfile") else "http"
    nodes = sorted({p["node_ip"] for p in details.get("proxies", {}).values() if p.get("node_ip")})
    hosts = nodes if host in ANYWHERE else [host]
    return [f"{scheme}://{f'[{h}]' if ':' in h else h}:{http.get('port', 8000)}{prefix.rstrip('/')}" for h in hosts]


def run(settings: Settings, host: str, port: int, replicas: int, on_wait: Callable[[str], None] = lambda _: None) -> str:
    """Starts the endpoint and leaves it running while this process lives.

    Returns:
        Address of the dashboard.

    Raises:
        InputError: It would listen to the network without tokens, or the checkpoint can't be used.
        ResourceError: Ray can't start.
        RaysalError: The endpoint does not come up.
    """
    check_exposure(settings, host)
    settings = settings.model_copy(update={"checkpoint": absolute(settings.checkpoint)})
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        context = start_here(
            num_cpus=2 * (os.cpu_count() or 1) + replicas,
            include_dashboard=True,
            log_to_driver=False,
            logging_level=30,
        )
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
    except Exception as error:  # ports in use, no space, and the like
        raise ResourceError(f"Ray Serve can't start on this machine: {error}; is port {port} taken? Name another: --port") from error
    address = f"http://{context.dashboard_url}"
    client = ServeSubmissionClient(address)
    client.deploy_applications(config(settings, host, port, replicas))
    _wait(client, APPLICATION, on_wait, 600.0)
    return address


def stop() -> None:
    """Finishes what was accepted, then ends Serve and Ray.

    The application goes first: Serve's own shutdown ends the proxies, and with them all connections, before the replicas are done.
    """
    with contextlib.suppress(TimeoutError):  # it waits for a minute
        serve.delete(APPLICATION)
    end = time.monotonic() + DRAIN_S
    while APPLICATION in serve.status().applications and time.monotonic() < end:
        time.sleep(POLL_S)
    serve.shutdown()
    ray.shutdown()


def _wait(client: Any, name: str, on_wait: Callable[[str], None], timeout_s: float) -> str:
    end, seen = time.monotonic() + timeout_s, ""
    while time.monotonic() < end:
        app = _details(client)["applications"].get(name, {})
        status = str(app.get("status", "NOT_STARTED"))
        if status == "RUNNING":
            return status
        if status in ("DEPLOY_FAILED", "UNHEALTHY"):
            said = [d.get("message", "") for d in app.get("deployments", {}).values()] + [app.get("message", "")]
            raise RaysalError(f"the endpoint does not come up: {_reason(next((m for m in said if m), status))}")
        if status != seen:
            on_wait(status)
            seen = status
        time.sleep(POLL_S)
    raise RaysalError(f"Serve is not done after {timeout_s:g} s; look at its dashboard")


def _details(client: Any) -> dict[str, Any]:
    try:
        found: dict[str, Any] = client.get_serve_details()
        return found
    except Exception as error:  # of all sorts, where the connection breaks
        raise RaysalError(f"Ray's dashboard answers no more ({type(error).__name__}); is the cluster up? Then run it again") from error


def _reason(message: str) -> str:
    """The sentence in Serve's message that says why: the last line of a traceback."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line.partition(": ")[2] for line in lines if line.startswith(("RuntimeError: ", "ray.exceptions"))]
    return (errors or lines or [message])[-1][:1000]
