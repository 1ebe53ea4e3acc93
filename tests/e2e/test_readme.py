"""What README and docs/ show is there and works.

Blocks of bash that stand under a line ``<!-- test -->`` are run, in order, in one empty folder that has the project's configs/.
Keep them fast: they are for commands that take seconds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from raysal.config import load
from raysal.labels import S5MARS
from raysal.model.checkpoint import ModelInfo, save
from raysal.model.network import TwoBranch

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MARKED = re.findall(r"^<!-- test -->\n+```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def bash_of(text: str) -> str:
    """All bash of a page with continued lines joined."""
    return "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("readme")
    shutil.copytree(ROOT / "configs", place / "configs")
    cfg = load(ROOT / "configs" / "demo.yaml")  # the demo takes minutes: an untrained model of its kind stands where it leaves its last one
    info = ModelInfo(S5MARS, cfg.model, input_scale=1.0, tile_px=96)
    save(str(place / "runs/demo/rounds/002/checkpoint"), TwoBranch(cfg.model, S5MARS.n_classes, 0), info)
    return place


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=os.environ | {"PATH": path, "COLUMNS": "200", "TERM": "dumb"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=800,
    )


@cache
def help_of(verb: str) -> str:
    """What ``raysal VERB --help`` says; nothing where there is no such verb."""
    done = run(f"raysal {verb} --help", ROOT)
    return done.stdout if done.returncode == 0 else ""


def test_the_readme_has_blocks_to_run() -> None:
    assert MARKED
    assert README.count("<!-- test -->") == len(MARKED), "a marker is not followed by a bash block"


@pytest.mark.slow
@pytest.mark.parametrize("block", MARKED, ids=[block.strip().splitlines()[-1][:60] for block in MARKED])
def test_readme_commands_run(block: str, folder: Path) -> None:
    done = run(block, folder)
    assert done.returncode == 0, f"{block}\n--- stdout\n{done.stdout[-3000:]}\n--- stderr\n{done.stderr[-3000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_verb_and_option_shown_exists(page: Path) -> None:
    for line in bash_of(page.read_text(encoding="utf-8")).splitlines():
        words = re.sub(r"\s#.*", "", line).split()
        if "raysal" not in words or words[words.index("raysal") + 1 : words.index("raysal") + 2] == ["--help"]:
            continue
        verb, *rest = words[words.index("raysal") + 1 :]
        if verb == "serve":  # a group, whose first command need not be named
            verb = f"serve {rest[0] if rest[0] in ('promote', 'ask') else 'run'}"
        told = help_of(verb)
        if verb == "submit":  # takes the options of the verb that it sends, too
            told = help_of(f"submit {rest[0]}")
            told += help_of(rest[0]) if told else ""
        assert told, f"{page.name} shows {line!r}"
        for option in (word.partition("=")[0] for word in rest if word.startswith("--")):
            assert re.search(rf"{option}\b", told), f"{page.name} shows {line!r}, but raysal {verb} has no {option}"


def test_every_make_target_shown_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    shown = {name for page in PAGES for name in re.findall(r"\bmake ([a-z][a-z-]+)\b", bash_of(page.read_text(encoding="utf-8")))}
    assert {"demo", "test"} <= shown
    assert shown <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_of_the_project_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    dead = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not dead, f"{page.name} links to {dead}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_config_key_shown_exists(page: Path) -> None:
    from raysal.config import valid_keys

    text = page.read_text(encoding="utf-8")
    sections = {key.partition(".")[0] for key in valid_keys() if "." in key}
    files = (".md", ".py", ".json", ".jsonl", ".parquet", ".csv", ".safetensors", ".png")
    in_code = re.findall(rf"`((?:{'|'.join(sections)})(?:\.[a-z_0-9]+)+)(?:=[^`]*)?`", text)
    named = {key for key in in_code if not key.endswith(files)} | set(re.findall(r"--set ([a-z_.0-9]+)=", text))
    unknown = named - set(valid_keys())
    assert not unknown, f"{page.name} names keys that raysal/config.py lacks: {sorted(unknown)}"
