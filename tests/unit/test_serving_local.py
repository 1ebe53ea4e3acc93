"""What a promotion says, and in which order an endpoint is ended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raysal.client import Endpoint, Refused
from raysal.errors import InputError, RaysalError
from raysal.serving import local
from raysal.serving.settings import ModelSpec, Settings
from tests.helpers import Call

OLD, NEW = "a" * 64, "b" * 64


class Serve:
    """A cluster whose replicas answer by turns.

    Args:
        replicas: Digest and refusal of each.
    """

    def __init__(self, replicas: dict[str, tuple[str, str | None]], host: str = "127.0.0.1") -> None:
        self.replicas, self.host = replicas, host
        self.deployed, self.asked = list[dict](), list[str]()

    def get_serve_details(self) -> dict[str, Any]:
        content = local.config(Settings(checkpoint="/models/old", use_gpu=True), self.host, 8000, len(self.replicas))
        replicas = [{"replica_id": name, "state": "RUNNING"} for name in self.replicas]
        app = {"deployed_app_config": content["applications"][0], "status": "RUNNING", "route_prefix": "/"}
        app["deployments"] = {local.NAME: {"replicas": [*replicas, {"replica_id": "ended", "state": "STOPPING"}]}}
        proxies = {"n1": {"node_ip": "10.0.0.1"}, "n2": {"node_ip": "10.0.0.2"}}
        return {"applications": {local.APPLICATION: app}, "http_options": content["http_options"], "proxies": proxies}

    def deploy_applications(self, content: dict) -> None:
        self.deployed.append(content)

    def model(self, endpoint: Endpoint) -> dict[str, Any]:
        self.asked.append(endpoint.url)
        name = [*self.replicas][len(self.asked) % len(self.replicas)]
        digest, refusal = self.replicas[name]
        return {"replica": name, "digest": digest, "refusal": refusal}


@pytest.fixture
def promoted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Promotes on such a cluster; what the model is loaded with is kept."""
    loaded: list[Settings] = []

    def load(spec: ModelSpec, settings: Settings) -> Any:
        loaded.append(settings)
        return SimpleNamespace(digest=NEW if spec.checkpoint == "/models/new" else OLD, spec=spec)

    def promote(serve: Serve, **more: Any) -> str:
        monkeypatch.setattr(local, "ServeSubmissionClient", lambda _: serve)
        monkeypatch.setattr(Endpoint, "model", lambda endpoint: serve.model(endpoint))
        return local.promote(ModelSpec(checkpoint="/models/new"), "http://127.0.0.1:8265", **more)

    monkeypatch.setattr(local, "load", load)
    monkeypatch.setattr(local, "check_successor", lambda *_: "alike")
    monkeypatch.setattr(local, "POLL_S", 0.01)
    monkeypatch.setattr(local, "TOLD_S", 0.2)
    promote.loaded = loaded  # type: ignore[attr-defined]
    return promote


def test_a_promotion_is_over_once_each_replica_has_told_so(promoted: Any) -> None:
    serve = Serve({"one": (NEW, None), "two": (NEW, None)})
    assert promoted(serve) == "alike"
    assert len(serve.deployed) == 1 and len(serve.asked) >= 2 and {*serve.asked} == {"http://127.0.0.1:8000"}
    assert promoted.loaded and not any(settings.use_gpu for settings in promoted.loaded)  # this machine may have no GPU


def test_a_replica_that_refuses_or_does_not_tell_fails_the_promotion(promoted: Any) -> None:
    with pytest.raises(InputError, match=r"replica two refuses the model.*no such bucket"):
        promoted(Serve({"one": (NEW, None), "two": (OLD, "no such bucket")}))
    with pytest.raises(InputError, match="only 1 of 2 replicas"):
        promoted(Serve({"one": (NEW, None), "two": (OLD, None)}))


def test_replicas_are_asked_on_every_node_or_where_the_operator_says(promoted: Any) -> None:
    serve = Serve({"one": (NEW, None), "two": (NEW, None), "three": (NEW, None)}, host="0.0.0.0")
    promoted(serve)
    assert {*serve.asked} == {"http://10.0.0.1:8000", "http://10.0.0.2:8000"}
    serve = Serve({"one": (NEW, None)}, host="0.0.0.0")
    promoted(serve, url="https://masks.example")
    assert {*serve.asked} == {"https://masks.example"}


def test_an_endpoint_that_can_not_be_asked_is_not_said_to_answer(promoted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(error: Exception) -> Any:
        serve = Serve({"one": (NEW, None)})

        def model(_: Endpoint) -> Any:
            raise error

        monkeypatch.setattr(serve, "model", model)
        return serve

    with pytest.raises(InputError, match="--url"):
        promoted(raises(RaysalError("no answer after 1 tries")))
    with pytest.raises(InputError, match="--tokens"):
        promoted(raises(Refused(401, "token", "this endpoint needs a token")))


def test_the_application_is_gone_before_serve_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's shutdown cuts connections; what was accepted is answered before."""
    done, left = list[str](), [local.APPLICATION, local.APPLICATION]

    def delete(name: str) -> None:
        done.append(f"delete {name}")
        raise TimeoutError("not deleted after 60 s")

    def status() -> Any:
        return SimpleNamespace(applications={left.pop(): None} if left else {})

    monkeypatch.setattr(
        local, "serve", SimpleNamespace(delete=delete, status=status, shutdown=lambda: done.append(f"shutdown, {len(left)} left"))
    )
    monkeypatch.setattr(local, "ray", SimpleNamespace(shutdown=lambda: done.append("ray")))
    monkeypatch.setattr(local, "POLL_S", 0.0)
    local.stop()
    assert done == [f"delete {local.APPLICATION}", "shutdown, 0 left", "ray"]


def test_a_promotion_takes_the_endpoints_token(raysal: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, trained: Any) -> None:
    given: list[Any] = []
    monkeypatch.setattr(local, "promote", lambda *_, url, token: given.append((url, token)) or "alike")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (tmp_path / "tokens").write_text("a-token-of-some-length\n")
    assert raysal("serve", "promote", trained, "--url", "https://a.example", "--tokens", tmp_path / "tokens")[0] == 0
    assert given == [("https://a.example", "a-token-of-some-length")]
