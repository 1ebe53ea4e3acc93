"""Every node shows that it can do a run before it starts: a node that can't is named, with the fix, and nothing is left behind."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import raysal
from raysal import cluster, nodes
from raysal.config import ComputeConfig
from raysal.environment import JOB_CPUS, JOB_MEMORY
from raysal.errors import InputError, ResourceError
from raysal.stream import pool

HERE = {"Python": platform.python_version(), "raysal": raysal.__version__, "bfloat16": False, "wrong": {}}


def node(number: int, cpus: float = 4.0, alive: bool = True, gpus: float = 0.0) -> dict[str, Any]:
    has = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    return {"NodeID": f"{number:02d}" * 14, "NodeManagerAddress": f"10.0.0.{number}", "Alive": alive, "Resources": has}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Makes up what the nodes say; returns the ids of those asked."""

    def make(*up: dict, **said: dict) -> list[str]:
        asked: list[str] = []

        def ask(found: dict[str, str], known: dict[str, int], probes: dict[str, str], bfloat16: bool, timeout_s: float) -> dict[str, Any]:
            asked.extend(found)
            return {n: nodes._look._function(dict(known), dict(probes), n, bfloat16) | said.get(f"n{int(n[:2])}", {}) for n in found}

        monkeypatch.setattr(nodes.ray, "is_initialized", lambda: True)
        monkeypatch.setattr(nodes.ray, "nodes", lambda: list(up))
        monkeypatch.setattr(nodes.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: node(1)["NodeID"]))
        monkeypatch.setattr(nodes, "_ask", ask)
        return asked

    return make


def test_nodes_that_see_everything_pass_and_nothing_is_left(answers: Callable[..., list[str]], tmp_path: Path) -> None:
    asked = answers(node(1), node(2), node(3, alive=False), node(4, cpus=0))
    (tmp_path / "model.json").write_text("{}")
    nodes.check_nodes([str(tmp_path / "model.json"), str(tmp_path), str(tmp_path / "gone.jpg")], [str(tmp_path / "a/b/out")])
    assert [n[:2] for n in asked] == ["01", "02"]  # not the one that is down, nor a head without work
    assert [f.name for f in tmp_path.iterdir()] == ["model.json"]


def test_one_node_and_no_ray_are_not_asked(answers: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(node(1), node(2, cpus=0))
    nodes.check_nodes(["/no/such"], ["/proc/no/such"])
    assert asked == []
    asked = answers(node(1, cpus=0), node(2))  # the work is elsewhere, although on one node
    nodes.check_nodes([], [str(tmp_path)])
    assert [n[:2] for n in asked] == ["02"]
    monkeypatch.setattr(nodes.ray, "is_initialized", lambda: False)
    nodes.check_nodes(["/no/such"], ["/proc/no/such"])


def test_a_place_that_nodes_do_not_see_is_named_with_them_and_the_fix(answers: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("{}")
    model, out = str(tmp_path / "model.json"), str(tmp_path / "out")
    answers(node(1), node(2), node(3), n2={"wrong": {model: "nothing there"}}, n3={"wrong": {model: "another file there"}})
    with pytest.raises(ResourceError, match=rf"2 of 3 nodes can't see {model}: 10\.0\.0\.2 \(02020202\): nothing there.*s3://"):
        nodes.check_nodes([model], [out])
    answers(node(1), node(2), n2={"wrong": {out: "not the same storage"}})
    with pytest.raises(ResourceError, match=rf"1 of 2 nodes can't write to {out}.*every node mounts"):
        nodes.check_nodes([model], [out])
    assert [f.name for f in tmp_path.iterdir()] == ["model.json"]


def test_of_many_nodes_some_are_named(answers: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    wrong = {"wrong": {str(tmp_path / "a"): "nothing there"}}
    answers(*(node(n) for n in range(1, 21)), **{f"n{n}": wrong for n in range(1, 21)})
    with pytest.raises(ResourceError, match=r"20 of 20 nodes .*; and 15 more"):
        nodes.check_nodes([str(tmp_path / "a")], [])


@pytest.mark.parametrize("what", ["Python", "raysal"])
def test_other_programs_on_a_node_are_refused_with_both_versions(answers: Callable[..., list[str]], tmp_path: Path, what: str) -> None:
    answers(node(1), node(2), n2={what: "0.0.9"})
    with pytest.raises(ResourceError, match=rf"1 of 2 nodes run another {what} than the {HERE[what]} of this process.*0\.0\.9"):
        nodes.check_nodes([], [str(tmp_path)])


def test_a_place_where_nothing_can_be_written_is_refused(answers: Callable[..., list[str]]) -> None:
    answers(node(1), node(2))
    with pytest.raises(InputError, match="can't be written"):
        nodes.check_nodes([], ["/proc/nowhere/out"])


def test_what_a_node_finds(tmp_path: Path) -> None:
    look = nodes._look._function
    (tmp_path / "a").write_text("four")
    (tmp_path / f"{nodes.PROBE}1").write_text(f"{nodes.PROBE}1")
    good = look({str(tmp_path / "a"): 4, str(tmp_path): 0}, {str(tmp_path): str(tmp_path / f"{nodes.PROBE}1")}, "0" * 8, False)
    assert good == HERE and len(list(tmp_path.iterdir())) == 2
    bad = look({str(tmp_path / "a"): 5, "/no/such": 1}, {"/out": str(tmp_path / "other/.raysal-probe-2")}, "0" * 8, False)
    assert bad["wrong"] == {str(tmp_path / "a"): "another file there", "/no/such": "nothing there", "/out": "not the same storage"}


def test_a_node_that_lacks_bfloat16_is_named_before_its_actors_fail(answers: Callable[..., list[str]], tmp_path: Path) -> None:
    answers(node(1), node(2), n1={"bfloat16": True}, n2={"bfloat16": False})
    nodes.check_nodes([], [str(tmp_path)])
    with pytest.raises(ResourceError, match=r"1 of 2 nodes don't compute in bfloat16.*10\.0\.0\.2.*set runtime\.precision=float32"):
        nodes.check_nodes([], [str(tmp_path)], bfloat16=True)


# --- what the cluster has ---------------------------------------------------------------------------------------------


@pytest.fixture
def one_node(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    def make(cpus: float) -> None:
        monkeypatch.setattr(cluster.ray, "nodes", lambda: [node(1, cpus)])
        monkeypatch.setattr(cluster.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: node(1)["NodeID"]))

    return make


def test_what_a_jobs_own_process_holds_is_not_promised_to_work(one_node: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Or its workers would wait for a core that only the end of the job sets free."""
    one_node(2.0)
    cluster.check_training(ComputeConfig(train_workers=1))
    monkeypatch.setenv(JOB_CPUS, "1")
    with pytest.raises(ResourceError, match="the cluster has 1 besides the 1 of this job's own process"):
        cluster.check_training(ComputeConfig(train_workers=1))
    assert cluster.score_actors(ComputeConfig()) == (1, 1)
    with pytest.raises(ResourceError, match="besides the 1"):
        cluster.score_actors(ComputeConfig(score_actors=2))
    monkeypatch.setenv(JOB_MEMORY, str(10**9))
    has = node(1, 8.0)
    has["Resources"]["memory"] = 1.8e9  # would hold an actor, but for the job
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [has])
    with pytest.raises(ResourceError, match="room for only 0 such"):
        cluster.score_actors(ComputeConfig(address="auto", score_actors=1))


def test_cores_are_those_that_ray_was_told_of_and_here_no_more_than_there_are(
    one_node: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_node(1.0)
    monkeypatch.setattr(cluster.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [node(1, 4.0), node(2, 16.0), node(3, 0.0), node(4, 8.0, alive=False)])
    assert list(cluster.cores().values()) == [2, 16, 0]
    one_node(1.0)
    assert list(cluster.cores().values()) == [1]


@pytest.mark.parametrize(
    ("nodes_cores", "actors", "booked", "threads"),
    [([2], 2, None, 1), ([2], 1, None, 2), ([16] * 10, 160, None, 1), ([16] * 10, 10, None, 16), ([16] * 10, 1, None, 16),
     ([0, 4], 8, None, 1), ([16] * 10, 5, 2, 2)],
)  # fmt: skip
def test_an_actor_has_no_more_threads_than_its_node_has_cores(
    nodes_cores: list[int], actors: int, booked: int | None, threads: int
) -> None:
    assert pool._threads(nodes_cores, actors, booked) == threads


@pytest.fixture
def up(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)  # tests that ran before may have left a Ray up
    monkeypatch.setattr(cluster.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: node(1)["NodeID"]))

    def make(*those: dict[str, Any]) -> None:
        monkeypatch.setattr(cluster.ray, "nodes", lambda: list(those))

    return make


def test_processes_that_fit_on_no_node_are_refused_although_the_cluster_has_as_much(up: Callable[..., None]) -> None:
    """Ray would wait for ever: none is spread over nodes."""
    up(*(node(n, 8.0) for n in range(1, 5)))
    assert cluster.score_actors(ComputeConfig(score_actors=4, cpus_per_actor=7)) == (4, 4)
    with pytest.raises(ResourceError, match=r"2 score actors, each of 15 CPU:.*have room for only 0 such; lower compute.cpus_per_actor"):
        cluster.score_actors(ComputeConfig(score_actors=2, cpus_per_actor=15))
    with pytest.raises(ResourceError, match=r"2 train workers, each of 9 CPU:.*room for only 0 such"):
        cluster.check_training(ComputeConfig(train_workers=2, cpus_per_worker=9))


def test_a_gpu_and_its_cpus_must_be_on_one_node(up: Callable[..., None]) -> None:
    gpu = ComputeConfig(train_workers=2, cpus_per_worker=6, use_gpu=True, score_actors=2, cpus_per_actor=6)
    up(node(1, 8.0, gpus=1), node(2, 4.0, gpus=1), node(3, 32.0))
    with pytest.raises(ResourceError, match=r"2 train workers, each of 6 CPU, 1 GPU:.*only 1 such"):
        cluster.check_training(gpu)
    with pytest.raises(ResourceError, match=r"2 score actors, each of 6 CPU, 1 GPU:.*only 1 such"):
        cluster.score_actors(gpu)
    up(node(1, 8.0, gpus=1), node(2, 8.0, gpus=1), node(3, 32.0))
    cluster.check_training(gpu)
    assert cluster.score_actors(gpu) == (2, 2)
    with pytest.raises(ResourceError, match="need 3 GPUs, but the cluster has 2"):
        cluster.score_actors(gpu.model_copy(update={"score_actors": 3}))
    halves = ComputeConfig(use_gpu=True, gpus_per_actor=0.5, cpus_per_actor=2)
    assert cluster.score_actors(halves) == (4, 4) and cluster.of_an_actor(halves) == {"CPU": 2, "GPU": 0.5}


def test_actors_that_a_nodes_memory_does_not_hold_are_refused(up: Callable[..., None]) -> None:
    small = node(1, 16.0)
    small["Resources"]["memory"] = 3.5e9
    up(small)
    assert cluster.score_actors(ComputeConfig(score_actors=8)) == (8, 8)  # on this machine alone: it is whoever started it who decides
    on_a_cluster = ComputeConfig(score_actors=8, address="10.0.0.1:6379")
    with pytest.raises(ResourceError, match=r"8 score actors, each of 0.5 CPU, 1.0 GB of memory:.*room for only 3 such"):
        cluster.score_actors(on_a_cluster)


def test_where_nodes_come_and_go_the_least_number_of_actors_will_do(up: Callable[..., None]) -> None:
    up(node(1, 4.0))
    assert cluster.score_actors(ComputeConfig(score_actors=120, min_actors=2, cpus_per_actor=1)) == (2, 120)
    with pytest.raises(ResourceError, match="4 score actors x 1 CPUs"):
        cluster.score_actors(ComputeConfig(score_actors=120, min_actors=4, cpus_per_actor=1))
    with pytest.raises(ValueError, match=r"min_actors is 3, at most score_actors \(2\)"):
        ComputeConfig(score_actors=2, min_actors=3)


def test_an_autoscaler_is_asked_and_waited_for_and_released(one_node: Callable[[float], None], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[dict]] = []

    @contextlib.contextmanager
    def asked_for(bundles: list[dict], priority: str) -> Iterator[None]:
        asked.append(bundles)
        yield
        asked.append([])

    monkeypatch.setattr(cluster, "_asked_for", asked_for)
    monkeypatch.setattr(cluster.time, "sleep", lambda _: one_node(8.0))
    one_node(1.0)
    cluster.check_training(ComputeConfig(train_workers=2, cpus_per_worker=3, grow_s=60))
    assert asked == [[{"CPU": 3.0}, {"CPU": 3.0}, {"CPU": cluster.INGEST_CPUS}], []]
    monkeypatch.setenv(JOB_CPUS, "1")  # an autoscaler that is not told of it thinks that what is there will do
    one_node(1.0)
    cluster.check_training(ComputeConfig(train_workers=2, cpus_per_worker=3, grow_s=60))
    assert asked[2] == [{"CPU": 3.0}, {"CPU": 3.0}, {"CPU": 1.0}, {"CPU": cluster.INGEST_CPUS}]
    one_node(1.0)
    monkeypatch.setattr(cluster.time, "sleep", lambda _: None)
    with pytest.raises(ResourceError, match=r"waited 0\.05 s for more nodes"):
        cluster.check_training(ComputeConfig(train_workers=2, cpus_per_worker=3, grow_s=0.05))
    assert asked[-1] == []


@pytest.mark.parametrize(
    ("cpus", "job", "least", "booked"),
    [
        (8.0, "1", 1, [{"CPU": 1.5, "node:10.0.0.1": 0.001, "memory": 1.0}]),
        (8.0, "", 1, [{"CPU": 0.5, "node:10.0.0.1": 0.001, "memory": 1.0}]),
        (1.0, "1", 1, [{"CPU": 1.0, "node:10.0.0.1": 0.001, "memory": 1.0}, {"CPU": 0.5}]),  # decoding finds room elsewhere
        (0.0, "", 1, [{"CPU": 0.5}]),
        (8.0, "1", 0, None),
    ],
)
def test_elastic_workers_leave_room_for_the_job_and_its_decoding(
    up: Callable[..., None], monkeypatch: pytest.MonkeyPatch, cpus: float, job: str, least: int, booked: list[dict] | None
) -> None:
    mine = node(1, cpus)
    mine["Resources"] |= {"node:10.0.0.1": 1.0, cluster.HEAD: 1.0, "memory": 1e9}
    up(mine, node(2, 64.0))
    monkeypatch.setenv(JOB_CPUS, job)
    asked: list[tuple[list[dict], str]] = []
    monkeypatch.setattr(cluster, "_asked_for", lambda bundles, priority: contextlib.nullcontext(asked.append((bundles, priority))))
    with cluster.room_beside_elastic_workers(ComputeConfig(train_workers=4, min_workers=least)):
        assert asked == ([] if booked is None else [(booked, "HIGH")])
