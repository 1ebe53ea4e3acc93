"""An output folder grows by runs: nothing lost, nothing twice, nobody else's rows."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from raysal.archive.tables import labels_schema, read_table
from raysal.errors import InputError, RaysalError
from raysal.stream.output import FAILED, INDEX, SUCCESS, Output, keys
from raysal.stream.worker import RUN, require_token, shard_name

MINE = {"kind": "LabelImages", "model_digest": "a" * 64, "config_digest": "b" * 64}
START = datetime(2026, 1, 1, tzinfo=timezone.utc)


def output(folder: Path, **other: str) -> Output:
    return Output(str(folder), labels_schema(), MINE | other)


def shard(folder: Path, ids: list[int], minute: int, status: str = "ok", token: str = "t") -> Path:
    names = [f"{i:032x}" for i in ids]
    error = None if status == "ok" else "a reason"
    rows = [{"id": n, "uri": f"/{n}", "status": status, "error": error, "labeled_at": START + timedelta(minutes=minute)} for n in names]
    path = folder / shard_name(names, token)
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=labels_schema()), path)
    return path


def rows_of(folder: Path) -> dict[str, datetime]:
    rows = read_table(str(folder)).to_pylist()
    assert len({row["id"] for row in rows}) == len(rows), "an image has two rows"
    return {row["id"]: row["labeled_at"] for row in rows}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shards=st.lists(st.tuples(st.sets(st.integers(0, 12), min_size=1), st.integers(0, 5)), max_size=6), number=st.integers(0, 10**9))
def test_of_several_rows_of_an_image_the_newest_stays(shards: list[tuple[set[int], int]], number: int, tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path_factory.mktemp("out") / str(number)
    newest: dict[str, datetime] = {}
    for n, (ids, minute) in enumerate(shards):
        shard(folder, sorted(ids), minute, token=str(n))
        for i in ids:
            newest[f"{i:032x}"] = max(newest.get(f"{i:032x}", START), START + timedelta(minutes=minute))
    held = output(folder).held()
    assert sorted(held.key) == sorted(keys(pa.array(list(newest), pa.string())))
    assert not newest or rows_of(folder) == newest
    again = output(folder).held()
    assert again.shards == held.shards and (again.key == held.key).all()


def test_a_process_that_died_between_two_files_left_nothing_that_is_lost_or_doubled(tmp_path: Path) -> None:
    """Rows leave a shard by a second file that holds the rest; a death between leaves both."""
    old = shard(tmp_path, [1, 2, 3], 0)
    table = pq.read_table(old).slice(0, 2)
    pq.write_table(table, tmp_path / shard_name(table["id"].to_pylist(), "rest"))
    shard(tmp_path, [3], 1, token="retry")
    output(tmp_path).held()
    assert rows_of(tmp_path) == {f"{i:032x}": START + timedelta(minutes=i == 3) for i in (1, 2, 3)}


def test_a_whole_output_is_marked_lists_what_failed_and_is_read_quickly_again(tmp_path: Path) -> None:
    mine = output(tmp_path)
    token = mine.claim(replace=False)
    kept, _ = shard(tmp_path, [1, 2], 0), shard(tmp_path, [3, 4], 0, "decode")
    (tmp_path / f"part-{'0' * 24}.parquet.1234.tmp").write_text("half")
    held = mine.held()
    assert held.counts() == {"ok": 2, "fetch": 0, "decode": 2, "limit": 0, "model": 0}
    mine.commit({"rows": 4}, held, token)
    assert json.loads((tmp_path / SUCCESS).read_text()) == {"rows": 4}
    failed = read_table(str(tmp_path / FAILED)).to_pylist()
    assert [(row["id"], row["status"], row["error"]) for row in failed] == [(f"{i:032x}", "decode", "a reason") for i in (3, 4)]
    assert not list(tmp_path.glob("*.tmp"))
    content = kept.read_bytes()
    kept.write_bytes(b"not looked into again")
    assert sorted(output(tmp_path).held().key) == sorted(held.key)
    kept.unlink()
    assert len(output(tmp_path).held().key) == 2  # what is gone is missing, whatever the index says
    kept.write_bytes(content)
    shard(tmp_path, [5], 1)
    assert len(output(tmp_path).held().key) == 5
    (tmp_path / INDEX).unlink()
    assert len(output(tmp_path).held().key) == 5


def test_rows_of_two_models_never_mix(tmp_path: Path) -> None:
    output(tmp_path).claim(replace=False)
    path = shard(tmp_path, [1], 0)
    output(tmp_path).claim(replace=False)
    for other in ({"model_digest": "c" * 64}, {"config_digest": "c" * 64}, {"kind": "ScoreImages"}):
        with pytest.raises(InputError, match=f"{next(iter(other)).replace('_', ' ')}.*--replace"):
            output(tmp_path, **other).claim(replace=False)
    assert path.exists()
    output(tmp_path, model_digest="c" * 64).claim(replace=True)
    assert [p.name for p in tmp_path.iterdir()] == [RUN]
    (tmp_path / "notes.txt").write_text("a user's")
    with pytest.raises(InputError, match=r"notes\.txt, which is no output"):
        output(tmp_path, model_digest="d" * 64).claim(replace=True)


def test_a_process_that_outlived_its_run_writes_nothing(tmp_path: Path) -> None:
    token = output(tmp_path).claim(replace=False)
    require_token(str(tmp_path), token)
    output(tmp_path).claim(replace=False)  # the next run
    with pytest.raises(RaysalError, match="another run took this output over"):
        require_token(str(tmp_path), token)
    (tmp_path / RUN).unlink()
    with pytest.raises(RaysalError, match="or removed it"):
        require_token(str(tmp_path), token)


def test_a_run_that_was_overtaken_deletes_nothing_of_the_next_one(tmp_path: Path) -> None:
    first = output(tmp_path)
    token = first.claim(replace=False)
    shard(tmp_path, [1, 2], 0)
    held = first.held()
    output(tmp_path).claim(replace=False)  # the next run, whose shard the first does not know
    theirs = shard(tmp_path, [3, 4], 1, token="next")
    with pytest.raises(RaysalError, match="another run took this output over"):
        first.commit({"rows": 2}, held, token)
    assert theirs.exists() and not (tmp_path / SUCCESS).exists()


def test_who_a_folder_belongs_to_may_be_lost_but_is_not_guessed(tmp_path: Path) -> None:
    output(tmp_path).claim(replace=False)
    kept = shard(tmp_path, [1], 0)
    for damaged in ("{", "[]", ""):
        (tmp_path / RUN).write_text(damaged)
        with pytest.raises(InputError, match="nobody knows the model; name another folder, or drop its rows with --replace"):
            output(tmp_path).claim(replace=False)
    assert kept.exists()


def test_coverage_is_the_mean_share_of_pixels_that_have_a_class(tmp_path: Path) -> None:
    mine = output(tmp_path)
    token = mine.claim(replace=False)
    assert mine.held().coverage() is None
    for n, shares in enumerate(([0.0, 0.5], [1.0, None])):
        path = shard(tmp_path, [2 * n, 2 * n + 1], 0)
        table = pq.read_table(path)
        place = table.schema.get_field_index("abstained")
        pq.write_table(table.set_column(place, "abstained", pa.array(shares, pa.float32())), path)
    assert mine.held().coverage() == pytest.approx(0.5)
    mine.commit({}, mine.held(), token)
    assert mine.held().coverage() == pytest.approx(0.5)  # from the index
