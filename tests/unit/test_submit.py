"""`raysal submit` and a cluster that is made up: sent once, followed through broken connections; each answer is one line with the fix."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import ray
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus

from raysal.errors import InputError, RaysalError, ResourceError
from raysal.jobs import cluster
from tests.helpers import Call
from tests.unit.submitted import ADDRESS, LABEL, config, made, no_token  # noqa: F401 - a fixture for every test

VERSION_OF_RAY = {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""}
NO_NODES = {"result": True, "msg": "", "data": {"result": {"result": [], "total": 0, "num_after_truncation": 0, "num_filtered": 0}}}


class FakeClient:
    """Ray's client, without a cluster: jobs are what is put in."""

    def __init__(self, version: str = ray.__version__) -> None:
        self._server_ray_version = version
        self.held: dict[str, SimpleNamespace] = {}
        self.sent: list[dict] = []
        self.error: Exception | None = None
        self.nodes: list[dict[str, float]] = [{"memory": 4e9}, {"CPU": 8.0, "memory": 16e9}]

    def put(self, id_: str, status: str, **more: Any) -> None:
        usual = {"driver_exit_code": None, "error_type": None, "message": None, "metadata": None, "entrypoint": "x", "start_time": 0}
        self.held[id_] = SimpleNamespace(submission_id=id_, status=JobStatus(status), end_time=None, **(usual | more))

    def list_jobs(self) -> list[SimpleNamespace]:
        return list(self.held.values())

    def get_job_info(self, id_: str) -> SimpleNamespace:
        if id_ not in self.held:
            raise RuntimeError(f"Request failed with status code 404: Job {id_} does not exist.")
        return self.held[id_]

    def submit_job(self, **values: Any) -> str:
        if self.error:
            raise self.error
        self.sent.append(values)
        self.put(values["submission_id"], "PENDING")
        return values["submission_id"]


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    fake = FakeClient()
    monkeypatch.setattr(cluster, "_Client", lambda address, headers: fake)
    monkeypatch.setattr(cluster, "_wants_token", lambda address: True)
    monkeypatch.setattr(cluster, "_nodes", lambda address, headers: fake.nodes)
    monkeypatch.setattr(cluster, "POLL_S", 0.0)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ADDRESS)
    return fake


def test_the_same_submission_attaches_is_a_no_op_or_gets_the_next_suffix(client: FakeClient) -> None:
    jobs, job = cluster.Jobs(ADDRESS), made("label", *LABEL, cpus=2.0)
    assert jobs.submit(job) == (job.id, None)
    assert client.sent[0]["entrypoint_num_cpus"] == 2.0 and client.sent[0]["entrypoint"] == job.entrypoint
    for status in ("PENDING", "RUNNING"):
        client.put(job.id, status)
        assert jobs.submit(job) == (job.id, client.held[job.id])
    client.put(job.id, "FAILED")
    assert jobs.submit(job) == (f"{job.id}-r2", None)
    assert jobs.submit(job)[0] == f"{job.id}-r2" and len(client.sent) == 2
    for n in range(2, 11):
        client.put(f"{job.id}-r{n}", "STOPPED")
    client.put(f"{job.id}-rest", "RUNNING")  # somebody else's
    assert jobs.submit(job) == (f"{job.id}-r11", None)
    client.put(f"{job.id}-r11", "SUCCEEDED")
    assert jobs.submit(job) == (f"{job.id}-r11", client.held[f"{job.id}-r11"]) and len(client.sent) == 3
    assert jobs.submit(job, again=True) == (f"{job.id}-r12", None)


def test_who_submits_at_the_same_moment_attaches(client: FakeClient) -> None:
    jobs, job = cluster.Jobs(ADDRESS), made("label", *LABEL)
    client.error = RuntimeError(f"status code 500: ValueError: Job with submission_id {job.id} already exists.")
    seen = client.list_jobs()
    client.put(job.id, "RUNNING")
    client.list_jobs = lambda: seen  # type: ignore[method-assign]
    assert jobs.submit(job) == (job.id, client.held[job.id])


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (AuthenticationError("Authentication required: Unauthorized"), InputError, "asks for a token and none was sent"),
        (AuthenticationError("Authentication failed: Forbidden"), InputError, "refuses the token"),
        (RuntimeError("Request failed with status code 413: Request Entity Too Large."), InputError, "too large"),
        (ConnectionError("Failed to connect to Ray"), RaysalError, "answers no more"),
        (RuntimeError("Request failed with status code 500: \n trouble \n within"), RaysalError, "refuses: .*trouble within"),
    ],
)
def test_what_the_cluster_says_is_one_line_with_the_fix(client: FakeClient, error: Exception, kind: type[RaysalError], said: str) -> None:
    client.error = error
    with pytest.raises(RaysalError, match=said) as refused:
        cluster.Jobs(ADDRESS).submit(made("label", *LABEL))
    assert type(refused.value) is kind and "\n" not in str(refused.value)


def test_a_process_that_fits_on_no_node_is_refused_with_the_numbers_unless_nodes_may_come(client: FakeClient) -> None:
    said: list[str] = []
    jobs = cluster.Jobs(ADDRESS, said.append)
    with pytest.raises(ResourceError, match=r"books 16 CPU, but no node has that: of 2 up the largest have 8 CPU; lower --cpus, or"):
        jobs.submit(made("label", *LABEL, cpus=16.0))
    with pytest.raises(ResourceError, match=r"1 CPU, 20\.0 GB of memory, but .* have 8 CPU, 16\.0 GB of memory; lower --memory, or"):
        jobs.submit(made("label", *LABEL, memory=20 * 10**9))
    with pytest.raises(ResourceError, match=r"1 CPU, 1 GPU, but .* have 8 CPU, 0 GPU; set compute\.use_gpu=false, or"):
        jobs.submit(made("evaluate", "s3://m/model", "s3://m/data", "--config", "configs/demo.yaml", "--set", "compute.use_gpu=true"))
    assert client.sent == [] and said == []
    jobs.submit(made("label", *LABEL, "--set", "compute.grow_s=60", cpus=16.0))
    jobs.submit(made("index", "s3://m/raw", "--out", "s3://m/large", cpus=16.0))  # has no configuration that could say so
    client.nodes = [{"memory": 4e9}]  # a head alone, whose workers come with the work
    jobs.submit(made("index", "s3://m/raw", "--out", "s3://m/manifest"))
    assert len(client.sent) == 3 and len(said) == 3 and all("waits until an autoscaler brings such a node" in text for text in said)


def test_another_version_of_ray_is_refused_with_both_numbers(client: FakeClient) -> None:
    client._server_ray_version = "2.41.0"
    with pytest.raises(InputError, match=rf"Ray 2\.41\.0, this machine Ray {ray.__version__}"):
        cluster.Jobs(ADDRESS)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda: httpx.Response(404), "no dashboard of Ray"),
        (lambda: httpx.Response(401), "a login of its own .HTTP 401.; give the dashboard's own address, or reach it through an SSH tunnel"),
        (lambda: httpx.Response(302, headers={"location": "https://sso.example.org/in?x=1"}), "302, to https://sso.example.org.; give"),
        (lambda: httpx.Response(503), "HTTP 503, the dashboard is not up yet"),
        (lambda: httpx.Response(200, text="hello"), "no dashboard of Ray"),
        (lambda: (_ for _ in ()).throw(httpx.ConnectTimeout("timed out")), "no answer"),
    ],
)
def test_who_is_no_dashboard_is_told_so(monkeypatch: pytest.MonkeyPatch, answer: Callable[[], httpx.Response], said: str) -> None:
    def get(url: str, timeout: float) -> httpx.Response:
        made = answer()
        made.request = httpx.Request("GET", url)
        return made

    monkeypatch.setattr(cluster.httpx, "get", get)
    with pytest.raises(InputError, match=said):
        cluster.Jobs(ADDRESS)


def test_a_cluster_without_tokens_is_refused_and_a_token_in_clear_warned_of(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    cluster.Jobs("http://head:8265", said.append)
    monkeypatch.setattr(cluster, "_wants_token", lambda address: False)
    with pytest.raises(InputError, match=r"asks for no token.*RAY_AUTH_MODE=token.*--insecure"):
        cluster.Jobs(ADDRESS, said.append)
    cluster.Jobs(ADDRESS, said.append, insecure=True)
    assert "in clear" in said[0] and "asks for no token" in said[1] and len(said) == 2


def tailed(client: FakeClient, *reads: list[str | Exception], ends: str = "SUCCEEDED") -> None:
    """Lets a log be read in several goes, each from its beginning; after the last the job has ended."""
    left = list(reads)

    async def tail(id_: str) -> AsyncIterator[str]:
        pieces = left.pop(0)
        if not left:
            client.put(id_, ends, driver_exit_code=0 if ends == "SUCCEEDED" else 2)
            left.append(pieces)
        for piece in pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    client.tail_job_logs = tail  # type: ignore[attr-defined]


def test_no_token_goes_to_who_asks_for_none(tmp_path: Path) -> None:
    """Ray's clients send it to whatever address they are given. In a process of its own: Ray reads the mode when it is imported."""
    heard: list[tuple[str, str | None]] = []

    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.hear()
            said = {"/api/authentication_mode": {"authentication_mode": "disabled"}, "/api/jobs/": [], "/api/version": VERSION_OF_RAY}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(said.get(self.path.partition("?")[0], NO_NODES)).encode())

        def do_POST(self) -> None:
            self.hear()
            self.send_error(413)

        def hear(self) -> None:
            heard.append((f"{self.command} {self.path.partition('?')[0]}", self.headers.get("Authorization")))

    with ThreadingHTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (tmp_path / "token").write_text("a-secret-token-of-the-mission-" * 2)
        env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
        address = f"http://127.0.0.1:{server.server_port}"
        for arguments in (("list",), ("label", *LABEL, "--insecure")):
            command = [sys.executable, "-m", "raysal", "submit", *arguments, "--address", address]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
            assert "asks for no token" in done.stderr and "Traceback" not in done.stderr, done.stderr
        server.shutdown()
    assert {what for what, _ in heard} >= {"GET /api/jobs/", "POST /api/jobs/", "GET /api/version", "GET /api/v0/nodes"}
    assert {sent for _, sent in heard} <= {None, ""}


def test_a_log_is_written_once_whatever_breaks_on_the_way(client: FakeClient) -> None:
    client.put("raysal-a", "RUNNING")
    broken = RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
    tailed(client, ["one\n", "two\n", broken], ["on"], ["one\ntwo\nthr", broken], ["one\n", "two\nthree\nfour\n"])
    written: list[str] = []
    job = cluster.Jobs(ADDRESS).follow("raysal-a", written.append, lambda _: None)
    assert "".join(written) == "one\ntwo\nthree\nfour\n" and cluster.exit_code(job) == 0


def test_a_silent_connection_is_given_up(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "QUIET_S", 0.05)
    client.put("raysal-a", "RUNNING")
    tries: list[int] = []

    async def tail(id_: str) -> AsyncIterator[str]:
        tries.append(1)
        yield "one\n"
        if len(tries) == 1:
            await asyncio.sleep(60)
        client.put(id_, "SUCCEEDED")

    client.tail_job_logs = tail  # type: ignore[attr-defined]
    written: list[str] = []
    cluster.Jobs(ADDRESS).follow("raysal-a", written.append, lambda _: None)
    assert written == ["one\n"] and len(tries) >= 2


def test_a_cluster_that_stays_away_is_given_up_and_one_that_forgot_is_told_of(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "PATIENCE_S", 0.0)
    jobs = cluster.Jobs(ADDRESS)
    client.put("raysal-a", "PENDING")
    said: list[str] = []
    held, answers = client.held, [client.held["raysal-a"]]

    def gone(id_: str) -> SimpleNamespace:
        if answers:
            return answers.pop()
        raise ConnectionError("refused")

    client.get_job_info = gone  # type: ignore[method-assign]
    with pytest.raises(RaysalError, match="the same command attaches"):
        jobs.follow("raysal-a", said.append, said.append)
    assert said == ["raysal-a waits for a node that has room for it"]
    answers.append(held["raysal-a"])

    def forgotten(id_: str) -> SimpleNamespace:
        if answers:
            return answers.pop()
        raise RuntimeError(f"Request failed with status code 404: Job {id_} does not exist.")

    client.get_job_info = forgotten  # type: ignore[method-assign]
    with pytest.raises(RaysalError, match="was its head restarted"):
        jobs.follow("raysal-a", said.append, said.append)


@pytest.mark.parametrize(("status", "code", "exits"), [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", -9, 1), ("STOPPED", None, 1)])
def test_the_exit_code_is_the_jobs(client: FakeClient, status: str, code: int | None, exits: int) -> None:
    client.put("raysal-a", status, driver_exit_code=code)
    assert cluster.exit_code(client.held["raysal-a"]) == exits


def test_a_job_is_sent_to_the_nodes_that_it_is_to_be_on(client: FakeClient) -> None:
    jobs, job = cluster.Jobs(ADDRESS), made("label", *LABEL, on="job")
    assert job.id == made("label", *LABEL).id
    with pytest.raises(ResourceError, match=r"books 1 CPU, 0.001 job, but no node has that.*have 8 CPU, 0 job; leave out --on, or"):
        jobs.submit(job)
    client.nodes.append({"CPU": 2.0, "job": 2.0})
    jobs.submit(job)
    assert [sent["entrypoint_resources"] for sent in client.sent] == [{"job": cluster.MARK}]
    jobs.submit(made("label", *LABEL, "--precision", "0.9"))
    assert client.sent[-1]["entrypoint_resources"] is None


def test_a_log_that_went_with_its_node_is_told_by_what_the_cluster_kept(client: FakeClient, raysal: Call) -> None:
    def gone(id_: str) -> str:
        raise RuntimeError("Request failed with status code 500: Traceback ... ClientConnectorError.")

    async def nothing(id_: str) -> AsyncIterator[str]:
        return
        yield

    kept = "Job entrypoint command failed with exit code 2, last available logs (truncated to 20,000 chars):\n12/90\nraysal: disk is full\n"
    client.get_job_logs, client.tail_job_logs = gone, nothing  # type: ignore[attr-defined]
    client.put("raysal-a", "FAILED", driver_exit_code=2, error_type="JOB_ENTRYPOINT_COMMAND_ERROR", message=kept)
    for more, code in (((), 0), (("--follow",), 2)):
        answer, out, err = raysal("submit", "logs", "raysal-a", *more, "--address", ADDRESS)
        assert answer == code and "12/90\nraysal: disk is full" in out and "its node may be gone" in err
    assert "FAILED" in (out := raysal("submit", "list", "--address", ADDRESS)[1]) and out.rstrip().endswith("  raysal: disk is full")
    client.put("raysal-a", "RUNNING")
    with pytest.raises(RaysalError, match="the cluster refuses"):
        cluster.Jobs(ADDRESS).log("raysal-a")


def test_a_job_that_waits_for_a_node_is_told_to_stop_without_waiting(
    client: FakeClient, raysal: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "PENDING_S", 0.0)
    client.put("raysal-a", "PENDING")
    told: list[str] = []
    client.stop_job = told.append  # type: ignore[attr-defined]
    code, out, _ = raysal("submit", "stop", "raysal-a", "--address", ADDRESS)
    assert code == 0 and told == ["raysal-a"] and "waits for a node itself" in out


def test_the_command_says_what_became_of_a_submission(client: FakeClient, raysal: Call, tmp_path: Path) -> None:
    job = made("label", str(tmp_path), *LABEL[1:])
    client.put(job.id, "SUCCEEDED")
    code, out, _ = raysal("submit", "label", str(tmp_path), *LABEL[1:], "--address", ADDRESS)
    assert code == 0 and "nothing to do" in out and "--again" in out and not client.sent
    client.held.clear()
    tailed(client, ["bad input\n"], ends="FAILED")
    original = client.submit_job
    client.submit_job = lambda **v: original(**v) and client.put(v["submission_id"], "RUNNING")  # type: ignore[method-assign]
    code, out, err = raysal("submit", "label", str(tmp_path), *LABEL[1:], "--address", ADDRESS)
    assert code == 2 and "bad input" in out and f"see them too? {tmp_path}" in err
    code, out, err = raysal("submit", "label", str(tmp_path), *LABEL[1:], "--address", ADDRESS, "--no-wait", "--json")
    assert code == 0 and json.loads(out)["id"] == f"{job.id}-r2"
    code, out, _ = raysal("submit", "list", "--address", ADDRESS, "--json")
    assert [j["id"] for j in json.loads(out)["jobs"]] == [job.id, f"{job.id}-r2"]


def test_ctrl_c_leaves_the_job_alone_and_says_how_to_go_on(client: FakeClient, raysal: Call) -> None:
    job = made("label", *LABEL)
    client.put(job.id, "PENDING")
    ask, asked = client.get_job_info, []

    def interrupted(id_: str) -> SimpleNamespace:  # between two questions; tests/e2e sends a real one while the log is read
        asked.append(id_)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return ask(id_)

    client.get_job_info = interrupted  # type: ignore[method-assign]
    code, _, err = raysal("submit", "label", *LABEL, "--address", ADDRESS)
    assert code == 130 and "attached" in err and client.held[job.id].status == JobStatus.PENDING
    assert f"raysal submit logs {job.id} --address {ADDRESS} --follow" in err and f"submit stop {job.id}" in err
