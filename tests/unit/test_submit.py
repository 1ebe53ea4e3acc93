"""`raysal submit`: one id for one piece of work, nothing secret and nothing of this machine in a job, refusals before anything is sent."""

from __future__ import annotations

import json
import shlex
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import ray
import typer
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus

from raysal.cli import app
from raysal.config import JOB_CPUS
from raysal.errors import InputError, RaysalError
from raysal.jobs import cluster
from raysal.jobs.submission import VERBS, Submission, check_address, in_clear, submission
from tests.helpers import Call

ADDRESS = "http://127.0.0.1:9"
LABEL = ("s3://m/model", "s3://m/manifest", "--out", "s3://m/labels")
ROOT = Path(__file__).resolve().parents[2]


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


# --- ids --------------------------------------------------------------------------------------------------------------


def test_the_same_work_has_one_id_however_it_is_written(tmp_path: Path) -> None:
    first = made("label", *LABEL)
    assert first.id.startswith("raysal-label-") and len(first.id) == len("raysal-label-") + 12
    assert made("label", "--out=s3://m/labels", "s3://m/model", "s3://m/manifest").id == first.id
    assert made("label", *LABEL, "--json").id == first.id
    assert made("label", *LABEL, "--config", config(tmp_path, "{}")).id == first.id
    one, other = config(tmp_path / "a", "train: {steps: 7}"), config(tmp_path / "b", "# seven\ntrain:\n  steps: 7\n", "other.yaml")
    ids = {made("label", *LABEL, *how).id for how in (("--config", one), ("--config", other), ("--set", "train.steps=7"))}
    assert len(ids) == 1 and ids != {first.id}


@pytest.mark.parametrize("change", ["compute.score_actors=3", "compute.use_gpu=true"])
def test_where_it_runs_does_not_make_it_another_work(change: str) -> None:
    """A job that failed for want of memory is the same work with fewer actors."""
    assert made("label", *LABEL, "--set", change).id == made("label", *LABEL).id
    assert made("label", *LABEL, cpus=4.0, memory=10**9).id == made("label", *LABEL).id


@pytest.mark.parametrize(
    "arguments",
    [
        ("s3://m/model2", *LABEL[1:]),
        (*LABEL[:3], "s3://m/labels2"),
        (*LABEL, "--precision", "0.9"),
        (*LABEL, "--replace"),
        (*LABEL, "--set", "seed=1"),
        (*LABEL, "--set", "run=s3://m/run"),
    ],
)
def test_other_work_has_another_id(arguments: tuple[str, ...]) -> None:
    assert made("label", *arguments).id != made("label", *LABEL).id
    assert made("score", *LABEL).id != made("label", *LABEL).id


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_the_command_line_is_quoted_for_the_clusters_shell(tmp_path: Path) -> None:
    file = config(tmp_path, "seed: 3", "my run.yaml")
    arguments = ("s3://m/a b; rm -rf $HOME", "s3://m/`x`", "--out", "s3://m/'q'", "--config", file, "--set", "name=$(id)")
    words = shlex.split(made("label", *arguments).entrypoint)
    assert words == ["python", "-m", "raysal", "label", *arguments[:5], "my run.yaml", *arguments[6:]]
    assert "--config='my run.yaml'" in made("label", *arguments[:4], f"--config={file}").entrypoint.replace("'--config=my", "--config='my")


def test_nothing_of_this_machine_travels_but_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAYSAL_TOKENS", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "a-secret-of-this-machine")
    (tmp_path / "beside.txt").write_text("a-secret-of-this-machine")
    job = made("label", *LABEL, "--config", config(tmp_path, "seed: 3"))
    with job.runtime_env() as sent:
        folder = Path(sent["working_dir"])
        assert {f.name: f.read_text() for f in folder.iterdir()} == {"c.yaml": "seed: 3"}
        assert set(sent) == {"env_vars", "working_dir"} and sent["env_vars"] == {JOB_CPUS: "1"}
    assert not folder.exists()
    assert "secret" not in json.dumps([sent, job.metadata, job.entrypoint])
    with made("label", *LABEL).runtime_env() as sent:
        assert set(sent) == {"env_vars"}


def wheel(file: Path, name: str = "raysal/__init__.py") -> Path:
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr(name, "__version__ = '9'")
        packed.writestr("raysal-9.dist-info/METADATA", "Requires-Dist: torch")
        packed.writestr("../outside.py", "")
    return file


def test_a_wheel_goes_along_without_what_it_depends_on(tmp_path: Path) -> None:
    job = made("label", *LABEL, wheel=wheel(tmp_path / "raysal-9-py3-none-any.whl"))
    assert job.id == made("label", *LABEL).id
    with job.runtime_env() as sent:
        [package] = sent["py_modules"]
        assert Path(package).name == "raysal" and [f.name for f in Path(package).iterdir()] == ["__init__.py"]
        assert [f.name for f in Path(package).parent.iterdir()] == ["raysal"]


def test_what_is_no_wheel_of_raysal_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.whl").write_text("no zip")
    for file, said in [
        (tmp_path / "none.whl", "no wheel"),
        (tmp_path / "text.whl", "can't be read"),
        (wheel(tmp_path / "other.whl", "other/__init__.py"), "holds no raysal"),
    ]:
        with pytest.raises(InputError, match=said):
            made("label", *LABEL, wheel=file)
    monkeypatch.setattr("raysal.jobs.submission.LARGEST_WHEEL", 10)
    with pytest.raises(InputError, match="put it into the nodes' image"):
        made("label", *LABEL, wheel=wheel(tmp_path / "large.whl"))


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_an_entry_point_for_ray_job_submit(verb: str) -> None:
    lines = (ROOT / "jobs" / f"{verb}.py").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == f'main("{verb}")' and len(lines) < 12
    command = " ".join(line.rstrip("\\") for line in lines[2:4])
    made(verb, *shlex.split(command.partition(f"jobs/{verb}.py")[2]))  # the example in it is one that is taken
    assert {file.stem for file in (ROOT / "jobs").glob("*.py")} == set(VERBS)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument",
    [
        "s3://AKIDEXAMPLE:wJalrXUt@m/model",
        "https://m/model?X-Amz-Signature=abc",
        "https://m/model?sv=1&sig=abc",
        "s3://m/AKIAIOSFODNN7EXAMPLE",
    ],
)
def test_a_credential_among_the_arguments_is_refused_and_not_repeated(argument: str) -> None:
    with pytest.raises(InputError, match="looks like a credential") as refused:
        made("label", argument, *LABEL[1:])
    assert argument not in str(refused.value)
    with pytest.raises(InputError, match="looks like a credential"):
        made("label", *LABEL, "--set", f"data.root={argument}")


def test_a_credential_in_the_config_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="looks like a credential"):
        made("label", *LABEL, "--config", config(tmp_path, "# aws_secret_access_key: wJalrXUtnFEMI\nseed: 1"))


@pytest.mark.parametrize("place", ["abfs://container@account.dfs.core.windows.net/a", "s3://m/a?versionId=3", "s3://m/a@b:c/d"])
def test_places_that_only_look_odd_pass(place: str) -> None:
    made("label", place, *LABEL[1:])


@pytest.mark.parametrize(
    ("verb", "arguments", "place"),
    [
        ("label", ("model", *LABEL[1:]), "model"),
        ("label", (*LABEL[:3], "runs/labels"), "runs/labels"),
        ("index", ("~/archive", "--out", "s3://m/manifest"), "~/archive"),
        ("evaluate", ("s3://m/model", "data"), "data"),
        ("query", ("s3://m/scores", "--budget", "3", "--out", "queue.parquet"), "queue.parquet"),
        ("train", ("--config", "CONFIG"), "runs/raysal"),
        ("loop", ("--config", "CONFIG", "--set", "run=/m/run", "--set", "data.reader=folder", "--set", "data.root=mars"), "mars"),
        ("train", ("--config", "CONFIG", "--set", "run=/m/run", "--labels", "names.txt"), "names.txt"),
    ],
)
def test_a_relative_place_is_refused_as_a_job_has_another_folder(tmp_path: Path, verb: str, arguments: tuple[str, ...], place: str) -> None:
    file = config(tmp_path, "seed: 1")
    with pytest.raises(InputError, match=f"^{place}: a relative path") as refused:
        made(verb, *(file if a == "CONFIG" else a for a in arguments))
    assert refused.value.exit_code == 2


def test_places_that_are_on_this_machine_are_kept_for_when_the_cluster_misses_them(tmp_path: Path) -> None:
    assert made("label", str(tmp_path), "/no/such/manifest", *LABEL[2:]).here == (str(tmp_path),)


def test_another_cluster_in_the_config_is_refused() -> None:
    with pytest.raises(InputError, match=r"compute\.address"):
        made("label", *LABEL, "--set", "compute.address=10.0.0.1:6379")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:8265", "expected the dashboard's"),
        ("ray://head:10001", "expected the dashboard's"),
        ("http://", "expected the dashboard's"),
        ("http://me:hunter2@head:8265", "leave them out"),
        ("https://token@head", "leave them out"),
    ],
)
def test_an_address_that_is_none_or_holds_a_password_is_refused(address: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        check_address(address)
    assert "hunter2" not in str(refused.value)


def test_a_token_in_clear_is_noticed() -> None:
    assert [in_clear(a) for a in ("http://head:8265", "http://10.0.0.1:1", "https://head", "http://127.0.0.1:1", "http://localhost:1")] == [
        True, True, False, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("label", *LABEL, "--nonsense"), "No such option"),
        (("label", LABEL[0]), "Missing"),
        (("label", *LABEL, "--cpus", "0"), "--cpus"),
        (("label", *LABEL, "--memory", "much"), "no size"),
        (("label", *LABEL, "--set", "train.stepz=3"), "did you mean 'train.steps'"),
        (("label", *LABEL, "--address", "http://me:pw@head"), "leave them out"),
        (("status", "raysal-label-0", "--address", ADDRESS), "no answer"),
        (("label", *LABEL, "--address", ADDRESS), "no answer"),
    ],
)
def test_bad_usage_and_an_unreachable_cluster_are_one_line(raysal: Call, arguments: tuple[str, ...], said: str) -> None:
    code, out, err = raysal("submit", *arguments)
    assert code == 2 and said in err and out == "" and "Traceback" not in err


def test_a_token_file_that_is_not_there_is_one_line_too(raysal: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray would end the process."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    code, _, err = raysal("submit", "list", "--address", ADDRESS)
    assert code == 2 and "RAY_AUTH_TOKEN_PATH" in err


# --- a cluster that is made up ----------------------------------------------------------------------------------------


class FakeClient:
    """Ray's client, without a cluster: jobs are what is put in."""

    def __init__(self, version: str = ray.__version__) -> None:
        self._server_ray_version = version
        self.held: dict[str, SimpleNamespace] = {}
        self.sent: list[dict] = []
        self.error: Exception | None = None

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
    monkeypatch.setattr(cluster, "JobSubmissionClient", lambda address: fake)
    monkeypatch.setattr(cluster, "_wants_token", lambda address: True)
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


def test_another_version_of_ray_is_refused_with_both_numbers(client: FakeClient) -> None:
    client._server_ray_version = "2.41.0"
    with pytest.raises(InputError, match=rf"Ray 2\.41\.0, this machine Ray {ray.__version__}"):
        cluster.Jobs(ADDRESS)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda: httpx.Response(404), "no dashboard of Ray"),
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


def test_a_cluster_without_tokens_and_a_token_in_clear_are_warned_of(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    cluster.Jobs("http://head:8265", said.append)
    monkeypatch.setattr(cluster, "_wants_token", lambda address: False)
    cluster.Jobs(ADDRESS, said.append)
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


def test_a_log_is_written_once_whatever_breaks_on_the_way(client: FakeClient) -> None:
    client.put("raysal-a", "RUNNING")
    broken = RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
    tailed(client, ["one\n", "two\n", broken], ["on"], ["one\ntwo\nthr", broken], ["one\n", "two\nthree\nfour\n"])
    written: list[str] = []
    job = cluster.Jobs(ADDRESS).follow("raysal-a", written.append, lambda _: None)
    assert "".join(written) == "one\ntwo\nthree\nfour\n" and cluster.exit_code(job) == 0


def test_a_silent_connection_is_given_up(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

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
    client.put(job.id, "RUNNING")

    async def tail(id_: str) -> AsyncIterator[str]:
        yield "one\n"
        raise KeyboardInterrupt

    client.tail_job_logs = tail  # type: ignore[attr-defined]
    code, _, err = raysal("submit", "label", *LABEL, "--address", ADDRESS)
    assert code == 130 and "attached" in err and client.held[job.id].status == JobStatus.RUNNING
    assert f"raysal submit logs {job.id} --address {ADDRESS} --follow" in err and f"submit stop {job.id}" in err
