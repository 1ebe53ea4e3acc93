"""Which row of a labels table is the newest of its image: a file that changed was labelled again, and its old row is still there."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysal.export.names import database_errors, temporary_database


class Newest:
    """Remembers the newest row of every URI, in a temporary database that spills to disk.

    Every row is shown to `see` first; then `only` leaves out those that another one superseded.
    """

    def __init__(self) -> None:
        self._superseded = False
        self._seen = temporary_database("newest (uri BLOB PRIMARY KEY, id TEXT NOT NULL, time INTEGER NOT NULL)")

    def __enter__(self) -> Newest:
        return self

    def __exit__(self, *_: object) -> None:
        self._seen.close()

    def see(self, rows: pa.RecordBatch) -> None:
        """Takes note of rows with the columns id, uri and labeled_at.

        Raises:
            InputError: There is no temporary space.
        """
        times = pc.fill_null(rows["labeled_at"].cast(pa.int64()), 0).to_pylist()
        new = [(_digest(u), i, t) for u, i, t in zip(rows["uri"].to_pylist(), rows["id"].to_pylist(), times, strict=True)]
        with database_errors():
            if self._seen.executemany("INSERT INTO newest VALUES (?, ?, ?) ON CONFLICT (uri) DO NOTHING", new).rowcount < len(new):
                self._superseded = True
                later = [(i, t, u, t) for u, i, t in new]
                self._seen.executemany("UPDATE newest SET id = ?, time = ? WHERE uri = ? AND time < ?", later)

    def only(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """The rows that no other one superseded."""
        if not self._superseded:
            return rows
        keep = self._newest(zip(rows["uri"].to_pylist(), rows["id"].to_pylist(), strict=True))
        return rows.filter(pa.array(np.fromiter(keep, bool)))

    def _newest(self, images: Iterable[tuple[str, str]]) -> Iterable[bool]:
        with database_errors():
            for uri, id_ in images:
                found = self._seen.execute("SELECT id FROM newest WHERE uri = ?", (_digest(uri),)).fetchone()
                yield found is None or found[0] == id_


def _digest(uri: str) -> bytes:
    return hashlib.blake2b(uri.encode(errors="surrogatepass"), digest_size=16).digest()
