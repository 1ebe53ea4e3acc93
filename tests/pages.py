"""Reading the pages of reports."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
"""A name that would run code where text became markup."""


class Page(HTMLParser):
    """Tags with their attributes, and visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def survey_html(folder: Path) -> str:
    """The page of a folder of labels or scores, where it lies by default."""
    return (folder.parent / f"{folder.name}-report" / "index.html").read_text(encoding="utf-8")


def survey_text(folder: Path) -> str:
    """Its visible text on one line."""
    return " ".join(Page(survey_html(folder)).text.split())
