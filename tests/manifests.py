"""What tests of manifests share."""

from __future__ import annotations

import json
from pathlib import Path

from raysal.archive.entries import Entry, Tally
from raysal.archive.listing import open_place
from raysal.archive.tables import read_table
from raysal.archive.uris import read_bytes, write_bytes

NAVCAM = "NLB_516721703EDR_{}0540992CCAM15900M1.JPG"
"""A product of Navcam; F for a full frame, T for a thumbnail, and so on."""


def fill(root: str, *names: str, data: bytes = b"x") -> str:
    """Writes small files. Returns the root."""
    for name in names:
        write_bytes(f"{root}/{name}", data)
    return root


def uris(manifest: str) -> list[str]:
    return list(read_table(manifest, ["uri"])["uri"].to_pylist())


def record(manifest: str) -> dict:
    return dict(json.loads(read_bytes(f"{manifest}/_INDEX.json")))


def rows_in(manifest: Path) -> list[tuple[str, str]]:
    return sorted((row["uri"], row["id"]) for row in read_table(str(manifest), ["uri", "id"]).to_pylist())


def listed(uri: str) -> tuple[list[Entry], Tally]:
    """What a place holds, and what of it was left out."""
    tally, place = Tally(), open_place(uri)
    return [e for e in place.complete(list(place.entries(tally)), tally) if e is not None], tally
