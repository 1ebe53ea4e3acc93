"""What tests of the whole program share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium that is on this machine."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright; pip install playwright")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium; on Debian and Ubuntu: apt install chromium")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync", "--no-first-run"]
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=program, args=quiet)
        yield chromium
        chromium.close()
