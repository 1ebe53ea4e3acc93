"""Whether every node of a cluster can do a run, before it starts: it sees the inputs, it writes where the output goes, it runs the same
programs. A node that can't would fail its share of the work hours later, or write it where nobody finds it."""

from __future__ import annotations

import contextlib
import os
import platform
import posixpath
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import raysal
from raysal.archive.uris import is_local, join, open_fs, read_bytes, remove_tree, store_errors, write_bytes
from raysal.errors import ResourceError
from raysal.model.processor import has_bfloat16

PROBE = ".raysal-probe-"
"""How the names of files begin by which storage shows that it is shared."""

ANSWER_S = 120.0
"""How long nodes may take: each may have to start a process first."""

NAMED = 5
"""Nodes that a message names."""

Found = Mapping[str, Any]
"""What a node says: its Python and raysal, whether it computes in bfloat16 where that was asked, and for each place that is wrong why."""


def check_nodes(reads: Sequence[str], writes: Sequence[str], bfloat16: bool = False, timeout_s: float = ANSWER_S) -> None:
    """Looks at the places of a run from every node that work can land on. Where that is this process's own alone, or Ray is
    not up, there is nothing to find out.

    Args:
        reads: Files and folders that the work reads. What this process can't read itself is passed over: it is told elsewhere.
        writes: Folders that it writes to; they need not exist. Nothing is left in them.
        bfloat16: Whether OpenVINO is to compute in it on each node.
        timeout_s: For all nodes together.

    Raises:
        ResourceError: Nodes can't see a place, run other programs than this process, lack bfloat16, or don't answer; it names them and
            the fix.
        InputError: Nothing can be written there.
    """
    if not ray.is_initialized():
        return
    nodes = {node["NodeID"]: f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})" for node in ray.nodes() if _works(node)}
    if set(nodes) <= {ray.get_runtime_context().get_node_id()}:
        return
    known = {uri: size for uri in dict.fromkeys(reads) if (size := _size(uri)) is not None}
    with _probes(writes) as probes:
        found = _ask(nodes, known, probes, bfloat16, timeout_s)
    _check_programs(nodes, found)
    if bfloat16 and (other := {node: "float32" for node, said in found.items() if not said["bfloat16"]}):
        raise ResourceError(
            f"{len(other)} of {len(nodes)} nodes don't compute in bfloat16 as this one does: {_names(nodes, other)}; "
            "set runtime.precision=float32, which is the same on all of them"
        )
    for place in (*known, *writes):
        if wrong := {node: said["wrong"][place] for node, said in found.items() if place in said["wrong"]}:
            do = "see" if place in known else "write to"
            raise ResourceError(
                f"{len(wrong)} of {len(nodes)} nodes can't {do} {place}: {_names(nodes, wrong)}; put it on storage that every node "
                "mounts at the same path, or at a URI such as s3://BUCKET/..., and give that"
            )


def _works(node: Mapping[str, Any]) -> bool:
    """Whether work can land on a node: it is up and has CPUs or GPUs. A head is best without, and then needs to see nothing."""
    return bool(node["Alive"] and (node["Resources"].get("CPU") or node["Resources"].get("GPU")))


def _check_programs(nodes: Mapping[str, str], found: Mapping[str, Found]) -> None:
    """Raises ResourceError where a node runs other programs."""
    for what, mine in (("Python", platform.python_version()), ("raysal", raysal.__version__)):
        if other := {node: said[what] for node, said in found.items() if said[what] != mine}:
            raise ResourceError(
                f"{len(other)} of {len(nodes)} nodes run another {what} than the {mine} of this process: {_names(nodes, other)}; "
                "start all nodes from one image, or bring raysal along: raysal submit --wheel FILE"
            )


def _ask(
    nodes: Mapping[str, str], known: Mapping[str, int], probes: Mapping[str, str], bfloat16: bool, timeout_s: float
) -> dict[str, Found]:
    """What each node says, by its id. Nodes that went away meanwhile say nothing."""
    asked = {
        _look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            dict(known), dict(probes), node, bfloat16
        ): node
        for node in nodes
    }
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    found: dict[str, Found] = {}
    silent = {asked[ref]: f"no answer within {timeout_s:g} s" for ref in late}
    for ref in late:
        ray.cancel(ref, force=True)
    for ref in ready:
        try:
            found[asked[ref]] = ray.get(ref)
        except RayError as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            silent[asked[ref]] = lines[-1].strip()[:200] if lines else type(error).__name__
    up = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    if silent := {node: why for node, why in silent.items() if node in up}:
        raise ResourceError(
            f"{len(silent)} of {len(nodes)} nodes can't run a task of raysal: {_names(nodes, silent)}; is raysal in their image? "
            "Look at them with ray status, or take them out of the cluster"
        )
    return found


@ray.remote(num_cpus=0, max_retries=0)
def _look(known: dict[str, int], probes: dict[str, str], node: str, bfloat16: bool) -> dict[str, Any]:
    """Runs on each node."""
    wrong: dict[str, str] = {}
    for uri, size in known.items():
        here = _size(uri)
        if here != size:
            wrong[uri] = "nothing there" if here is None else "another file there"
    for place, probe in probes.items():
        try:
            token = posixpath.basename(probe).encode()
            if read_bytes(probe) != token:
                wrong[place] = "another file there"
            write_bytes(f"{probe}-{node[:8]}", token)
            remove_tree(f"{probe}-{node[:8]}")
        except FileNotFoundError:
            wrong[place] = "not the same storage"
        except Exception as error:  # of all sorts of stores; a node never fails, it says why
            wrong[place] = " ".join(str(error).split())[:200]
    return {"Python": platform.python_version(), "raysal": raysal.__version__, "bfloat16": bfloat16 and has_bfloat16(), "wrong": wrong}


@contextlib.contextmanager
def _probes(writes: Sequence[str]) -> Iterator[dict[str, str]]:
    """Writes a small file where each place is, or would be made, and takes it away. By place, where its file is."""
    probes = {place: join(_ground(place), f"{PROBE}{uuid.uuid4().hex[:16]}") for place in dict.fromkeys(writes)}
    try:
        for probe in probes.values():
            write_bytes(probe, posixpath.basename(probe).encode())
        yield probes
    finally:
        for probe in probes.values():
            with contextlib.suppress(Exception):  # what is wrong with the place is on its way already
                remove_tree(probe)


def _ground(place: str) -> str:
    """The folder itself, or the nearest one above it that is there: a refused run leaves no folder. Object stores have no folders."""
    if not is_local(place):
        return place
    folder = open_fs(place)[1]
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder) or "/"
    return folder


def _size(uri: str) -> int | None:
    """Bytes of a file, 0 of a folder, None where there is neither or it can't be read."""
    try:
        fs, path = open_fs(uri)
        with store_errors(uri):
            about = fs.info(path)
            size = int(about.get("size") or 0) if about["type"] == "file" else 0
            if size:
                fs.cat_file(path, end=1)
            return size
    except Exception:  # of all sorts of stores: what is wrong is said by whoever needs the file
        return None


def _names(nodes: Mapping[str, str], why: Mapping[str, str]) -> str:
    """Some nodes with their reasons, and how many more."""
    named = [f"{nodes[node]}: {reason}" for node, reason in [*why.items()][:NAMED]]
    return "; ".join(named) + (f"; and {len(why) - NAMED} more" if len(why) > NAMED else "")
