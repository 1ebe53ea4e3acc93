"""The folder of a manifest: whose it is, what a killed run left in it, and how a run's work becomes visible.

A run writes its shards under hidden names, then a plan, then carries the plan out: renames the shards, removes what is empty,
writes the record. A run that dies before its plan has changed nothing; one that dies after it is finished by the next run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raysal.archive.entries import cause_of
from raysal.archive.uris import exists, join, list_names, move, open_fs, read_bytes, remove_tree, store_errors, write_bytes
from raysal.errors import InputError

RECORD, PLAN = "_INDEX.json", "_PLAN.json"
OUR_PARTS = re.compile(r"_new-part-\d{4}-\d{5}\.parquet(\.[0-9a-f]{8}\.tmp)?|_(INDEX|PLAN)\.json\.[0-9a-f]{8}\.tmp")
"""Names of what a run leaves that does not come to its end; nothing else is ever swept away."""
HIDDEN = "_new-"
"""Begins the names of shards that are not part of the manifest yet; readers of Parquet folders pass them over."""
VERSION = 1


def refuse_others(out: str) -> None:
    """Raises InputError where the folder holds something that is no manifest."""
    fs, path = open_fs(out)
    try:
        with store_errors(out):
            is_file = fs.isfile(path)
        names = [n for n in list_names(out) if not n.startswith(".") and not OUR_PARTS.fullmatch(n)]
    except (OSError, ValueError) as error:  # a store that can't be written to, a name that can't be one
        raise InputError(f"{out}: can't be a manifest's folder ({cause_of(error)}); name another place") from error
    if is_file:
        raise InputError(f"{out}: is a file; name a folder for the manifest")
    if names and not {RECORD, PLAN} & set(names):
        raise InputError(f"{out}: holds {', '.join(names[:3])} and no {RECORD}, so it is no manifest; name an empty or new folder")


def claim(out: str) -> dict[str, Any]:
    """Finishes or sweeps away what a killed run left, and reads the record of a manifest; an empty one for a new folder.

    Raises:
        InputError: The folder holds something else, or a manifest that is not whole.
    """
    refuse_others(out)
    if exists(join(out, PLAN)):
        _carry_out(out)
    sweep(out)
    names = set(list_names(out))
    if RECORD not in names:
        return {"run": -1, "shards": {}}
    try:
        record = json.loads(read_bytes(join(out, RECORD)))
        version, shards = record["version"], record["shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{out}: its {RECORD} is damaged ({error}); index into a new folder") from error
    if version > VERSION:
        raise InputError(f"{out}: a manifest of version {version}, this raysal writes {VERSION}; upgrade raysal")
    there = {n for n in names if n.endswith(".parquet")}
    if strange := sorted(there ^ set(shards)):
        what = "is missing" if strange[0] in shards else "was not written by raysal index"
        raise InputError(f"{out}: {strange[0]} {what}; put that right, or index into a new folder")
    return {"run": record["run"], "shards": shards}


def publish(out: str, staged: Sequence[str], remove: Sequence[str], record: dict[str, Any]) -> None:
    """Makes a run's work visible: all of it, also where this process dies half-way and the next run goes on.

    Args:
        out: Folder of the manifest.
        staged: Shards that lie there under hidden names.
        remove: Shards of which nothing is left.
        record: What `_INDEX.json` will say.
    """
    plan = {"publish": list(staged), "remove": list(remove), "record": record}
    write_bytes(join(out, PLAN), json.dumps(plan, indent=1).encode())
    _carry_out(out)


def _carry_out(out: str) -> None:
    """Does what a plan says; done twice it does nothing more."""
    plan = json.loads(read_bytes(join(out, PLAN)))
    for name in plan["publish"]:
        move(join(out, HIDDEN + name), join(out, name))
    for name in plan["remove"]:
        remove_tree(join(out, name))
    write_bytes(join(out, RECORD), (json.dumps(plan["record"], indent=1) + "\n").encode())
    remove_tree(join(out, PLAN))


def sweep(out: str, all_of_it: bool = False) -> None:
    """Removes what a run left that never came to its plan, and the folder where there was none before."""
    if exists(join(out, PLAN)):
        return
    for name in filter(OUR_PARTS.fullmatch, list_names(out)):
        remove_tree(join(out, name))
    if all_of_it and not [n for n in list_names(out) if n != ".lock"]:
        remove_tree(out)


def batches(out: str, name: str, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    """A shard in parts. Raises InputError where it is damaged."""
    fs, path = open_fs(join(out, name))
    try:
        with fs.open(path, "rb") as file:
            yield from pq.ParquetFile(file).iter_batches(8192, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{out}: {name} is damaged ({error}); index into a new folder") from error
