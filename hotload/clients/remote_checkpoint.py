"""Checkpoints wherever fsspec lists them with their sizes: in a bucket or on a hub, not over http.

Read by ranges and never written anywhere. An object that was replaced since it was listed is
refused: by the store where it takes an ETag with each read, else by its digest.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from fsspec.asyn import sync

from hotload.clients.redaction import leaves
from hotload.clients.store.buckets import modified_at
from hotload.clients.store.failures import (
    MISSING_BUCKET,
    answer,
    is_missing,
    is_precondition_failure,
    store_error,
)
from hotload.clients.store.store import (
    CALL_TIMEOUT_SECONDS,
    LIST_TIMEOUT_SECONDS,
    SLOWEST_BYTES_PER_SECOND,
    open_filesystem,
)
from hotload.directory.files import refuse_file, refuse_shortened
from hotload.directory.places import RemoteDirectory
from hotload.directory.remote import RemoteFile
from hotload.errors import InvalidCheckpointError, StoreUnavailableError

# What the file systems of fsspec call that which changes when a file is replaced, the surest first.
VERSIONS = (
    *("generation", "ETag", "etag", "blob_id"),
    *("mtime", "modified", "LastModified", "updated", "last_modified", "created"),
)


@dataclass(frozen=True)
class RemoteCheckpoint:
    """A directory at a URL (`hotload.directory.places.RemotePlace`), of one checkpoint or several.

    Args:
        url: without credentials.
        options: of fsspec's file system, kept out of every text.
    """

    url: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        """Return the URL."""
        return self.url

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self.url.rpartition("/")[2]

    def look(self) -> RemoteDirectory:
        """List the directory.

        Raises:
            InvalidCheckpointError: nothing is there, or it may not be listed.
            StoreUnavailableError: the network, or the store, is away.
        """
        try:
            connection = _connection(self.url, self.options)
            root = connection.filesystem._strip_protocol(self.url).rstrip("/")
            listed = connection.ask("ls", root, timeout=LIST_TIMEOUT_SECONDS, detail=True)
        except Exception as error:  # noqa: BLE001 - client libraries raise what they like
            if answer(error)[1] != MISSING_BUCKET and is_missing(error):
                self._refuse_missing()
            _refuse(error, self.url, self.options)
        files: dict[str, RemoteFile] = {}
        directories: list[str] = []
        below = [one for one in listed if one["name"].rstrip("/") != root]
        if not below and any(one["type"] == "file" for one in listed):
            expected = "a checkpoint directory"
            refuse_file("not_a_directory", self.url, "an object", expected, "caller")
        if not below:
            self._refuse_missing()
        for info in below:
            name = info["name"].rstrip("/").rpartition("/")[2]
            if info["type"] == "directory":
                directories.append(name)
            elif info.get("size") is None:  # without it nothing bounds what is read
                expected = "a store that lists sizes: http does not"
                where, said = f"{self.url}/{name}", "listed without a size"
                refuse_file("unreadable", where, said, expected, "operator")
            else:
                files[name] = _Object(
                    f"{self.url}/{name}",
                    name,
                    int(info["size"]),
                    _version(info) or secrets.token_hex(8),  # where nobody says: like no other
                    ((found := modified_at(info)) and found.timestamp()) or 0.0,
                    info["name"],
                    connection,
                )
        return RemoteDirectory(self.url, files, tuple(directories))

    def below(self, name: str) -> RemoteCheckpoint:
        """Name a directory in it."""
        return RemoteCheckpoint(f"{self.url}/{name}", self.options)

    def _refuse_missing(self) -> NoReturn:
        found, expected = "no object below it", "a checkpoint directory"
        refuse_file("missing_directory", self.url, found, expected)


class _Connection:
    """A file system, and the options that no text may show."""

    def __init__(self, filesystem: Any, options: Mapping[str, Any]) -> None:
        self.filesystem, self.options = filesystem, options

    def ask(self, name: str, *args: Any, timeout: float, **options: Any) -> Any:
        """Ask what is there now, from any thread; the deadline holds where the call can be left."""
        self.filesystem.invalidate_cache()
        if self.filesystem.async_impl:
            method = getattr(self.filesystem, f"_{name}")
            return sync(self.filesystem.loop, method, *args, timeout=timeout, **options)
        return getattr(self.filesystem, name)(*args, **options)

    def read(self, path: str, version: str, start: int, size_bytes: int) -> bytes:
        """Read a range; of S3, only of the object with that ETag."""
        timeout = CALL_TIMEOUT_SECONDS + size_bytes / SLOWEST_BYTES_PER_SECOND
        end = start + size_bytes
        if hasattr(self.filesystem, "_call_s3"):
            loop = self.filesystem.loop
            data = sync(loop, self._get_s3, path, version, start, end, timeout=timeout)
        elif self.filesystem.async_impl:
            cat = self.filesystem._cat_file
            data = sync(self.filesystem.loop, cat, path, start=start, end=end, timeout=timeout)
        else:  # without a cache, which would read five times as much ahead
            data = self.filesystem.cat_file(path, start=start, end=end, cache_type="none")
        return bytes(data)

    async def _get_s3(self, path: str, etag: str, start: int, end: int) -> bytes:
        bucket, key, _ = self.filesystem.split_path(path)
        found = await self.filesystem._call_s3(
            "get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", IfMatch=etag
        )
        async with found["Body"] as body:
            # A server that knows no ranges would send all of it.
            return b"" if found["ContentLength"] > end - start else await body.read()


@dataclass(frozen=True)
class _Object:
    """A file as it was listed (`hotload.directory.remote.RemoteFile`): url, size and version say
    which."""

    url: str
    name: str
    size_bytes: int
    version: str
    modified_at: float
    path: str = field(compare=False)
    connection: _Connection = field(compare=False, repr=False)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill the whole view with the bytes from `offset` on.

        Raises:
            InvalidCheckpointError: it is gone, was replaced, or may not be read.
            StoreUnavailableError: the network, or the store, is away.
        """
        connection, size_bytes = self.connection, len(view)
        data = self._ask(lambda: connection.read(self.path, self.version, offset, size_bytes))
        if len(data) != size_bytes:
            refuse_shortened(self.name, offset + len(data), offset + size_bytes)
        view[:] = data

    def is_unchanged(self) -> bool:
        """Ask whether it is still what was listed; raises as `read_into`."""
        timeout = CALL_TIMEOUT_SECONDS
        info = self._ask(lambda: self.connection.ask("info", self.path, timeout=timeout))
        return (int(info["size"]), _version(info)) == (self.size_bytes, self.version)

    def _ask(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - client libraries raise what they like
            if is_missing(error) or is_precondition_failure(error) or answer(error)[0] == 416:
                found = "no such object any more" if is_missing(error) else "another object"
                refuse_file("changed_while_read", self.name, found, "the one that was listed")
            _refuse(error, self.url, self.connection.options)


def _connection(url: str, options: Mapping[str, Any]) -> _Connection:
    scheme, said = url.partition("://")[0], json.dumps(options, sort_keys=True)
    return _Connection(_filesystem(scheme, said, os.getpid()), options)


@lru_cache(maxsize=8)
def _filesystem(scheme: str, options: str, process: int) -> Any:
    """Open a file system once a process: its connections are used again."""
    del process
    return open_filesystem(scheme, json.loads(options))


def _version(info: Mapping[str, Any]) -> str:
    found = next((info[key] for key in VERSIONS if info.get(key)), "")
    return str(found.timestamp() if isinstance(found, datetime) else found)


def _refuse(error: Exception, url: str, options: Mapping[str, Any]) -> NoReturn:
    """Raise what a failed read means: to be tried again, or a finding."""
    if isinstance(error, InvalidCheckpointError):
        raise error
    failure = store_error(error, url, leaves(options))
    if isinstance(failure, StoreUnavailableError):
        raise failure from None
    expected = "a checkpoint that these credentials may read"
    refuse_file("unreadable", url, failure.reason, expected, "operator")
