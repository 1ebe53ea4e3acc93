"""Verbs as jobs of a real cluster that asks for a token: sent over HTTP, followed, sent again, stopped; and nodes that see no storage."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raysal.config import ModelConfig
from raysal.datasets.synthetic import scene
from raysal.labels import S5MARS
from raysal.model.checkpoint import ModelInfo, save
from raysal.model.network import TwoBranch

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MODEL = ModelConfig(arch="Unet", encoder="tu-mobilenetv3_small_050")
REPOSITORY = Path(__file__).resolve().parents[2]
SIDE, IMAGES, START_S = 64, 3, 300
QUICK = ("--set", "runtime.kind=eager", "--set", "compute.score_actors=1")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def checkpoint(folder: Path) -> None:
    save(str(folder), TwoBranch(MODEL, S5MARS.n_classes, 0), ModelInfo(S5MARS, MODEL, 1.0, SIDE))


@dataclass
class Cluster:
    """A cluster whose nodes are processes on this machine."""

    root: Path
    temporary: str
    token: str = field(default_factory=lambda: secrets.token_hex(24))
    gcs: int = field(default_factory=free_port)
    dashboard: int = field(default_factory=free_port)
    nodes: list[subprocess.Popen] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard}"

    def environment(self, token: str | None) -> dict[str, str]:
        """Of a process that has a token, or none; raysal is this checkout's."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RAYSAL_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
        env = kept | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "HOME": str(self.root), "OMP_NUM_THREADS": "1"}
        if token is None:
            return env
        file = self.root / f"token-{token[:8]}"
        file.write_text(token)
        return env | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}

    def node(self, *options: str) -> None:
        """Starts one in a session of its own."""
        command = ["ray", "start", "--block", "--disable-usage-stats", "--object-store-memory=100000000", *options]
        command += [f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={free_port()}"]
        with open(self.root / f"node-{len(self.nodes)}.log", "w") as said:
            self.nodes.append(subprocess.Popen(command, stdout=said, stderr=said, env=self.environment(self.token), start_new_session=True))

    def up(self, nodes: int) -> bool:
        """Whether so many nodes are."""
        headers = {"Authorization": f"Bearer {self.token}"}
        try:
            answer = httpx.get(f"{self.address}/nodes?view=summary", headers=headers, timeout=10).json()
            return sum(n["raylet"].get("state") == "ALIVE" for n in answer["data"]["summary"]) == nodes
        except (httpx.HTTPError, ValueError, KeyError):
            return False

    def wait(self, nodes: int) -> None:
        deadline = time.monotonic() + START_S
        while not self.up(nodes):
            assert time.monotonic() < deadline, "".join(f.read_text()[-2000:] for f in self.root.glob("node-*.log"))
            time.sleep(0.5)

    def start(self, *arguments: object, token: str | None = "") -> subprocess.Popen:
        """Starts ``raysal submit ARGUMENTS --address ...``."""
        command = [sys.executable, "-m", "raysal", "submit", *map(str, arguments), "--address", self.address]
        env = self.environment(self.token if token == "" else token)
        # Whoever runs the tests in the background of a shell has them, and what they start, ignore Ctrl-C.
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, preexec_fn=heard)

    def submit(self, *arguments: object, token: str | None = "") -> subprocess.CompletedProcess:
        """Runs it to its end."""
        process = self.start(*arguments, token=token)
        out, err = process.communicate(timeout=START_S)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def jobs(self) -> dict[str, str]:
        """Status by id."""
        return {job["id"]: job["status"] for job in json.loads(self.submit("list", "--json").stdout)["jobs"]}

    def stop(self) -> None:
        family = [child for node in self.nodes for child in psutil.Process(node.pid).children(recursive=True)]
        for node in self.nodes:
            os.killpg(node.pid, signal.SIGTERM)
        _, alive = psutil.wait_procs([psutil.Process(node.pid) for node in self.nodes], timeout=20)
        for left in {*alive, *family}:
            try:
                left.kill()
            except psutil.NoSuchProcess:
                continue
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("submit")
    (root / "images").mkdir()
    for i in range(IMAGES):
        Image.fromarray(scene(0, i, SIDE)[0]).save(root / "images" / f"{i}.png")
    checkpoint(root / "model")
    made = Cluster(root, tempfile.mkdtemp(prefix="rs-", dir="/tmp"))  # short: sockets lie below it
    options = ['--resources={"job": 1}', f"--port={made.gcs}", f"--dashboard-port={made.dashboard}", f"--temp-dir={made.temporary}"]
    made.node("--head", "--num-cpus=3", "--dashboard-host=127.0.0.1", f"--ray-client-server-port={free_port()}", *options)
    try:
        made.wait(1)
        yield made
    finally:
        made.stop()


def test_a_job_is_sent_followed_by_json_lines_and_is_one_however_often_it_is_sent(cluster: Cluster) -> None:
    (cluster.root / "c.yaml").write_text("runtime: {kind: eager}\ncompute: {score_actors: 1, log_json: true}\n")
    model, images, labels = (cluster.root / name for name in ("model", "images", "labels"))
    label = ("label", model, images, "--out", labels, "--config", cluster.root / "c.yaml", "--on", "job")
    first = cluster.submit(*label)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr
    assert "submitted" in first.stderr and f"{IMAGES} ok" in first.stdout and "SUCCEEDED" in first.stdout
    rows = pq.read_table([str(f) for f in labels.glob("part-*.parquet")]).to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * IMAGES
    again = cluster.submit(*label)
    assert again.returncode == 0 and "nothing to do" in again.stdout
    [(id_, status)] = cluster.jobs().items()
    assert id_.startswith("raysal-label-") and status == "SUCCEEDED"
    assert f"{IMAGES} ok" in cluster.submit("logs", id_).stdout
    told = json.loads(cluster.submit("status", id_, "--json").stdout)
    assert told["verb"] == "label" and told["exit_code"] == 0
    lines = [json.loads(line) for line in first.stdout.splitlines() if line.startswith("{")]
    mine = [line for line in lines if line.get("run") == str(labels)]
    assert {line["submission_id"] for line in mine} == {id_} and {line["levelname"] for line in mine} == {"INFO"}, lines
    [progress] = [line for line in mine if line.get("done") == IMAGES]
    assert progress["total"] == progress["ok"] == IMAGES and int(progress["job_id"], 16) > 0
    everything = httpx.get(f"{cluster.address}/api/jobs/", headers={"Authorization": f"Bearer {cluster.token}"}, timeout=30).text
    assert id_ in everything and cluster.token not in everything


def test_without_the_token_nothing_is_told_or_done(cluster: Cluster) -> None:
    tries = (
        (None, "asks for a token and none was sent", ("label", "/a", "/b", "--out", "/c")),
        ("wrong" * 8, "refuses the token", ("list",)),
    )
    for token, said, arguments in tries:
        refused = cluster.submit(*arguments, token=token)
        assert refused.returncode == 2 and said in refused.stderr and "Traceback" not in refused.stderr, refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1 and refused.stdout == ""


def test_one_that_failed_gets_the_next_suffix_and_its_exit_code_is_the_jobs(cluster: Cluster) -> None:
    label = ("label", cluster.root / "later", cluster.root / "images", "--out", cluster.root / "later-labels", *QUICK)
    failed = cluster.submit(*label)
    assert failed.returncode == 2 and "later" in failed.stdout and "FAILED" in failed.stdout, failed.stderr
    assert "can the cluster's nodes see them too?" in failed.stderr  # the images are there
    [why] = [job["why"] for job in json.loads(cluster.submit("list", "--json").stdout)["jobs"] if job["status"] == "FAILED"]
    assert why.startswith("raysal: ") and "later" in why
    checkpoint(cluster.root / "later")
    good = cluster.submit(*label)
    assert good.returncode == 0 and "-r2" in good.stderr and f"{IMAGES} ok" in good.stdout, good.stdout[-3000:] + good.stderr


def test_a_second_command_attaches_ctrl_c_leaves_the_job_alone_and_a_stopped_job_ends_all(cluster: Cluster) -> None:
    watch = ("label", cluster.root / "model", cluster.root / "images", "--out", cluster.root / "labels", "--watch", "2", *QUICK)
    sent = cluster.submit(*watch, "--no-wait", "--json")
    assert sent.returncode == 0, sent.stderr
    id_ = json.loads(sent.stdout)["id"]
    left = cluster.start(*watch)
    assert left.stdout is not None and left.stderr is not None
    assert any(f"{IMAGES} ok" in line for line in left.stdout)  # what the job wrote; ends at the first such line
    left.send_signal(signal.SIGINT)
    _, said = left.communicate(timeout=60)
    assert left.returncode == 130 and "goes on without this command" in said and "Traceback" not in said, said
    assert cluster.jobs()[id_] == "RUNNING"
    attached = cluster.start(*watch)
    assert attached.stdout is not None and attached.stderr is not None
    assert "attached" in next(line for line in attached.stderr if "warning" not in line)
    assert any(f"{IMAGES} ok" in line for line in attached.stdout)
    stopped = cluster.submit("stop", id_)
    assert stopped.returncode == 0 and "STOPPED" in stopped.stdout, stopped.stderr
    assert attached.wait(60) == 1
    assert "ended before" in cluster.submit("stop", id_).stdout
    unknown = cluster.submit("logs", "raysal-label-none")
    assert unknown.returncode == 2 and "knows no such job" in unknown.stderr


def test_what_fits_on_no_node_is_refused_with_the_numbers(cluster: Cluster) -> None:
    label = ("label", cluster.root / "model", cluster.root / "images", "--out", cluster.root / "never", *QUICK)
    tries = ((("--cpus", "64"), "books 64 CPU"), (("--memory", "9000G"), "1 CPU, 9000.0 GB of memory"), (("--on", "spot"), "0.001 spot"))
    for more, said in tries:
        before = cluster.jobs()
        refused = cluster.submit(*label, *more)
        assert refused.returncode == 2 and said in refused.stderr and "the largest have 3 CPU" in refused.stderr, refused.stderr
        assert cluster.jobs() == before


def test_rays_own_command_runs_a_verb_from_a_checkout(cluster: Cluster) -> None:
    submit = ["ray", "job", "submit", "--address", cluster.address, "--working-dir", REPOSITORY, "--entrypoint-num-cpus", "1"]
    submit += ["--runtime-env-json", '{"env_vars": {"RAYSAL_JOB_CPUS": "1"}}', "--", "python", "jobs/index.py"]
    command = [*map(str, submit), str(cluster.root / "images"), "--out", str(cluster.root / "listed")]
    done = subprocess.run(command, env=cluster.environment(cluster.token), capture_output=True, text=True, timeout=START_S)
    assert done.returncode == 0 and f"{IMAGES} images" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


def test_another_raysal_than_the_clusters_travels_in_a_wheel(cluster: Cluster, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("raysal", "configs"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    with (source / "raysal" / "archive" / "index.py").open("a") as file:
        file.write("\nprint('from the wheel')\n")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path / "dist"), str(source)]
    subprocess.run(build, check=True, capture_output=True, timeout=START_S)
    [wheel] = (tmp_path / "dist").glob("raysal-*.whl")
    done = cluster.submit("index", cluster.root / "images", "--out", cluster.root / "wheeled", "--wheel", wheel)
    assert done.returncode == 0 and "from the wheel" in done.stdout and f"{IMAGES} images" in done.stdout, done.stdout + done.stderr


def test_a_run_whose_storage_a_node_does_not_see_is_refused_before_it_starts(cluster: Cluster) -> None:
    cluster.node(f"--address=127.0.0.1:{cluster.gcs}", "--num-cpus=2")
    cluster.wait(2)
    label = ("label", cluster.root / "model", cluster.root / "images", *QUICK)
    refused = cluster.submit(*label, "--out", "memory://only/here")  # each process has a memory of its own
    assert refused.returncode == 2 and "2 of 2 nodes can't write to memory:" in refused.stdout, refused.stdout[-3000:]
    assert "not the same storage" in refused.stdout and "s3://BUCKET" in refused.stdout
    assert not list(cluster.root.rglob(".raysal-probe-*"))
