"""Which files a manifest holds, kept on disk: telling new from known must not fill the memory."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import tempfile
from collections.abc import Iterable
from types import TracebackType

from raysal.errors import ResourceError

CACHE_KB = 16 * 1024
"""Of the database in memory; the rest is on disk."""

UNSEEN, SAME, CHANGED, NEW = range(4)
"""States of a file: in the manifest and not met by this run so far, met as it was, met with other content, not in the manifest."""


class Known:
    """URIs and ids, by hashes of 16 bytes, in a database of this process alone.

    A context manager; leaving it deletes the database. The folder is the system's for temporary files (TMPDIR moves it) and takes
    about 80 bytes a file.
    """

    def __enter__(self) -> Known:
        self._folder = tempfile.TemporaryDirectory(prefix="raysal-index-")
        self._db = sqlite3.connect(os.path.join(self._folder.name, "known.db"), isolation_level=None)
        for setting in ("journal_mode=OFF", "synchronous=OFF", f"cache_size=-{CACHE_KB}", "locking_mode=EXCLUSIVE"):
            self._db.execute(f"PRAGMA {setting}")  # nothing here outlives the process
        self._db.execute("CREATE TABLE known (uri BLOB PRIMARY KEY, id BLOB NOT NULL, state INTEGER NOT NULL) WITHOUT ROWID")
        self._db.execute("BEGIN")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._db.close()
        self._folder.cleanup()
        if isinstance(error, sqlite3.OperationalError) and "full" in str(error):
            raise ResourceError(f"{self._folder.name}: no space left for temporary files; free some, or move them by TMPDIR") from error

    def add(self, rows: Iterable[tuple[str, str]]) -> None:
        """Adds (uri, id) of a manifest's rows as not met yet."""
        self._db.executemany("INSERT OR REPLACE INTO known VALUES (?, ?, ?)", ((_key(u), bytes.fromhex(i), UNSEEN) for u, i in rows))

    def meet(self, uri: str, id_: str) -> int | None:
        """Notes a file that was met: SAME, CHANGED or NEW; None where this run has met it before."""
        key, content = _key(uri), bytes.fromhex(id_)
        found = self._db.execute("SELECT id, state FROM known WHERE uri = ?", (key,)).fetchone()
        if found is None:
            self._db.execute("INSERT INTO known VALUES (?, ?, ?)", (key, content, NEW))
            return NEW
        if found[1] != UNSEEN:
            return None
        state = SAME if found[0] == content else CHANGED
        self._db.execute("UPDATE known SET state = ? WHERE uri = ?", (state, key))
        return state

    def keep(self, uri: str) -> None:
        """Notes that a file is there although nobody wants it any more: what the manifest has of it stays."""
        self._db.execute("UPDATE known SET state = ? WHERE uri = ? AND state = ?", (SAME, _key(uri), UNSEEN))

    def state(self, uri: str) -> int | None:
        """What is known of a file; None where nothing is."""
        found = self._db.execute("SELECT state FROM known WHERE uri = ?", (_key(uri),)).fetchone()
        return None if found is None else int(found[0])


def _key(uri: str) -> bytes:
    return hashlib.sha256(uri.encode()).digest()[:16]
