"""The shape of the house: who may import whom, what is never used, how long a file may get."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "raysal"
FILES = sorted(PACKAGE.rglob("*.py"))

FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("labels", "config", "words", "environment"),
    ("images", "archive"),
    ("datasets", "model", "query", "export", "plan"),
    ("answers", "client"),
    ("cluster", "nodes", "telemetry"),
    ("train", "stream", "serving", "jobs"),
    ("rounds", "report"),
    ("progress",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_RAY = [room for room in FLOOR if FLOOR[room] < FLOOR["cluster"]]
WITHOUT_TORCH = [room for room in FLOOR if FLOOR[room] <= FLOOR["archive"]]

FORBIDDEN_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
FORBIDDEN_CALLS = {
    "eval", "exec", "torch.load", "torch.jit.load", "torch.hub.load", "os.system",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
}  # fmt: skip


def room_of(file: Path) -> str:
    """Top-level name under raysal/; empty for raysal/__init__.py itself."""
    name = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if name == "__init__" else name


def imports_of(tree: ast.AST, file: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import, wherever it stands in the file."""
    package = ("raysal", *file.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module or "") if part)
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def wrong_imports(source: str, file: Path) -> list[str]:
    """Imports that a file may not have where it stands, each as a sentence."""
    room, found = room_of(file), []
    where = file.relative_to(ROOT)
    for line, name in imports_of(ast.parse(source), file):
        top, *rest = name.split(".")
        if top == "ray" and FLOOR.get(room, -1) < FLOOR["cluster"]:
            found.append(f"{where}:{line} imports ray; rooms below cluster.py know nothing of it")
        if top == "torch" and FLOOR.get(room, -1) <= FLOOR["archive"]:
            found.append(f"{where}:{line} imports torch; images and archive do without")
        target = rest[0] if top == "raysal" and rest else ""
        if target in FLOOR and target != room and FLOOR[target] >= FLOOR.get(room, -1):
            found.append(f"{where}:{line} ({room or 'raysal'}) imports raysal.{target}, which is not on a lower floor")
    return found


def forbidden_uses(source: str) -> list[tuple[int, str]]:
    """(line, name) of modules and calls that run code hidden in data."""
    tree, found, names = ast.parse(source), [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else alias.name.split(".")[0]
                if alias.name.split(".")[0] in FORBIDDEN_MODULES:
                    found.append((node.lineno, alias.name))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            if (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
                found.append((node.lineno, str(node.module)))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            called = names.get(first, first) + dot + rest
            if called in FORBIDDEN_CALLS:
                found.append((node.lineno, called))
            for keyword in node.keywords:
                if keyword.arg in {"allow_pickle", "shell"} and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value):
                    found.append((node.lineno, f"{called}({keyword.arg}=...)"))
    return found


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(file) for file in FILES} - {""}
    assert rooms, f"no code under {PACKAGE}"
    assert rooms <= set(FLOOR), f"give these a floor here and in docs/architecture.md: {sorted(rooms - set(FLOOR))}"


def test_each_room_imports_only_from_lower_floors() -> None:
    found = [line for file in FILES for line in wrong_imports(file.read_text(encoding="utf-8"), file)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("from raysal.model import losses", "query/scores.py"),
        ("from raysal import train", "model/network.py"),
        ("def f():\n    import raysal.rounds.loop", "stream/score.py"),
        ("from ..cli import main", "report/page.py"),
        ("from .. import rounds", "report/page.py"),
        ("import ray", "datasets/folder.py"),
        ("from ray import data", "model/network.py"),
        ("import torch.nn as nn", "images/decode.py"),
        ("from raysal.cli import main", "__init__.py"),
        ("import raysal.config", "errors.py"),
    ],
)
def test_an_import_from_the_same_or_a_higher_floor_is_noticed(source: str, file: str) -> None:
    assert len(wrong_imports(source, PACKAGE / file)) == 1


@pytest.mark.parametrize(
    ("source", "file"),
    [
        ("from raysal.query.select import select", "stream/score.py"),
        ("from raysal.model.losses import wce", "model/network.py"),
        ("from . import losses", "model/network.py"),
        ("import ray.data", "stream/score.py"),
        ("import rayon, torchvision", "images/decode.py"),
        ("from raysal import __version__", "errors.py"),
    ],
)
def test_an_import_from_a_lower_floor_or_the_own_room_is_allowed(source: str, file: str) -> None:
    assert wrong_imports(source, PACKAGE / file) == []


def test_the_command_line_answers_before_anything_heavy_is_loaded() -> None:
    """A second for --help and for what is refused; a verb loads what it needs."""
    program = (
        "import sys, raysal.cli; print(sorted({'torch', 'ray', 'pandas', 'timm', 'matplotlib', 'pyarrow', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("rooms", "without"),
    [
        (("train.decode",), ("torch",)),
        (("train.ray", "train.loop", "stream.label", "stream.score", "serving.app"), ("timm", "torchvision", "torch._dynamo")),
    ],
)
def test_processes_that_hand_work_on_do_not_load_what_others_do_it_with(rooms: tuple[str, ...], without: tuple[str, ...]) -> None:
    """Ray's controllers, its data processes, the driver of a stream: each would start seconds later."""
    imports = ", ".join(f"raysal.{room}" for room in rooms)
    program = f"import sys, {imports}; print(sorted({set(without)!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


@pytest.mark.parametrize(("rooms", "blocked"), [(WITHOUT_RAY, "ray"), (WITHOUT_TORCH, "torch")], ids=["ray", "torch"])
def test_lower_rooms_import_where_the_library_is_missing(rooms: list[str], blocked: str) -> None:
    program = f"""
import importlib, pkgutil, sys
sys.modules[{blocked!r}] = None  # every import of it now fails
import raysal
count = 0
for room in {rooms!r}:
    module = importlib.import_module("raysal." + room)
    count += 1
    for info in pkgutil.walk_packages(getattr(module, "__path__", []), module.__name__ + "."):
        importlib.import_module(info.name)
        count += 1
print(count)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == sum(room_of(file) in rooms for file in FILES)


def test_nothing_that_runs_code_from_data_is_used() -> None:
    found = [f"{file.relative_to(ROOT)}:{line} {name}" for file in FILES for line, name in forbidden_uses(file.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load as read\nread('x')",
        "import torch as t\nt.load('x')",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load\nunsafe_load(text)",
        "eval('1')",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import subprocess\nsubprocess.run(command, shell=True)",
    ],
)
def test_code_from_data_is_noticed_under_any_name(source: str) -> None:
    assert len(forbidden_uses(source)) == 1


@pytest.mark.parametrize(
    "source", ["model.eval()", "import yaml\nyaml.safe_load(text)", "np.load(path, allow_pickle=False)", "import re\nre.compile('exec')"]
)
def test_harmless_namesakes_pass(source: str) -> None:
    assert forbidden_uses(source) == []


def test_no_file_is_longer_than_400_lines() -> None:
    lengths = {file.relative_to(ROOT): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert not {str(file): n for file, n in lengths.items() if n > 400}
