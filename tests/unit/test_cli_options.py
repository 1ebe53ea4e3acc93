"""What a person gives on the command line counts as given: nothing is overridden in silence, paths that can't be used are named."""

from __future__ import annotations

import errno
import os
import platform
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from raysal import __version__
from raysal.archive.tables import read_table, scores_schema, write_table
from raysal.archive.uris import write_bytes
from raysal.cli.tokens import authenticated
from raysal.config import Config
from raysal.errors import InputError, RaysalError
from raysal.rounds import single
from tests.helpers import Call


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """Three images; uncertainty prefers a, entropy prefers c."""
    values = [("a", 0.9, 0.1), ("b", 0.5, 0.5), ("c", 0.1, 0.9)]
    rows = [{"id": n, "uri": f"/{n}.jpg", "status": "ok", "uncertainty": u, "entropy": e} for n, u, e in values]
    write_table(str(tmp_path / "scores.parquet"), pa.Table.from_pylist(rows, schema=scores_schema(("uncertainty", "entropy"))))
    return tmp_path / "scores.parquet"


def settings(tmp_path: Path, text: str) -> Path:
    (tmp_path / "c.yaml").write_text(text)
    return tmp_path / "c.yaml"


# --- query ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "arguments", "strategy", "first"),
    [
        ("", (), "ueq", None),
        ("query: {strategy: entropy}", (), "entropy", "c"),
        ("query: {strategy: entropy}", ("--strategy", "uncertainty"), "uncertainty", "a"),
        ("query: {strategy: entropy}", ("--set", "query.strategy=uncertainty"), "uncertainty", "a"),
    ],
)
def test_a_query_asks_by_the_strategy_that_was_given_and_says_which(
    tmp_path: Path, scores: Path, raysal: Call, config: str, arguments: tuple[str, ...], strategy: str, first: str | None
) -> None:
    queue = tmp_path / "q.parquet"
    code, out, err = raysal("query", scores, "--budget", 1, "--out", queue, "--config", settings(tmp_path, config), *arguments)
    assert code == 0, err
    assert f"1 images by {strategy}" in out
    row = read_table(str(queue)).to_pylist()[0]
    assert row["strategy"] == strategy
    assert first is None or row["id"] == first


def test_labels_are_given_more_than_once(tmp_path: Path, scores: Path, raysal: Call) -> None:
    for name in "ab":
        write_table(str(tmp_path / f"{name}.parquet"), pa.table({"id": [name]}))
    given = [x for name in "ab" for x in ("--labeled", tmp_path / f"{name}.parquet")]
    code, _, err = raysal("query", scores, "--budget", 1, "--out", tmp_path / "q.parquet", *given)
    assert code == 0, err
    assert read_table(str(tmp_path / "q.parquet"))["id"].to_pylist() == ["c"]


# --- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Configurations that evaluations were called with; each measures the same."""
    seen: list[Config] = []

    def evaluate(uri: str, cfg: Config, split: str, on_progress: object) -> dict:
        seen.append(cfg)
        return {
            "checkpoint": uri, "digest": "d", "split": split, "images": 7, "miou": 0.5, "accuracy": 0.5,
            "iou": {"soil": 0.75, "steep_slope": 0.25, "sky": None}, "confusion": [[30, 10, 0], [5, 5, 0], [0, 0, 0]],
            "calibration": {"ece": 0.0321, "edges": [], "pixels": [], "accuracy": [], "confidence": []},
        }  # fmt: skip

    monkeypatch.setattr(single, "evaluate_checkpoint", evaluate)
    return seen


@pytest.mark.parametrize(
    ("config", "arguments", "reader"),
    [
        (None, (), "folder"),
        ("data: {reader: ai4mars, root: elsewhere}", (), "ai4mars"),
        ("data: {reader: ai4mars}", ("--reader", "s5mars"), "s5mars"),
        ("data: {reader: ai4mars}", ("--set", "data.reader=s5mars"), "s5mars"),
        ("data: {reader: synthetic}", (), "folder"),
    ],
)
def test_an_evaluation_reads_the_layout_that_was_given(
    tmp_path: Path, asked: list[Config], raysal: Call, config: str | None, arguments: tuple[str, ...], reader: str
) -> None:
    """A configuration of synthetic scenes names a folder of them: none are drawn for an evaluation."""
    file = ("--config", settings(tmp_path, config)) if config is not None else ()
    code, _, err = raysal("evaluate", "ckpt", "set", *file, *arguments)
    assert code == 0, err
    assert (asked[0].data.reader, asked[0].data.root) == (reader, "set")


def test_an_evaluation_shows_confusion_and_calibration_to_people(asked: list[Config], raysal: Call) -> None:
    _, out, _ = raysal("evaluate", "ckpt", "set")
    lines = out.splitlines()
    assert "mIoU 0.5000 on 7 images of 'val'" in lines
    assert "calibration error (ECE) 0.0321" in lines
    table = [line.split() for line in lines[-4:]]
    assert table == [
        ["soil", "steep_slope", "sky"],
        ["soil", "75.0", "25.0", "0.0"],
        ["steep_slope", "50.0", "50.0", "0.0"],
        ["sky", "-", "-", "-"],
    ]
    assert len({len(line) for line in lines[-4:]}) == 1, "columns stand under their names"


# --- places that can't be written -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("synth", "FILE", "--images", 1), "FILE is a file, not a folder; name another place"),
        (("synth", "FILE/deep/er", "--images", 1), "not a folder; name another place"),
        (("synth", "/proc/nope", "--images", 1), "/proc/nope/synthetic.json: can't be written: "),
        (("query", "SCORES", "--budget", 1, "--out", "FILE/q"), "FILE/q: can't be written: "),
        (("query", "SCORES", "--budget", 1, "--out", "FOLDER"), "FOLDER: can't be written: it is a folder; name a file in it"),
    ],
)
def test_a_place_that_cannot_be_written_is_named_with_the_fix(
    tmp_path: Path, scores: Path, raysal: Call, arguments: tuple, said: str
) -> None:
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "folder").mkdir()
    places = {"FILE": tmp_path / "taken", "SCORES": scores, "FOLDER": tmp_path / "folder"}

    def filled(text: object) -> str:
        for word, path in places.items():
            text = str(text).replace(word, str(path))
        return str(text)

    code, _, err = raysal(*map(filled, arguments))
    assert code == 2 and "Traceback" not in err
    assert filled(said) in err
    assert (tmp_path / "taken").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "scores.parquet", "taken"], "half-written files were left"


@pytest.mark.parametrize(("number", "said"), [(13, "may write"), (30, "may write"), (5, "name a place where files can be made")])
def test_a_refusal_by_the_system_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str) -> None:
    """No permission, a read-only disk, a broken one."""

    def refuse(*_: object) -> None:
        raise OSError(number, "as the system puts it")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(InputError, match=f"x.parquet: can't be written: as the system puts it.*{said}"):
        write_bytes(str(tmp_path / "x.parquet"), b"x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PermissionError("Access Denied"), 2, "Access Denied; name a place where you may write"),
        (TimeoutError("no answer"), 1, "again once"),
    ],
)
def test_a_store_that_refuses_or_does_not_answer_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, error: OSError, code: int, said: str
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.pipe_file", refuse)
    with pytest.raises(RaysalError, match=said) as seen:
        write_bytes("memory://bucket/x", b"x")
    assert seen.value.exit_code == code


def test_the_version_is_told_with_those_that_a_cluster_must_share(raysal: Call) -> None:
    code, out, _ = raysal("--version")
    assert code == 0 and out == f"raysal {__version__}, Ray {ray.__version__}, Python {platform.python_version()}\n"


@pytest.mark.parametrize("mounted", [False, True])
def test_rays_token_is_for_its_owner_alone_or_as_it_was_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounted: bool) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "")
    monkeypatch.delenv("RAY_AUTH_MODE")
    (tmp_path / ".ray").mkdir()
    token = tmp_path / ".ray" / "auth_token"
    token.write_text("a" * 64)
    token.chmod(0o644)
    if mounted:
        monkeypatch.setattr(Path, "chmod", read_only)
    authenticated(starts=False)
    assert token.stat().st_mode & 0o777 == (0o644 if mounted else 0o600) and os.environ["RAY_AUTH_MODE"] == "token"
