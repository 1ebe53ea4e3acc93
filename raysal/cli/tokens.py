"""Ray's own token, for jobs and its dashboard."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from raysal.errors import ConfigError


def authenticated(starts: bool) -> None:
    """Ray's token: made for a Ray that starts here, sent where there is one. Read when Ray is imported.

    Raises:
        ConfigError: RAY_AUTH_TOKEN_PATH names no file that can be read.
    """
    token, named = Path.home() / ".ray" / "auth_token", os.environ.get("RAY_AUTH_TOKEN_PATH")
    if named and not os.access(named, os.R_OK):
        raise ConfigError(f"RAY_AUTH_TOKEN_PATH={named}: can't be read; name the file that holds the cluster's token, or unset it")
    if starts or token.exists() or os.environ.get("RAY_AUTH_TOKEN") or named:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    if token.exists():
        with suppress(OSError):  # mounted into a container it is another's, who saw to its mode
            token.chmod(0o600)  # Ray leaves it for all to read
