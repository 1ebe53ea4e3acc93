"""A Ray cluster of several machines on this one: each is a network namespace on a bridge, with a Ray node, processes, temporary files and
resources of its own. Needs root, iproute2, and a kernel that lets namespaces be made.

    python tests/e2e/machines.py up FOLDER --nodes 3     # prints how to reach it
    python tests/e2e/machines.py down FOLDER

The first node is the head and has no CPUs. All ask for a token. FOLDER/shared is storage that all nodes see at the same path; an S3 server
outside of the machines (moto's) is another, which they and `Machines.environment` know by FSSPEC_S3_ENDPOINT_URL.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx

REPOSITORY = Path(__file__).resolve().parents[2]
START_S = 300
DASHBOARD, GCS, STORE = 8265, 6379, 9000

QUICK_DEATH = {"RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "3000"}
"""A node that answers no more is given up after some 15 seconds instead of a minute."""


def run(*command: object, check: bool = True) -> str:
    """Runs a command and returns what it says."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def cannot() -> str:
    """Why no machines can be made here; empty where they can."""
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("ip") is None:
        return "several machines on one need root and iproute2"
    name = f"rs{secrets.token_hex(2)}t"
    try:
        run("ip", "netns", "add", name)
        run("ip", "link", "add", name, "type", "bridge")
    except RuntimeError as error:
        return f"no network namespaces or bridges here: {error}"
    finally:
        run("ip", "link", "del", name, check=False)
        run("ip", "netns", "del", name, check=False)
    return ""


@dataclass
class Machines:
    """The cluster.

    Attributes:
        folder: Holds everything of it.
        name: Of its bridge; those of the machines begin so.
        net: Third number of its addresses, 198.18.NET.x, a range that is kept for tests.
        token: What its nodes and clients need to know.
        cpus: Logical CPUs of each machine but the head.
        store: Whether there is an S3 server too.
        env: More environment variables of all nodes.
    """

    folder: Path
    name: str = field(default_factory=lambda: f"rs{secrets.token_hex(2)}")
    net: int = field(default_factory=lambda: secrets.randbelow(250))
    token: str = field(default_factory=lambda: secrets.token_hex(24))
    cpus: int = 2
    store: bool = False
    env: dict[str, str] = field(default_factory=dict)

    @property
    def shared(self) -> Path:
        return self.folder / "shared"

    @property
    def gateway(self) -> str:
        """Where machines find what runs outside of them, for example a store."""
        return f"198.18.{self.net}.1"

    @property
    def dashboard(self) -> str:
        return f"http://{self.address(0)}:{DASHBOARD}"

    def address(self, machine: int) -> str:
        return f"198.18.{self.net}.{10 + machine}"

    @property
    def s3(self) -> dict[str, str]:
        """What fsspec needs to find the S3 server; it takes any key."""
        at = f"http://{self.gateway}:{STORE}"
        return {"FSSPEC_S3_ENDPOINT_URL": at, "FSSPEC_S3_KEY": "k", "FSSPEC_S3_SECRET": "s"} if self.store else {}

    def environment(self, token: bool = True) -> dict[str, str]:
        """Of nodes, and of clients beside them; raysal is this checkout's."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "RAYSAL_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
        env = (
            kept
            | {"PATH": path, "PYTHONPATH": str(REPOSITORY), "HOME": str(self.folder), "OMP_NUM_THREADS": "1", "no_proxy": "*"}
            | self.s3
            | self.env
        )
        return env | ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")} if token else {})

    def up(self, nodes: int) -> None:
        """Makes the bridge and so many machines, and waits until all are one cluster."""
        self.shared.mkdir(parents=True, exist_ok=True)
        file = self.folder / "token"
        file.write_text(self.token)
        file.chmod(0o600)
        state = asdict(self) | {"folder": str(self.folder)}
        (self.folder / "machines.json").write_text(json.dumps(state))
        run("ip", "link", "add", self.name, "type", "bridge")
        run("ip", "address", "add", f"{self.gateway}/24", "dev", self.name)
        run("ip", "link", "set", self.name, "up")
        if self.store:
            self.serve_store()
        for machine in range(nodes):
            self.make(machine)
            self.start(machine)
            self.wait(machine + 1)  # one after the other: Ray gives up on a node that is slow to start

    def serve_store(self) -> None:
        """Starts the S3 server and makes the bucket "mission"."""
        command = [sys.executable, "-m", "moto.server", "-H", self.gateway, "-p", str(STORE)]
        with open(self.folder / "store.log", "w") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said, stdin=subprocess.DEVNULL, start_new_session=True)
        (self.folder / "store.pid").write_text(str(process.pid))
        deadline = time.monotonic() + START_S
        while True:
            try:
                httpx.put(f"{self.s3['FSSPEC_S3_ENDPOINT_URL']}/mission", timeout=10, trust_env=False).raise_for_status()
                return
            except httpx.HTTPError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"no S3 server: {error}: {(self.folder / 'store.log').read_text()[-1000:]}") from error
                time.sleep(0.2)

    def make(self, machine: int) -> None:
        """A network namespace with one interface on the bridge."""
        space, here = f"{self.name}-{machine}", f"{self.name}v{machine}"
        run("ip", "netns", "add", space)
        run("ip", "link", "add", here, "type", "veth", "peer", "name", "eth0", "netns", space)
        run("ip", "link", "set", here, "master", self.name, "up")
        for command in (
            ("address", "add", f"{self.address(machine)}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
        ):
            run("ip", "-n", space, *command)

    def start(self, machine: int, cpus: int | None = None, without: Sequence[Path] = ()) -> None:
        """Starts a machine's Ray node, in whose view /tmp/ray is its own folder, and some folders are empty ones of its own."""
        mine = self.folder / f"machine-{machine}"
        shutil.rmtree(mine, ignore_errors=True)
        (mine / "ray").mkdir(parents=True)
        Path("/tmp/ray").mkdir(exist_ok=True)
        node = ["ray", "start", "--block", "--disable-usage-stats", "--object-store-memory=200000000"]
        node += [f"--node-ip-address={self.address(machine)}"]
        if machine == 0:
            node += ["--head", "--num-cpus=0", f"--port={GCS}", f"--dashboard-host={self.address(0)}", f"--dashboard-port={DASHBOARD}"]
        else:
            node += [f"--address={self.address(0)}:{GCS}", f"--num-cpus={self.cpus if cpus is None else cpus}"]
        views = [f"mount --bind {mine / 'ray'} /tmp/ray", *(f"mount -t tmpfs tmpfs {folder}" for folder in without)]
        # Processes of its own too: Ray's drivers look through them for the raylet that they belong to.
        command = ["ip", "netns", "exec", f"{self.name}-{machine}", "unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
        command += ["sh", "-c", " && ".join([*views, f"exec {' '.join(node)}"])]
        with open(self.folder / f"machine-{machine}.log", "a") as said:
            subprocess.Popen(command, stdout=said, stderr=said, stdin=subprocess.DEVNULL, env=self.environment(), start_new_session=True)

    def alive(self) -> dict[str, str]:
        """Node ids by address, of the nodes that the head counts as alive."""
        headers = {"Authorization": f"Bearer {self.token}"}
        try:
            answer = httpx.get(f"{self.dashboard}/nodes?view=summary", headers=headers, timeout=10, trust_env=False).json()
            nodes = [n["raylet"] for n in answer["data"]["summary"] if n["raylet"].get("state") == "ALIVE"]
            return {node["nodeManagerAddress"]: node["nodeId"] for node in nodes}
        except (httpx.HTTPError, ValueError, KeyError):
            return {}

    def wait(self, nodes: int, timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while len(self.alive()) != nodes:
            if time.monotonic() > deadline:
                logs = "".join(f.read_text()[-1500:] for f in sorted(self.folder.glob("machine-*.log")))
                raise RuntimeError(f"after {timeout_s:g} s {len(self.alive())} nodes are up, not {nodes}: {logs}")
            time.sleep(0.5)

    def submit(self, *arguments: object) -> subprocess.Popen:
        """Starts ``raysal submit ARGUMENTS`` of somebody at a desk beside the cluster."""
        command = [sys.executable, "-m", "raysal", "submit", *map(str, arguments), "--address", self.dashboard]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=self.environment())

    def without_the_job(self) -> int:
        """The worker machine, of two, that does not hold the running job's own process. Raises RuntimeError while no job runs."""
        headers = {"Authorization": f"Bearer {self.token}"}
        for job in httpx.get(f"{self.dashboard}/api/jobs/", headers=headers, timeout=30, trust_env=False).json():
            if job["status"] == "RUNNING" and job.get("driver_info"):
                return 2 if job["driver_info"]["node_ip_address"] == self.address(1) else 1
        raise RuntimeError("no job runs, so there is no machine without its process")

    def helpers(self) -> dict[str, str]:
        """Where the actors live that Ray Data keeps for all jobs: node ids by class."""
        answer = httpx.get(
            f"{self.dashboard}/api/v0/actors?limit=1000",
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=30,
            trust_env=False,
        ).json()
        kept = ("_StatsActor", "ActorLocationTracker", "_AutoscalingCoordinatorActor")
        found = answer["data"]["result"]["result"]
        return {actor["class_name"]: actor["node_id"] for actor in found if actor["class_name"] in kept and actor["state"] == "ALIVE"}

    def pids(self, machine: int) -> list[int]:
        return [int(pid) for pid in run("ip", "netns", "pids", f"{self.name}-{machine}", check=False).split()]

    def kill(self, machine: int) -> None:
        """Everything on it dies at once."""
        while pids := self.pids(machine):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def cut(self, machine: int) -> None:
        """Its cable is drawn; its processes go on."""
        run("ip", "link", "set", f"{self.name}v{machine}", "down")

    def mend(self, machine: int) -> None:
        run("ip", "link", "set", f"{self.name}v{machine}", "up")

    def down(self) -> None:
        """Ends and removes everything but FOLDER."""
        for line in run("ip", "netns", "list", check=False).splitlines():
            space = line.split()[0]
            if space.startswith(f"{self.name}-"):
                self.kill(int(space.rpartition("-")[2]))
                run("ip", "netns", "del", space, check=False)
        run("ip", "link", "del", self.name, check=False)
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            os.kill(int((self.folder / "store.pid").read_text()), signal.SIGKILL)


@contextmanager
def machines(folder: Path, nodes: int = 3, cpus: int = 2, env: dict[str, str] | None = None, store: bool = False) -> Iterator[Machines]:
    """A cluster that is gone afterwards."""
    made = Machines(folder, cpus=cpus, env=env or {}, store=store)
    try:
        made.up(nodes)
        yield made
    finally:
        made.down()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("up", "down"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=2, help="logical CPUs of each but the head")
    args = parser.parse_args()
    if why := cannot():
        raise SystemExit(why)
    folder = args.folder.resolve()
    if args.do == "down":
        Machines(**(json.loads((folder / "machines.json").read_text()) | {"folder": folder})).down()
        return
    made = Machines(folder, cpus=args.cpus, store=True)
    try:
        made.up(args.nodes)
    except BaseException:
        made.down()
        raise
    print(f"{args.nodes} nodes are up; storage that all see: {made.shared}")
    print(f"{' '.join(f'{name}={value}' for name, value in made.s3.items())}: s3://mission")
    print(f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={folder}/token")
    print(f"raysal submit list --address {made.dashboard}")


if __name__ == "__main__":
    main()
