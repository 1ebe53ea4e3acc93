"""Bytes at any fsspec URI: local paths, ``s3://``, ``gs://``, ``memory://`` and the rest."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import posixpath
import uuid
from collections.abc import Iterator
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from raysal.errors import ImageError, InputError, RaysalError


def open_fs(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URI and the path inside it.

    Raises:
        InputError: The URI's scheme is unknown, or its driver is not installed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(os.fspath(uri))
    except (ValueError, ImportError) as error:
        raise InputError(f"{uri}: no file system for this URI ({error}); install its driver, for example s3fs for s3://") from error
    return fs, path


def is_local(uri: str) -> bool:
    """Whether the URI is a path on this machine."""
    return isinstance(open_fs(uri)[0], LocalFileSystem)


def absolute(uri: str) -> str:
    """The canonical form: absolute for local paths, scheme and path elsewhere."""
    fs, path = open_fs(uri)
    return path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)


def join(base: str, *parts: str) -> str:
    """Joins with forward slashes, whatever the scheme."""
    return posixpath.join(base.rstrip("/") or "/", *parts)


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = open_fs(uri)
    return bool(fs.exists(path))


def list_names(uri: str) -> list[str]:
    """Sorted names directly under a folder; empty where there is no such folder."""
    fs, path = open_fs(uri)
    try:
        return sorted(posixpath.basename(p.rstrip("/")) for p in fs.ls(path, detail=False, refresh=True))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except TypeError:  # a file system whose ls knows no refresh
        return sorted(posixpath.basename(p.rstrip("/")) for p in fs.ls(path, detail=False))


def read_bytes(uri: str) -> bytes:
    """A whole small file. Raises FileNotFoundError or OSError as fsspec does."""
    fs, path = open_fs(uri)
    data: Any = fs.cat_file(path)
    return bytes(data)


def fetch_image(uri: str, max_bytes: int) -> bytes:
    """The bytes of one image of an archive.

    Raises:
        ImageError: status ``limit`` where the file is larger than max_bytes, ``fetch`` where it can't be had.
    """
    try:
        fs, path = open_fs(uri)
        with fs.open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except ImageError:
        raise
    except Exception as error:  # drivers raise their own types; every one means that the bytes are not to be had
        raise ImageError("fetch", f"{uri}: {type(error).__name__}: {error}") from error
    if len(data) > max_bytes:
        raise ImageError("limit", f"{uri}: more than {max_bytes} bytes; raise data.max_bytes if such files are wanted")
    return bytes(data)


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


def remove_tree(uri: str) -> None:
    """Deletes a folder and all below it; quietly nothing where there is none."""
    fs, path = open_fs(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)
