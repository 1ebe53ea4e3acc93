"""The report of a run: one self-contained HTML page, and its figures as PNG files beside it."""

from raysal.report.page import build

__all__ = ["build"]
