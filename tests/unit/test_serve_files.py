"""Config files of the endpoint: what Serve and the application take."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from raysal.client import Endpoint
from raysal.errors import InputError
from raysal.serving.deployment import NAME, build
from raysal.serving.local import APPLICATION, IMPORT_PATH, check_exposure, config
from raysal.serving.settings import Limits, Settings
from tests.helpers import Call

ROOT = Path(__file__).resolve().parents[2]


def contents() -> list[tuple[str, dict]]:
    found = [(f.name, yaml.safe_load(f.read_text(encoding="utf-8"))) for f in sorted((ROOT / "serve").glob("*.yaml"))]
    service = yaml.safe_load((ROOT / "deploy/rayservice.yaml").read_text(encoding="utf-8"))
    return [*found, ("rayservice.yaml", yaml.safe_load(service["spec"]["serveConfigV2"]))]


@pytest.mark.parametrize(("name", "content"), contents(), ids=[name for name, _ in contents()])
def test_serve_and_the_application_take_each_file(name: str, content: dict) -> None:
    schema = ServeDeploySchema.model_validate(content)
    [application] = schema.applications
    assert application.import_path == IMPORT_PATH
    settings = Settings.model_validate(application.args)
    [deployment] = application.deployments
    assert deployment.name == NAME
    host = (content.get("http_options") or {}).get("host", "127.0.0.1")
    assert settings.tokens_file or host == "127.0.0.1"  # nothing listens to a network without tokens
    if schema.proxy_location == "EveryNode":
        assert deployment.max_ongoing_requests == settings.limits.in_flight  # more, and a node turns away what another could answer
        assert settings.digest is not None  # replicas that start later load the same files


def test_serve_turns_away_as_a_replica_does() -> None:
    app = build(Settings(checkpoint="/models/a", limits=Limits(in_flight=8, retry_after_s=7)))
    deployment = app._bound_deployment
    assert (deployment.backpressure_config.status_code, deployment.backpressure_config.retry_after_s) == (429, 7)


def test_what_raysal_serve_deploys_is_such_a_file() -> None:
    made = ServeDeploySchema.model_validate(config(Settings(checkpoint="/models/a"), "127.0.0.1", 8000, 2))
    assert [a.name for a in made.applications] == [APPLICATION]


def test_no_endpoint_listens_to_the_network_without_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYSAL_TOKENS", raising=False)
    check_exposure(Settings(checkpoint="a"), "127.0.0.1")
    with pytest.raises(InputError, match="openssl"):
        check_exposure(Settings(checkpoint="a"), "0.0.0.0")
    (tmp_path / "tokens").write_text("a-token-of-some-length\n")
    check_exposure(Settings(checkpoint="a", tokens_file=str(tmp_path / "tokens")), "0.0.0.0")
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    check_exposure(Settings(checkpoint="a", tokens_file=str(tmp_path / "tokens")), "127.0.0.1")
    with pytest.raises(InputError, match="behind HAProxy every client needs a token"):
        check_exposure(Settings(checkpoint="a"), "127.0.0.1")


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--precision", "2"), "--precision"), (("--root", "/"), "whole of a store"), (("--host", "0.0.0.0"), "openssl")],
)
def test_bad_options_are_refused_in_one_line_before_ray_starts(
    trained: Path, raysal: Call, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], said: str
) -> None:
    monkeypatch.delenv("RAYSAL_TOKENS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    code, _, err = raysal("serve", trained, *options)
    assert code == 2 and said in err and "Traceback" not in err
    assert raysal("serve", "promote", trained, "--precision", "0")[0] == 2
    assert raysal("serve", trained / "none")[0] == 2


def test_the_token_of_a_folders_requests_is_the_first_of_the_file(tmp_path: Path, raysal: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str | None] = []
    monkeypatch.setattr(Endpoint, "save_masks", lambda self, *_: given.append(self.token) or {})
    (tmp_path / "tokens").write_text("# of this month\n\n  a-token-of-some-length \nthe-one-before-that\n")
    assert raysal("serve", "ask", tmp_path, "--out", tmp_path / "masks", "--tokens", tmp_path / "tokens")[0] == 0
    monkeypatch.setenv("RAYSAL_TOKENS", "one-of-the-environment,another")
    assert raysal("serve", "ask", tmp_path, "--out", tmp_path / "masks")[0] == 0
    monkeypatch.delenv("RAYSAL_TOKENS")
    assert raysal("serve", "ask", tmp_path, "--out", tmp_path / "masks")[0] == 0
    assert given == ["a-token-of-some-length", "one-of-the-environment", None]
    code, _, said = raysal("serve", "ask", tmp_path, "--out", tmp_path / "masks", "--tokens", tmp_path / "none")
    assert code == 2 and "give a text file with one token a line" in said
