"""What a submission tells its job, by environment variables."""

from __future__ import annotations

import os
import platform

import raysal
from raysal.errors import InputError

JOB_CPUS = "RAYSAL_JOB_CPUS"
"""How many logical CPUs the job's own process holds: the work that it starts can't have them."""

JOB_MEMORY = "RAYSAL_JOB_MEMORY"
"""How many bytes of memory it books."""

CLIENT = "RAYSAL_CLIENT"
"""Python and raysal of whoever submitted: the command line was checked there, by that raysal."""


def programs() -> str:
    """Python without its last number, and raysal, of this process."""
    return f"Python {'.'.join(platform.python_version_tuple()[:2])}, raysal {raysal.__version__}"


def check_client() -> None:
    """Raises InputError in a job that was submitted by another Python or raysal than this process runs."""
    theirs, mine = os.environ.get(CLIENT), programs()
    if theirs and theirs != mine:
        raise InputError(
            f"submitted by {theirs}, but the cluster has {mine}; install the cluster's where you submit, or update its image "
            "(another raysal of the same Python can come along: raysal submit --wheel FILE)"
        )
