"""The report of a run, or of a folder of scores or labels: one self-contained HTML page, and its figures as PNG files beside it."""

from raysal.report.build import build

__all__ = ["build"]
