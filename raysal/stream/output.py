"""The folder that scoring and labeling write to: whose it is, what it holds, and how runs add to it without losing or doubling a row.

A folder belongs to one model and one configuration (``_RUN.json``) and grows by runs. A shard is written whole or not at all, so the
shards that are there are what is done, whatever became of the runs that wrote them. Where an id has two rows (an image that was tried
again, a process that outlived its run), the newest stays. ``_SUCCESS`` is written last; images that failed are listed once more in
``_failed.pq``, which is a manifest.
"""

from __future__ import annotations

import json
import re
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from raysal.archive.tables import TIME, read_table, write_table
from raysal.archive.uris import exists, join, list_names, read_record, remove_tree, write_bytes
from raysal.errors import InputError
from raysal.model.engines import EAGER, Runtime
from raysal.stream.worker import RUN, STATUSES, require_token, shard_name

SUCCESS = "_SUCCESS"
"""Written last: a folder without it is not a whole output."""

FAILED = "_failed.pq"
"""The images whose status is not ok, with the reason; to be looked at, mended, and fed back. Parquet, but not for who reads *.parquet."""

TRUST = "_trust.json"
"""How far masks can be trusted, as far as it is known."""

INDEX = "_rows.pq"
"""What the shards of the last whole output hold, so that a run that adds a few images need not look into all of them."""

SHARD = re.compile(r"part-[0-9a-f]{24}\.parquet$")
OURS = re.compile(
    r"part-[0-9a-f]{24}\.parquet|_SUCCESS|_RUN\.json|_failed\.pq|_rows\.pq|_trust\.json|\.raysal-probe-.*|_attempt-part-[0-9a-f]{24}\.parquet\.json"
)
"""Names of the files that a run leaves in its folder, and may delete there; temporary names continue them."""

KEPT = (SUCCESS, FAILED, INDEX, RUN, TRUST)
"""Files beside the shards that a whole output has."""

READERS = 16
"""Shards that are looked into at once; they mostly wait for the store."""


Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""key, status, time, abstained and shard of `Held`."""


def made_by(uri: str) -> Runtime:
    """What computed the rows of a folder; eager float32 where it does not say, as for a table from elsewhere."""
    return Runtime.of(read_record(join(uri, RUN)).get("runtime", str(EAGER)))


@dataclass(frozen=True)
class Held:
    """The rows of a folder; 25 bytes a row in memory.

    Attributes:
        shards: Names of the files.
        key: uint64 [n], see `keys`.
        status: int8 [n], index into STATUSES.
        time: int64 [n] microseconds, when the row was made.
        abstained: float32 [n], share of an image's pixels without a class; nan where the row does not say.
        shard: int32 [n], index into shards.
    """

    shards: tuple[str, ...]
    key: np.ndarray
    status: np.ndarray
    time: np.ndarray
    abstained: np.ndarray
    shard: np.ndarray

    @property
    def good(self) -> np.ndarray:
        """bool [n]: status ok."""
        return self.status == STATUSES.index("ok")

    @property
    def twice(self) -> np.ndarray:
        """int64 [k]: the rows whose id has a newer one."""
        order = np.lexsort((self.shard, -self.time, self.key))
        return order[1:][self.key[order][1:] == self.key[order][:-1]]  # all but the first row of each key

    def counts(self) -> dict[str, int]:
        """Rows by status; every status is named."""
        return dict(zip(STATUSES, np.bincount(self.status, minlength=len(STATUSES)).tolist(), strict=True))

    def coverage(self) -> float | None:
        """Mean over images of the share of their pixels that have a class; None where no row says."""
        said = self.abstained[np.isfinite(self.abstained)]
        return float(1 - said.mean(dtype=np.float64)) if len(said) else None


EMPTY = Held((), np.empty(0, np.uint64), np.empty(0, np.int8), np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int32))


class Output:
    """A folder of shards.

    Args:
        uri: The folder; it need not be there.
        schema: Of its rows.
        identity: What decides rows: runs that differ in it do not mix.
    """

    def __init__(self, uri: str, schema: pa.Schema, identity: dict[str, str]) -> None:
        self.uri, self.schema, self.identity = uri, schema, identity
        self._time = next(field.name for field in schema if field.type == TIME)

    def claim(self, replace: bool) -> str:
        """Makes the folder this run's own. Returns the token by which actors know that it still is.

        Args:
            replace: Delete what another model or configuration wrote there.

        Raises:
            InputError: The folder holds anything that no run wrote, or rows of another model or configuration.
        """
        if not self.mine(replace):
            names = list_names(self.uri)
            # The marker first: a run that dies here must not leave it beside half an output. What says whose the rest is goes last.
            for name in sorted(names, key=lambda n: (n != SUCCESS, n == RUN)):
                remove_tree(join(self.uri, name))
        token = uuid.uuid4().hex
        write_bytes(join(self.uri, RUN), json.dumps(self.identity | {"token": token}, indent=1).encode())
        return token

    def mine(self, replace: bool) -> bool:
        """Whether what the folder holds, if anything, is of this model and configuration. Changes nothing; raises as `claim` does."""
        names = list_names(self.uri)
        if others := [n for n in names if not OURS.match(n)]:
            raise InputError(
                f"{self.uri}: holds {', '.join(others[:3])}, which is no output of scoring or labeling; name an empty or new folder"
            )
        known = read_record(join(self.uri, RUN)) if RUN in names else {}  # damaged: nobody's, until --replace
        if not names or {k: v for k, v in known.items() if k != "token"} == self.identity:
            return True
        if not replace:
            raise InputError(f"{self.uri}: {self._difference(known)}; name another folder, or drop its rows with --replace")
        return False

    def held(self) -> Held:
        """What the shards hold, every id once: of two rows the newer stays. Raises InputError where a shard can't be read."""
        found = self.read()
        again = found.twice
        if not len(again):
            return found
        for shard in np.unique(found.shard[again]):
            mine = np.flatnonzero(found.shard == shard)
            self._shrink(found.shards[shard], ~np.isin(mine, again))
        return self.read()

    def open(self) -> None:
        """Takes the marker away: from here on the folder is unfinished."""
        remove_tree(join(self.uri, SUCCESS))

    def commit(self, summary: dict[str, Any], found: Held, token: str) -> None:
        """Lists what failed, remembers what is where, removes what dead processes left, and marks the folder as whole.

        Args:
            summary: What the marker says.
            found: The folder's rows as they are now.
            token: From `claim`.

        Raises:
            RaysalError: Another run has claimed the folder since; what it wrote stays.
        """
        require_token(self.uri, token)
        bad = [self._failures(found.shards[shard]) for shard in np.unique(found.shard[~found.good])]
        remove_tree(join(self.uri, FAILED))
        if bad:
            write_table(join(self.uri, FAILED), pa.concat_tables(bad))
        names = pa.DictionaryArray.from_arrays(found.shard, pa.array(found.shards, pa.string()))
        rows = {"shard": names, "key": found.key, "status": found.status, "time": found.time, "abstained": found.abstained}
        write_table(join(self.uri, INDEX), pa.table(rows))
        strange = [n for n in list_names(self.uri) if n not in found.shards and n not in KEPT]
        require_token(self.uri, token)  # after the listing: what another run writes from now on is not in it
        for name in strange:
            remove_tree(join(self.uri, name))
        write_bytes(join(self.uri, SUCCESS), (json.dumps(summary, indent=2) + "\n").encode())

    def _failures(self, shard: str) -> pa.Table:
        table = read_table(join(self.uri, shard), ["id", "uri", "status", "error"])
        return table.filter(pc.not_equal(table["status"], "ok")).replace_schema_metadata()

    def read(self) -> Held:
        """As `held`, and changes nothing: an id may have two rows."""
        shards = tuple(n for n in list_names(self.uri) if SHARD.match(n))
        known = self._known(shards)
        seen = {shards[i] for i in np.unique(known[-1])}
        new = [(i, name) for i, name in enumerate(shards) if name not in seen]
        with ThreadPoolExecutor(READERS) as threads:
            parts = [known, *threads.map(lambda one: self._rows_of(*one), new)]
        return Held(shards, *(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _known(self, shards: tuple[str, ...]) -> Columns:
        """The rows of shards that were there when the last run ended; shards never change."""
        place = {name: i for i, name in enumerate(shards)}
        try:
            table = read_table(join(self.uri, INDEX)) if exists(join(self.uri, INDEX)) else None
        except InputError:  # damaged; the shards themselves say the same
            table = None
        if table is None or "abstained" not in table.column_names:
            return EMPTY.key, EMPTY.status, EMPTY.time, EMPTY.abstained, EMPTY.shard
        names = table["shard"].combine_chunks().dictionary_encode() if table.num_rows else None
        there = np.array([place.get(n, -1) for n in (names.dictionary.to_pylist() if names is not None else [])], np.int32)
        shard = there[names.indices.to_numpy()] if names is not None else np.empty(0, np.int32)
        key, status, time, abstained = (table[c].to_numpy()[shard >= 0] for c in ("key", "status", "time", "abstained"))
        return key, status, time, abstained, shard[shard >= 0]

    def _rows_of(self, index: int, shard: str) -> Columns:
        says = "abstained" in self.schema.names
        table = read_table(join(self.uri, shard), ["id", "status", self._time, *(["abstained"] if says else [])])
        status = pc.index_in(table["status"], pa.array(STATUSES)).to_numpy().astype(np.int8)
        abstained = table["abstained"].to_numpy().astype(np.float32) if says else np.full(len(table), np.nan, np.float32)
        return keys(table["id"]), status, table[self._time].cast(pa.int64()).to_numpy(), abstained, np.full(len(table), index, np.int32)

    def _shrink(self, shard: str, keep: np.ndarray) -> None:
        """Takes rows out of a shard: the rest under a new name first, then the old file goes. Cut off between, it is done again."""
        if keep.any():
            table = read_table(join(self.uri, shard)).filter(pa.array(keep))
            write_table(join(self.uri, shard_name(table["id"].to_pylist(), uuid.uuid4().hex)), table.cast(self.schema))
        remove_tree(join(self.uri, shard))

    def _difference(self, known: dict[str, str]) -> str:
        if not known:
            return "holds rows of which nobody knows the model"
        name = next((k for k in self.identity if known.get(k) != self.identity[k]), "kind")
        return f"holds rows of another run ({name.replace('_', ' ')} {str(known.get(name))[:16]}, now {self.identity.get(name, '-')[:16]})"


def keys(ids: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """uint64 [n]: a hash of each id. Two of 22 million ids meet once in 80,000 archives; a run notices it by its number of rows."""
    hashed: np.ndarray = pd.util.hash_array(ids.to_numpy(zero_copy_only=False).astype(object), categorize=False)
    return hashed
