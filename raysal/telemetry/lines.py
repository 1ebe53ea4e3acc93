"""What a command says, as JSON lines for those who gather logs by machine (`compute.log_json`)."""

from __future__ import annotations

import json
import logging
import os

import ray

LOG = logging.getLogger("raysal")


def submission_id() -> str:
    """The id under which a cluster was given this process as a job; empty where it was started otherwise."""
    told = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    return str((told.get("metadata") or {}).get("job_submission_id", ""))


class JsonLines(logging.Formatter):
    """One JSON object a record, with the names that Ray's own JSON logs have.

    Args:
        run: Folder that the command writes to.
    """

    def __init__(self, run: str) -> None:
        super().__init__()
        self.about = {"run": run, "submission_id": submission_id()}

    def format(self, record: logging.LogRecord) -> str:
        if ray.is_initialized():
            self.about["job_id"] = ray.get_runtime_context().get_job_id()
        line = {"asctime": self.formatTime(record), "levelname": record.levelname, "message": record.getMessage(), **self.about}
        if record.exc_info:
            line["exc_text"] = self.formatException(record.exc_info)
        text = json.dumps(line | getattr(record, "fields", {}), default=str)
        return json.dumps(json.loads(text, parse_constant=lambda _: None))  # JSON has no NaN and no infinity


def json_lines(run: str) -> logging.Logger:
    """raysal's logger, whose records go to stderr as JSON from now on."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines(run))
    LOG.handlers, LOG.propagate = [handler], False  # Ray's handler of the root logger would write each once more
    LOG.setLevel(logging.INFO)
    return LOG
