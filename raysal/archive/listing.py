"""Lists the images of a place: folders of any fsspec store, zip files, web pages of links, single files, lists of URIs.

Entries stream: local folders and S3 are never held in memory, of other stores one folder at a time is. What can't be read is
noted in a `Tally` and passed over; only a place that can't be listed at all is an error.
"""

from __future__ import annotations

import os
import posixpath
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

import fsspec
from fsspec.archive import AbstractArchiveFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.zip import ZipFileSystem

from raysal.archive.entries import IMAGES, LABELED, Entry, Tally, cause_of, entry_of, utc
from raysal.archive.fetch import patiently, status_of
from raysal.archive.lists import LISTS, list_entries
from raysal.archive.uris import canonical
from raysal.errors import InputError, RaysalError

SORTED = 50_000
"""Files of one local folder that are sorted together: order where it costs nothing, bounded memory where a folder is huge."""
TOGETHER = 1000
"""Objects of an S3 listing that are held to find labels beside images."""
DEEPEST = 64
"""Folders below folders of a remote store; a listing that leads deeper leads in circles."""
ASKED_AT_ONCE, ASKED_FOR_S = 16, 30.0
"""Requests for the size of files that a web page's listing does not tell, and how long a busy server is asked for one."""


@dataclass(frozen=True)
class Place:
    """Where images are listed.

    Attributes:
        uri: Canonical; of a folder without a slash at its end.
        how: ``local``, ``archive`` (zip, tar), ``s3``, ``store`` (any other), ``file`` or ``list``.
        fs: Its file system.
        path: Inside it.
    """

    uri: str
    how: str
    fs: Any
    path: str

    @property
    def on_the_web(self) -> bool:
        """Whether this is a page of links, or one file at a web address."""
        return self.how in ("store", "file") and self.uri.startswith(("http://", "https://"))

    @property
    def root(self) -> str:
        """Folder of the whole place; for a file or a list the one that it lies in."""
        return posixpath.dirname(self.uri) if self.how in ("file", "list") else self.uri.split("::", 1)[0]

    def entries(self, tally: Tally) -> Iterator[Entry]:
        """Its images.

        Raises:
            InputError: A list can't be read as one.
            RaysalError: The store broke off.
        """
        if self.how == "list":
            return list_entries(self.fs, self.path, self.uri, tally)
        return {"local": _local, "archive": _archive, "s3": _s3, "store": _store, "file": _file}[self.how](self, tally)

    def complete(self, entries: list[Entry], tally: Tally) -> list[Entry | None]:
        """Adds what the listing could not tell: web pages name files only, so each wanted one is asked for.

        None where the server would not tell now: what is not known of a file must not read as a change of it.
        """
        if not self.on_the_web:
            return [*entries]
        with ThreadPoolExecutor(ASKED_AT_ONCE) as threads:
            answers = list(threads.map(self._ask, entries))
        for entry, answer in zip(entries, answers, strict=True):
            if isinstance(answer, Exception):
                tally.fail(entry.uri, answer)
        return [None if isinstance(answer, Exception) else answer for answer in answers]

    def holds(self, uri: str) -> bool:
        """Whether a URI lies in this place; of a list nobody can say."""
        if self.how == "list":
            return False
        if self.how == "archive":
            inner, _, outer = self.uri.partition("::")
            mine, _, other = uri.partition("::")
            return other == outer and (inner.endswith("://") or mine.startswith(f"{inner}/"))
        return uri == self.uri or uri.startswith(f"{self.uri.rstrip('/')}/")

    def _ask(self, entry: Entry) -> Entry | Exception:
        try:
            return entry_of(entry.uri, patiently(lambda: self.fs.info(entry.uri), time.monotonic() + ASKED_FOR_S))
        except Exception as error:
            # A file that is named but is not there, or not for us, stays listed: fetching it will tell why.
            return entry if status_of(error) in (401, 403, 404, 410) else error


def open_place(uri: str) -> Place:
    """Finds out what a place is, and that it is there.

    Args:
        uri: A folder of any fsspec store, an image, a zip file or a chained URI (``zip://*::s3://bucket/a.zip``), or a list of
            URIs (.txt, .csv, .parquet).

    Raises:
        InputError: Nothing there, no right to look, or a file that is none of these.
    """
    canon = canonical(uri)
    suffix = posixpath.splitext(canon)[1].lower()
    if suffix == ".zip" and "::" not in canon:
        return open_place(f"zip://::{canon}") if _there(canon) == "file" else _folder(canon)
    if suffix in (*LISTS, *IMAGES, *LABELED) and _there(canon) == "file":
        fs, path = _open(canon)
        return Place(canon, "list" if suffix in LISTS else "file", fs, path)
    return _folder(canon)


def _folder(uri: str) -> Place:
    fs, path = _open(uri)
    if isinstance(fs, LocalFileSystem):
        if os.path.isfile(path):
            raise InputError(
                f"{uri}: is neither an image nor a list of URIs ({', '.join(LISTS)}) nor a zip file; give a folder or one of these"
            )
        how = "local"
    elif isinstance(fs, AbstractArchiveFileSystem):
        how, path = "archive", path.strip("*").strip("/")
        uri = "::".join([f"{uri.partition('://')[0]}://{path}", *uri.split("::")[1:]])
    else:
        how = "s3" if hasattr(fs, "call_s3") else "store"
    place = Place(uri.rstrip("/") if not uri.endswith("://") else uri, how, fs, path)
    try:
        if how == "local":
            os.scandir(path).close()
        elif place.on_the_web:
            fs.ls(path)  # says why not, unlike exists
        elif how != "archive" and not fs.exists(path):
            raise FileNotFoundError(path)
    except Exception as error:  # drivers raise their own types; every one means that there is nothing to list
        raise InputError(f"{uri}: can't be listed ({cause_of(error)}); give a place that is there and that you may read") from error
    return place


def _there(uri: str) -> str:
    """``file``, ``folder`` or ``nothing``."""
    fs, path = _open(uri)
    try:
        if uri.startswith(("http://", "https://")):
            return "file"  # on the web every address is one
        return "folder" if fs.isdir(path) else "file" if fs.isfile(path) else "nothing"
    except Exception as error:
        raise InputError(f"{uri}: can't be read ({cause_of(error)}); give a place that is there and that you may read") from error


def _open(uri: str) -> tuple[Any, str]:
    """A file system that remembers no listings: they would fill the memory."""
    try:
        fs, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise InputError(f"{uri}: no file system for this URI ({error}); install its driver, for example s3fs for s3://") from error
    except Exception as error:  # a zip file that is none or is not there, a store that refuses at once
        raise InputError(f"{uri}: can't be opened ({cause_of(error)}); give a place that is there and that you may read") from error
    return fs, path


def _file(place: Place, tally: Tally) -> Iterator[Entry]:
    tally.files += 1
    try:
        yield entry_of(place.uri, place.fs.info(place.path))
    except Exception as error:
        tally.fail(place.uri, error)


def _local(place: Place, tally: Tally) -> Iterator[Entry]:
    root, followed = os.path.realpath(place.path), set[str]()
    stack = [place.path]
    while stack:
        folder, below = stack.pop(), []
        try:
            with os.scandir(folder) as found:
                while part := sorted(islice(found, SORTED), key=lambda item: item.name):
                    for item in part:
                        try:
                            if item.is_dir():
                                if not item.is_symlink() or _worth_following(item.path, root, followed):
                                    below.append(item.path)
                            elif (entry := _on_disk(item, tally)) is not None:
                                yield entry
                        except OSError as error:
                            tally.fail(item.path, error)
        except OSError as error:
            tally.fail(folder, error)
        stack += sorted(below, reverse=True)


def _on_disk(item: os.DirEntry[str], tally: Tally) -> Entry | None:
    if not (tally.is_image(item.path, _labeled_on_disk) and _nameable(item.path, tally)):
        return None
    about = item.stat()
    if not stat.S_ISREG(about.st_mode):  # a pipe would be waited for without end
        tally.fail(item.path, "is no regular file")
        return None
    return Entry(item.path, about.st_size, None, utc(about.st_mtime))


def _worth_following(link: str, root: str, followed: set[str]) -> bool:
    """Whether a link leads to a folder that is not listed anyway; what leads in circles is followed once at most."""
    target = os.path.realpath(link)
    inside = f"{target}/".startswith(f"{root.rstrip('/')}/") or f"{root}/".startswith(f"{target.rstrip('/')}/")
    if inside or target in followed:
        return False
    followed.add(target)
    return True


def _labeled_on_disk(stem: str) -> bool:
    return os.path.exists(f"{stem}.xml") or os.path.exists(f"{stem}.XML")


def _archive(place: Place, tally: Tally) -> Iterator[Entry]:
    scheme, outer = place.uri.partition("://")[0], place.uri.partition("::")[2]
    if isinstance(place.fs, ZipFileSystem):  # its own listing looks through all files for each folder
        infos = [
            {"name": i.filename, "size": i.file_size, "date": i.date_time, "crc": i.CRC} for i in place.fs.zip.infolist() if not i.is_dir()
        ]
    else:
        infos = [info for info in place.fs.find("", detail=True).values() if info["type"] == "file"]
    infos = [i for i in infos if not place.path or i["name"].startswith(f"{place.path}/")]
    stems = {i["name"][:-4] for i in infos if i["name"].lower().endswith(".xml")}
    for info in sorted(infos, key=lambda i: str(i["name"])):
        uri = f"{scheme}://{info['name']}::{outer}"
        if tally.is_image(info["name"], stems.__contains__) and _nameable(uri, tally, chained=True):
            yield entry_of(uri, info)


def _s3(place: Place, tally: Tally) -> Iterator[Entry]:
    """Pages of a thousand keys in order, whatever the folders: no folder is ever held, and there are the fewest requests."""
    bucket, prefix, _ = place.fs.split_path(place.path)
    prefix = f"{prefix.rstrip('/')}/" if prefix else ""

    def objects() -> Iterator[dict[str, Any]]:
        more: dict[str, str] = {}
        while True:
            try:
                page = place.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
            except Exception as error:
                raise RaysalError(f"{place.uri}: the listing broke off ({cause_of(error)}); run the same command again") from error
            yield from (o for o in page.get("Contents", ()) if not o["Key"].endswith("/"))
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    for together in _beside(objects()):
        stems = {o["Key"][:-4] for o in together if o["Key"].lower().endswith(".xml")}
        for found in together:
            uri = f"s3://{bucket}/{found['Key']}"
            if tally.is_image(found["Key"], stems.__contains__) and _nameable(uri, tally):
                yield entry_of(uri, {"size": found.get("Size"), **found})


def _beside(objects: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Objects in order of their keys, in groups that hold an image's label too: it has the image's stem, so it follows close behind.

    Keys that are equal up to the first dot of their names stay together; in long groups those of one stem do.
    """
    for _, group in groupby(objects, key=lambda o: o["Key"][: (o["Key"] + ".").index(".", o["Key"].rfind("/") + 1)]):
        together: list[dict[str, Any]] = []
        for found in group:
            if len(together) >= TOGETHER and posixpath.splitext(found["Key"])[0] != posixpath.splitext(together[-1]["Key"])[0]:
                yield together
                together = []
            together.append(found)
        yield together


def _store(place: Place, tally: Tally) -> Iterator[Entry]:
    stack = [(place.path, 0)]
    while stack:
        folder, depth = stack.pop()
        try:
            infos = sorted(place.fs.ls(folder, detail=True), key=lambda i: str(i["name"]))
        except Exception as error:  # drivers raise their own types; every one means that this folder can't be listed
            tally.fail(place.fs.unstrip_protocol(folder), error)
            continue
        stems = {i["name"][:-4] for i in infos if i["name"].lower().endswith(".xml")}
        below = []
        for info in infos:
            name = info["name"]
            last = name.rstrip("/").rpartition("/")[2]
            if name.rstrip("/") == folder.rstrip("/") or last.startswith(("?", "#")):  # a folder names itself, or how to sort it
                continue
            if info["type"] == "directory":
                below.append((name, depth + 1))
                continue
            uri = place.fs.unstrip_protocol(name)
            if tally.is_image(name, stems.__contains__) and _nameable(uri, tally):
                yield entry_of(uri, info)
        if below and depth == DEEPEST:
            tally.fail(place.fs.unstrip_protocol(folder), f"{DEEPEST} folders deep; what lies below is not listed")
        else:
            stack += reversed(below)


def _nameable(uri: str, tally: Tally, chained: bool = False) -> bool:
    """Whether a file can be named by a URI; where not, it is noted."""
    try:
        uri.encode()
    except UnicodeEncodeError:
        tally.fail(uri, "its name is no UTF-8; rename it")
        return False
    if uri.count("::") > (uri.split("::", 1)[1].count("::") + 1 if chained else 0):
        tally.fail(uri, "its name holds '::', which stands for a file inside another; rename it")
        return False
    return True
