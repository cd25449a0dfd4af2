"""The client of a checkpoint store: the bucket snapshots and rollouts travel through."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec

from hotload.check_line import CheckLine
from hotload.clients.redaction import leaves
from hotload.clients.store.buckets import GcsBucket, MemoryBucket, S3Bucket, StoreBackend
from hotload.clients.store.failures import store_error
from hotload.clients.store.local_directory import LocalDirectory
from hotload.clients.store.stored_object import StoredObject
from hotload.directory.files import AnyFile, sync_and_replace
from hotload.errors import InvalidCheckpointError, StoreError, StoreUnavailableError

SCHEMES = ("file", "memory", "s3", "gs")
PATH_LIMIT_BYTES = 900  # S3 allows keys of 1,024
CALL_TIMEOUT_SECONDS = 60.0
ABORT_TIMEOUT_SECONDS = 600.0
LIST_TIMEOUT_SECONDS = 600.0
SLOWEST_BYTES_PER_SECOND = 5e6
SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")


def check_path(path: str) -> str:
    """Return the path itself, if it stays below the store's url and means the same to every store.

    Raises:
        StoreError: empty, absolute, with `.` or `..`, control characters, or a store's own markup.
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise StoreError(path[:200], "expected a relative path without empty, `.` or `..` parts")
    # s3fs and gcsfs read versions off the end of a path: `?versionId=…`, `#1234`.
    if re.search(r"[\x00-\x1f\x7f\\?#]", path) or not path.isprintable():
        raise StoreError(repr(path[:200]), "expected no control characters, backslash, `?` or `#`")
    if len(path.encode()) > PATH_LIMIT_BYTES:
        raise StoreError(path[:200], f"expected at most {PATH_LIMIT_BYTES} bytes")
    return path


def check_url(url: str) -> str:
    """Return the url with its scheme, if it names a place where a store can lie.

    Raises:
        ValueError: of another scheme, relative, with credentials, or not to be read as a path.
    """
    if "://" not in url:
        url = f"file://{url}"
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme[:20]!r}: expected {', '.join(SCHEMES)}")
    if url.endswith("/"):
        raise ValueError("expected no trailing slash")
    try:
        # Taken as it stands, not as percent-encoded: fsspec and the emulator read it so, too.
        if scheme == "file" and not rest.startswith("/"):
            raise ValueError("expected an absolute path: a worker's directory is a temporary clone")
        check_path(rest.removeprefix("/") if scheme == "file" else rest)
    except StoreError as error:
        raise ValueError(error.reason) from None
    if "@" in rest.partition("/")[0]:
        raise ValueError("expected no user or password in the url; they belong in `options`")
    return url


@dataclass(frozen=True, eq=False)
class Store:
    """Reads and writes objects below a url; may be pickled, and connects at its first call.

    Args:
        url: the service's bucket, which exists: s3://, gs://, file:// or an absolute path,
            memory://.
        options: of fsspec's file system: endpoint_url, key, secret, token; kept out of every text.
            Empty takes the environment's credentials.

    Raises:
        ValueError: as `check_url`.
    """

    url: str
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Check the url."""
        object.__setattr__(self, "url", check_url(self.url))

    def __getstate__(self) -> dict[str, Any]:
        """Url and options: a connection stays in the process that opened it."""
        return {"url": self.url, "options": self.options}

    def options_for(self, url: str) -> Mapping[str, Any]:
        """Return what opens a URL: the options of this store where it lies in the same bucket, else
        none, which takes the environment's."""
        return self.options if url.split("/")[:3] == self.url.split("/")[:3] else {}

    async def put_file(
        self, local: AnyFile, path: str, *, timeout_seconds: float | None = None
    ) -> None:
        """Upload a file, one that is composed or lies elsewhere included, which is then written
        nowhere else.

        A reader sees all of it or nothing, whatever interrupts the upload.

        An existing object is replaced. The deadline is 60 s and 1 s per 5 MB unless
        `timeout_seconds` says otherwise. Memory stays under about 150 MiB, whatever the size.

        Raises:
            StoreUnavailableError: connection, server or deadline; nothing became visible, try
                again.
            StoreError: the bucket does not exist or refuses, or the local file cannot be read.
            InvalidCheckpointError: a file that a composed one is made of cannot be read, or became
                shorter.
        """
        size = await self._local_size(local)
        limit = _deadline(size) if timeout_seconds is None else timeout_seconds
        await self._call(path, limit, lambda bucket: bucket.put_file(local, path))
        stored = await self.size(path)
        if stored != size:
            raise StoreUnavailableError(path, f"{stored} bytes arrived of {size}")

    async def put_bytes(self, data: bytes, path: str) -> None:
        """Write a small object, replacing what was there.

        Raises:
            StoreError: as `put_file`.
        """
        await self._call(path, _deadline(len(data)), lambda bucket: bucket.put_bytes(data, path))

    async def create_bytes(self, data: bytes, path: str) -> bool:
        """Write a small object only if there is none; False if there is.

        Exactly one of several writers gets True where the store honours `If-None-Match` (S3, GCS,
        radosgw, files). Elsewhere two at the same moment may both get it: read again before relying
        on it.

        Raises:
            StoreError: as `put_file`. After StoreUnavailableError it may or may not have been
            written.
        """
        return await self._call(
            path, _deadline(len(data)), lambda bucket: bucket.create_bytes(data, path)
        )

    async def read_bytes(self, path: str, *, limit_bytes: int) -> bytes:
        """Read a small object; never more than `limit_bytes` are held.

        Raises:
            StoreError: there is no such object, or it is larger.
        """
        limit = _deadline(limit_bytes)
        data = await self._call(path, limit, lambda bucket: bucket.read_bytes(path, limit_bytes))
        if len(data) > limit_bytes:
            raise StoreError(path, f"larger than {limit_bytes} bytes")
        return data

    async def read_piece(self, path: str, start: int, size_bytes: int) -> bytes:
        """Read `size_bytes` bytes, at least 1, from `start` on; fewer only where the object ends.

        Raises:
            StoreError: there is no such object, or, on some stores, it ends before `start`.
        """
        return await self._call(
            path, _deadline(size_bytes), lambda bucket: bucket.read_piece(path, start, size_bytes)
        )

    async def get_file(
        self, path: str, local: Path, *, timeout_seconds: float | None = None
    ) -> None:
        """Download to `local`, which appears complete and synced or not at all.

        Its directory exists. Deadline and errors as `put_file`. Memory stays under about 250 MiB.
        """
        size = await self.size(path)
        if size is None:
            raise StoreError(path, "does not exist")
        limit = _deadline(size) if timeout_seconds is None else timeout_seconds
        partial = local.with_name(f".{local.name[:100]}.{secrets.token_hex(8)}.partial")
        try:
            await self._call(path, limit, lambda bucket: bucket.get_file(path, partial))
            arrived = await self._local_size(partial)
            if arrived != size:
                raise StoreUnavailableError(path, f"{arrived} bytes arrived of {size}")
            try:
                await asyncio.to_thread(sync_and_replace, partial, local)
            except OSError as error:
                raise store_error(error, str(local)) from None
        finally:
            partial.unlink(missing_ok=True)

    async def size(self, path: str) -> int | None:
        """Return the size of an object in bytes; None without such an object.

        Raises:
            StoreError: the bucket itself does not exist, or refuses.
        """
        return await self._call(path, CALL_TIMEOUT_SECONDS, lambda bucket: bucket.size(path))

    async def names(self, prefix: str) -> list[str]:
        """List the names of objects and directories directly below `prefix` (`""`: the store),
        sorted.

        Raises:
            StoreError: the bucket itself does not exist, or refuses.
        """
        return await self._call(
            prefix, CALL_TIMEOUT_SECONDS, lambda bucket: bucket.names(prefix), may_be_root=True
        )

    async def objects(self, prefix: str) -> list[StoredObject]:
        """List every object below `prefix/`, however deep, sorted by path; `""` is the store.

        Raises:
            StoreError: the bucket itself does not exist, or refuses.
        """
        return await self._call(
            prefix, LIST_TIMEOUT_SECONDS, lambda bucket: bucket.objects(prefix), may_be_root=True
        )

    async def delete_file(self, path: str) -> None:
        """Remove an object; no error when there is none.

        Raises:
            StoreError: as `put_file`.
        """
        await self._call(path, CALL_TIMEOUT_SECONDS, lambda bucket: bucket.delete_file(path))

    async def abort_orphaned_uploads(self, prefix: str = "") -> int:
        """Remove what interrupted uploads below `prefix/` left behind; how many there were.

        Nothing of it was ever visible, but it is paid for. Every unfinished upload is taken for an
        orphan unless this process is making it, so call it while holding the publisher's lease:
        then any other uploader has lost the lease, and its upload must not complete. Housekeeping:
        a cycle can go on when it fails.

        Raises:
            StoreError: as `put_file`; also when the credentials may not list uploads.
        """
        return await self._call(
            prefix,
            ABORT_TIMEOUT_SECONDS,
            lambda bucket: bucket.abort_orphaned_uploads(prefix),
            may_be_root=True,
        )

    async def check(self) -> list[CheckLine]:
        """Check that the bucket is there and can be written, read and deleted from, line by line.

        Uses one small object below `_hotload/`, which it removes. Never raises for the store's
        sake.
        """
        path = f"_hotload/check-{secrets.token_hex(8)}"
        data = secrets.token_bytes(64)
        lines: list[CheckLine] = []

        async def ask(
            name: str, call: Awaitable[Any], good: str, expected: Any, advice: str
        ) -> bool:
            try:
                ok = await call == expected
                text = good if ok else "the store did not keep what was written"
            except StoreError as error:
                ok, text = False, error.reason.rstrip(".")
            lines.append(CheckLine(name, ok, text, advice))
            return ok

        reached = await ask(
            "bucket", self._lists(), f"{self.url} can be listed", True, BUCKET_ADVICE
        )
        if reached and await ask("write", self.put_bytes(data, path), "works", None, WRITE_ADVICE):
            read = self.read_bytes(path, limit_bytes=1024)
            await ask("read", read, "what was written came back", data, READ_ADVICE)
            await ask(
                "create once", self.create_bytes(data, path), CREATE_FOUND, False, CREATE_ADVICE
            )
            await ask("delete", self.delete_file(path), "works", None, DELETE_ADVICE)
        return lines

    async def _lists(self) -> bool:
        await self.names("")
        return True

    async def _local_size(self, local: AnyFile) -> int:
        if not isinstance(local, Path):
            return local.size_bytes
        try:
            return (await asyncio.to_thread(local.stat)).st_size
        except OSError as error:
            raise store_error(error, str(local)) from None

    async def _call(
        self, path: str, timeout_seconds: float, operation: Any, *, may_be_root: bool = False
    ) -> Any:
        """Run one operation under a deadline; `may_be_root` allows the empty path, the store."""
        if path or not may_be_root:
            check_path(path)
        try:
            async with asyncio.timeout(timeout_seconds) as deadline:
                return await operation(self._bucket)
        except InvalidCheckpointError:  # the trainer's files, not the store's
            raise
        except Exception as error:  # noqa: BLE001 - client libraries raise anything; here it gets its class
            if isinstance(error, TimeoutError) and deadline.expired():
                reason = f"not finished within {timeout_seconds:g} s"
                raise StoreUnavailableError(path or self.url, reason) from None
            raise store_error(error, path or self.url, self._secrets()) from None

    @cached_property
    def _bucket(self) -> StoreBackend:
        return _open_bucket(self.url, self.options)

    def _secrets(self) -> list[str]:
        known = [os.environ.get(name, "") for name in SECRET_VARIABLES]
        return [*leaves(self.options), *known]


def _open_bucket(url: str, options: Mapping[str, Any]) -> StoreBackend:
    """Open the backend for a checked url. `options` go to fsspec's file system as they are.

    Raises:
        Exception: the client library does not accept the options.
    """
    scheme, _, root = url.partition("://")
    if scheme == "file":
        return LocalDirectory(Path(root))
    if scheme == "memory":
        return MemoryBucket(root)
    if scheme == "gs":
        return GcsBucket(open_filesystem("gs", options), root)
    return S3Bucket(open_filesystem("s3", options), root)


def open_filesystem(scheme: str, options: Mapping[str, Any]) -> Any:
    """Open fsspec's file system for a scheme, with connections of its own.

    Raises:
        Exception: there is no such file system, or it does not accept the options.
    """
    own: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "s3":
        # One attempt of botocore's and one of s3fs's: tasks repeat (docs/decisions/0008).
        own["config_kwargs"] = {
            "connect_timeout": 10,
            "read_timeout": 60,
            "retries": {"mode": "standard", "total_max_attempts": 1},
            **options.get("config_kwargs", {}),
        }
    if scheme in ("gs", "gcs"):
        # Read when gcsfs is imported. Zonal buckets are not for checkpoints, and where their API
        # does not answer, every single call waits 60 s for it.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    filesystem = fsspec.filesystem(scheme, **{**options, **own})
    if scheme == "s3":
        filesystem.retries = 1
    return filesystem


BUCKET_ADVICE = (
    "Name an existing bucket or directory, and give the credentials the right to list it"
)
WRITE_ADVICE = "Give the credentials the right to put objects"
READ_ADVICE = "Give the credentials the right to get objects"
CREATE_FOUND = "an existing object is refused"
CREATE_ADVICE = "The publisher's lease cannot be trusted on this store"
DELETE_ADVICE = "Give the credentials the right to delete objects"


def _deadline(size_bytes: int) -> float:
    """Seconds a transfer may take: a minute, and as long as the slowest useful connection needs."""
    return CALL_TIMEOUT_SECONDS + size_bytes / SLOWEST_BYTES_PER_SECOND
