"""Bytes at any fsspec URI: local paths, ``s3://``, ``gs://``, ``memory://`` and the rest."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import errno
import fcntl
import functools
import io
import json
import logging
import os
import posixpath
import uuid
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from raysal.archive.entries import cause_of
from raysal.errors import InputError, RaysalError

log = logging.getLogger(__name__)


def open_fs(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URI and the path inside it. It remembers no listings: they would be stale, and fill the memory.

    Raises:
        InputError: The URI's scheme is unknown, or its driver is not installed.
        RaysalError: The store does not answer, or refuses.
    """
    try:
        with store_errors(uri):
            fs, path = fsspec.core.url_to_fs(os.fspath(uri), use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise InputError(f"{uri}: no file system for this URI ({error}); install its driver, for example s3fs for s3://") from error
    except OSError as error:  # of chained URIs: the outer file is opened at once
        raise InputError(f"{uri}: can't be opened ({cause_of(error)}); give a place that is there and that you may read") from error
    return fs, path


@contextlib.contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turns what drivers raise over a store that does not answer, or refuses, into errors that say what to do.

    What they raise over a file (it is missing, it is a folder) passes.

    Raises:
        InputError: It may not be read.
        RaysalError: The store does not answer, or says no.
    """
    try:
        yield
    except (ConnectionError, TimeoutError, asyncio.TimeoutError) as error:
        raise RaysalError(f"{uri}: the store does not answer ({cause_of(error)}); run the same command again once it does") from error
    except PermissionError as error:
        raise InputError(f"{uri}: may not be read ({cause_of(error)}); ask for the right to, or give the keys that have it") from error
    except (RaysalError, OSError, ValueError, ImportError, TypeError, pa.ArrowException):
        raise
    except Exception as error:  # drivers have types of their own; NoCredentialsError, EndpointConnectionError, ClientResponseError
        raise RaysalError(f"{uri}: the store can't be used ({cause_of(error)}); mend that and run the same command again") from error


def is_local(uri: str) -> bool:
    """Whether the URI is a path on this machine."""
    return isinstance(open_fs(uri)[0], LocalFileSystem)


def absolute(uri: str) -> str:
    """The canonical form: absolute for local paths, scheme and path elsewhere."""
    fs, path = open_fs(uri)
    return path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)


def canonical(uri: str, base: str = "") -> str:
    """One spelling for each file, found without asking its store, so that two names of one file are seen to be the same.

    Local paths become absolute, without ``.``, ``..`` and doubled slashes; other schemes get their first name (``s3a`` is ``s3``).

    Args:
        uri: A path or URI, also a chained one such as ``zip://a.jpg::file.zip``.
        base: Folder that relative paths start from, a path or URI; empty for the working folder.

    Raises:
        InputError: There is no such scheme, or the host can't be understood.
    """
    if "::" in uri:
        if "[" in uri.split("::", 1)[0].rpartition("://")[2]:
            raise InputError(f"{uri}: an IPv6 address can't be told from a chain of URIs; give the host's name")
        first, rest = uri.split("::", 1)
        return f"{first if '://' in first else f'{first}://'}::{canonical(rest, base)}"
    scheme, found, path = uri.partition("://")
    if not found:
        if uri.startswith(("/", "~")) or "://" not in base:
            return os.path.normpath(os.path.join(os.path.abspath(base), os.path.expanduser(uri)))
        return canonical(join(base, uri))
    names, strip = _scheme(scheme.lower())
    if "file" in names:
        return canonical(path)
    if "http" in names:
        try:
            urlsplit(f"{scheme}://{path}")
        except ValueError as error:
            raise InputError(f"{uri}: is no web address ({error})") from error
        return f"{scheme.lower()}://{path}"
    stripped = strip(f"{names[0]}://{path}")
    return stripped if "://" in stripped else f"{names[0]}://{stripped}"


@functools.cache
def _scheme(scheme: str) -> tuple[tuple[str, ...], Callable[[str], str]]:
    """The names of a scheme, the first one first, and what its driver makes of a URI; a missing driver makes nothing of it."""
    if scheme not in fsspec.available_protocols():
        near = difflib.get_close_matches(scheme, fsspec.available_protocols(), 1)
        raise InputError(f"{scheme}://: there is no such kind of store{f'; did you mean {near[0]}://?' if near else ''}")
    try:
        kind = fsspec.get_filesystem_class(scheme)
    except ImportError:
        return (scheme,), lambda uri: uri
    names = (kind.protocol,) if isinstance(kind.protocol, str) else tuple(kind.protocol)
    return names, kind._strip_protocol


def join(base: str, *parts: str) -> str:
    """Joins with forward slashes, whatever the scheme."""
    return posixpath.join(base.rstrip("/") or "/", *parts)


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = open_fs(uri)
    with store_errors(uri):
        return bool(fs.exists(path))


def list_names(uri: str) -> list[str]:
    """Sorted names directly under a folder; empty where there is no such folder."""
    fs, path = open_fs(uri)
    try:
        with store_errors(uri):
            return sorted(posixpath.basename(p.rstrip("/")) for p in fs.ls(path, detail=False))
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_bytes(uri: str) -> bytes:
    """A whole small file. Raises FileNotFoundError or another OSError as fsspec does, and the errors of `store_errors`."""
    fs, path = open_fs(uri)
    with store_errors(uri):
        data: Any = fs.cat_file(path)
    return bytes(data)


def read_record(uri: str) -> dict[str, Any]:
    """A small JSON object that this software wrote; empty where there is none, or where it is damaged."""
    try:
        found = json.loads(read_bytes(uri))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_bytes(uri: str, data: bytes) -> None:
    """Writes a file whole or not at all: readers never see half of it.

    Local files go through a temporary name, fsync and rename; object stores put a whole object at once.

    Raises:
        InputError: The disk is full (the message says how much was asked), or nothing may or can be written there.
        RaysalError: The store does not answer.
    """
    fs, path = open_fs(uri)
    with write_errors(uri, f"for {len(data)} bytes"):
        if isinstance(fs, LocalFileSystem):
            _write_local(path, data)
        else:
            fs.pipe_file(path, data)


@contextlib.contextmanager
def write_stream(uri: str) -> Iterator[io.RawIOBase]:
    """Opens a file to write piece by piece, for what is too large to hold. It shows under its name, whole, when the block ends well.

    A local file grows under a temporary name; an object store shows an object once its upload is completed. A block that fails
    leaves nothing; a killed process leaves at most the temporary file, ``NAME.xxxxxxxx.tmp``.

    Raises:
        InputError, RaysalError: As `write_bytes`, also from the stream's ``write``.
    """
    fs, path = open_fs(uri)
    local = isinstance(fs, LocalFileSystem)
    target = f"{path}.{uuid.uuid4().hex[:8]}.tmp" if local else path
    with write_errors(uri):
        if local:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        file = open(target, "wb", buffering=2**20) if local else fs.open(path, "wb")  # noqa: SIM115 - closed or called off below
    stream = _Stream(uri, file)
    try:
        yield stream
        with write_errors(uri, f"after {stream.tell()} bytes"):
            if local:
                file.flush()
                os.fsync(file.fileno())
            file.close()
            if local:
                os.replace(target, path)
    except BaseException:
        with contextlib.suppress(Exception):  # the reason is on its way already
            _call_off(fs, file, target)
        raise


@contextlib.contextmanager
def write_errors(uri: str, needed: str = "") -> Iterator[None]:
    """Turns a failed write into the error that a user understands.

    Args:
        uri: What was written.
        needed: What there was no space for, for example "for 100 bytes".

    Raises:
        InputError, RaysalError: As `write_bytes`.
    """
    try:
        yield
    except (ConnectionError, TimeoutError) as error:
        raise RaysalError(f"{uri}: can't be written: {error}; run the same command again once the store answers") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise InputError(f"{uri}: no space left {needed}".rstrip() + "; free some and run the same command again") from error
        raise InputError(f"{uri}: can't be written: {_cause(error)}") from error
    except (RaysalError, ValueError, TypeError):
        raise
    except Exception as error:  # of the drivers, as in `store_errors`
        raise RaysalError(f"{uri}: can't be written: {cause_of(error)}; mend that and run the same command again") from error


class _Stream(io.RawIOBase):
    """A file to write from front to back, whose errors say which file it was."""

    def __init__(self, uri: str, file: Any) -> None:
        self._uri, self._file, self._size = uri, file, 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        with write_errors(self._uri, f"after {self._size} bytes"):
            self._file.write(data)
        self._size += size
        return size


def _call_off(fs: fsspec.AbstractFileSystem, file: Any, target: str) -> None:
    """Leaves nothing of a file that was not finished."""
    if isinstance(file, AbstractBufferedFile):
        file.closed = True  # closing it, or its end by garbage collection, would complete the upload
        file.discard()
        return
    try:
        file.close()
    finally:
        fs.rm_file(target)


def _write_local(path: str, data: bytes) -> None:
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def _cause(error: OSError) -> str:
    """Why a file could not be written, and what to do about it."""
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        return f"{error.filename or 'part of its path'} is a file, not a folder; name another place"
    if isinstance(error, IsADirectoryError):
        return "it is a folder; name a file in it"
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return f"{error.strerror or error}; name a place where you may write, or ask for the right to"
    return f"{error.strerror or error}; name a place where files can be made"


def move(source: str, target: str) -> None:
    """Renames a file in its store, over an older one; nothing where there is no source. Readers see either file, never half of one.

    Raises:
        InputError: It can't be written there.
    """
    fs, path = open_fs(source)
    other = open_fs(target)[1]
    with write_errors(target), contextlib.suppress(FileNotFoundError):
        if isinstance(fs, LocalFileSystem):
            os.replace(path, other)
        elif fs.exists(path):
            fs.copy(path, other)
            fs.rm(path)


@contextlib.contextmanager
def locked(folder: str, busy: str) -> Iterator[None]:
    """Keeps other processes off a local folder, which is made where it is missing; the lock ends with the process, however it ends.

    Object stores have no locks: one writer is the operator's promise there.

    Raises:
        InputError: `busy`, where another process holds the lock; or no folder can be made.
    """
    if not is_local(folder):
        yield
        return
    try:
        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, ".lock"), "a+")  # noqa: SIM115 - closed below
    except OSError as error:
        raise InputError(f"{folder}: no folder can be made there ({error.strerror}); name another one") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{folder}: {busy}") from error
        except OSError as error:  # Lustre without flock, some FUSE mounts: as object stores
            log.warning("%s: its file system has no locks (%s), so two writers at once would not be seen", folder, error.strerror)
        yield


def remove_tree(uri: str) -> None:
    """Deletes a folder and all below it; quietly nothing where there is none."""
    fs, path = open_fs(uri)
    with write_errors(uri), contextlib.suppress(FileNotFoundError):
        if fs.exists(path):
            fs.rm(path, recursive=True)
