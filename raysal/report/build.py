"""Which report a folder gets, and where it is written."""

from __future__ import annotations

from raysal.archive.uris import absolute, exists, join
from raysal.errors import InputError
from raysal.report.page import build_run
from raysal.report.survey import Progress, shards_of
from raysal.report.survey_page import build_survey
from raysal.stream.worker import RUN

RUN_FILES = ("config.yaml", "run.json", "rounds")


def build(place: str, manifest: str | None = None, out: str | None = None, on_progress: Progress | None = None) -> str:
    """Writes ``index.html`` and its figures as PNG: of a run, whatever stage it has come to, or of a folder of scores or labels.

    Missing files leave gaps that the page names; damaged ones leave a note on it. A folder of scores or labels holds nothing but what
    runs wrote, so its report lies beside it.

    Args:
        place: Run folder, or folder of scores or labels, local or any fsspec URI.
        manifest: For scores and labels: the manifest of their images; the class map goes by its sols, else sites and drives, else groups.
        out: Folder to write to; None is ``report`` in a run folder, and ``FOLDER-report`` beside scores or labels.
        on_progress: For scores and labels, called as on_progress(shards read, of so many).

    Returns:
        URI of index.html.

    Raises:
        InputError: There is no such folder, it is neither, or the manifest can't be used.
    """
    uri = absolute(place).rstrip("/")
    folder = None if out is None else absolute(out)
    if any(exists(join(uri, name)) for name in RUN_FILES):
        if manifest is not None:
            raise InputError(f"{place}: is a run; a manifest belongs to a folder of scores or labels, for example {join(place, 'labels')}")
        return build_run(uri, folder or join(uri, "report"))
    if shards_of(uri) or exists(join(uri, RUN)):
        return build_survey(uri, manifest, folder or f"{uri}-report", on_progress)
    raise InputError(
        f"{place}: no run folder (no {', '.join(RUN_FILES[:2])} or {RUN_FILES[2]}/ in it) and no scores or labels (no .parquet in it); "
        "give the folder that `raysal loop`, `raysal score` or `raysal label` wrote to"
    )
