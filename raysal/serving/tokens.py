"""Who may ask: bearer tokens, or without any, this machine alone."""

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path

from raysal.errors import InputError
from raysal.serving.problems import Problem

ENVIRONMENT = "RAYSAL_TOKENS"
SHORTEST = 16
FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")
"""Headers of proxies: behind one, every client seems to be on this machine."""

HOW = (
    "send 'Authorization: Bearer TOKEN'; the operator makes tokens with 'openssl rand -hex 24', one a line in the file that tokens_file "
    f"names, or in the environment variable {ENVIRONMENT}"
)


class Tokens:
    """The tokens that are good now. Several may be, so that one can be replaced by another without a gap.

    Args:
        file: One token a line; empty lines and lines that begin with # do not count. Read again whenever it changes.
        environment: Of the process.

    Raises:
        InputError: The file can't be read, or a token is shorter than 16 characters.
    """

    def __init__(self, file: str | None, environment: Mapping[str, str] = os.environ) -> None:
        self.file = Path(file) if file else None
        self._fixed = _hashes([t.strip() for t in environment.get(ENVIRONMENT, "").split(",") if t.strip()], ENVIRONMENT)
        self._seen: tuple[int, int, int] | None = None
        self._of_file: list[bytes] = []
        self._read()

    @property
    def wanted(self) -> bool:
        """Whether every client needs a token."""
        return self.file is not None or bool(self._fixed)

    def check(self, headers: Mapping[str, str], client: str | None, proxied: bool) -> None:
        """Lets a request pass.

        Args:
            headers: Of the request, names in lower case.
            client: Its address, as far as it is known.
            proxied: Whether the address is that of a proxy on this machine, and so says nothing.

        Raises:
            Problem: 401.
        """
        if not self.wanted:
            if proxied or not _is_here(client) or any(name in headers for name in FORWARDED) or not _names_here(headers.get("host", "")):
                raise _refusal(f"without tokens only clients on the machine itself are answered; {HOW}")
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise _refusal(f"this endpoint needs a token: {HOW}")
        given, found = _hash(token.strip()), False
        for known in (*self._fixed, *self._read()):
            found |= hmac.compare_digest(given, known)  # all of them, so that time tells nothing
        if not found:
            raise _refusal("the token is not one of this endpoint's; ask the operator for the current one")

    def _read(self) -> list[bytes]:
        if self.file is None:
            return []
        try:
            stat = self.file.stat()
            seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if seen != self._seen:
                found = _hashes(tokens_in(self.file.read_text(encoding="utf-8")), str(self.file))
                self._seen, self._of_file = seen, found
        except (OSError, UnicodeDecodeError) as error:
            if self._seen is None:
                raise InputError(f"tokens_file {self.file}: can't be read ({error}); give a file with one token a line") from error
        except InputError:
            if self._seen is None:  # a file that is being written does not lock everybody out
                raise
        return self._of_file


def tokens_in(text: str) -> list[str]:
    """The tokens of a file's text: one a line, without empty lines and those that begin with #."""
    return [line for line in map(str.strip, text.splitlines()) if line and not line.startswith("#")]


def _refusal(title: str) -> Problem:
    return Problem(401, title, "token", {"WWW-Authenticate": 'Bearer realm="raysal"'})


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _hashes(tokens: list[str], where: str) -> list[bytes]:
    for token in tokens:
        if len(token) < SHORTEST:
            raise InputError(f"{where}: a token of {len(token)} characters can be guessed; take {SHORTEST} or more: openssl rand -hex 24")
    return [_hash(token) for token in tokens]


def _is_here(client: str | None) -> bool:
    try:
        return client is not None and ipaddress.ip_address(client).is_loopback
    except ValueError:
        return False


def _names_here(host: str) -> bool:
    """Whether the client meant this machine: a name that merely resolves to it (DNS rebinding) is no such one."""
    name = host.rsplit(":", 1)[0] if host.count(":") == 1 or host.startswith("[") else host
    return name.strip("[]").lower() == "localhost" or _is_here(name.strip("[]"))
