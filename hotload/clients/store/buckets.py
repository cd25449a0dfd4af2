"""Where a store's objects lie: the port every kind answers, and the kinds reached through fsspec.

Paths are relative to the store's url and already checked; errors are those of the client library,
which `failures.store_error` translates.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Coroutine, Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Protocol

import fsspec

from hotload.clients.store.failures import (
    MISSING_BUCKET,
    NO_BUCKET,
    answer,
    is_missing,
    is_precondition_failure,
)
from hotload.clients.store.stored_object import StoredObject
from hotload.clock import utc_now
from hotload.directory.files import AnyFile, ComposedFile, read_chunks, read_whole
from hotload.directory.remote import RemoteFile
from hotload.errors import StoreError

# s3fs's own 10 parts of 50 MiB cost 1.0 GiB on put and 1.3 GiB on get, and are no faster.
PART_BYTES = 16 << 20
PARTS_AT_ONCE = 4
# Files that are read in pieces for an upload: 100 MB each, with what is read ahead of them.
COMPOSED_AT_ONCE = 2
# Objects this process is uploading; an unfinished upload of any other object was left behind.
_IN_FLIGHT: Counter[str] = Counter()


class StoreBackend(Protocol):
    """Does for a store what depends on the kind of place its objects lie in."""

    async def put_file(self, local: AnyFile, path: str) -> None:
        """Complete or invisible."""

    async def put_bytes(self, data: bytes, path: str) -> None:
        """Complete or invisible; replaces."""

    async def create_bytes(self, data: bytes, path: str) -> bool:
        """False when the object exists."""

    async def read_bytes(self, path: str, limit_bytes: int) -> bytes:
        """At most `limit_bytes` + 1 bytes of the object's beginning."""

    async def read_piece(self, path: str, start: int, size_bytes: int) -> bytes:
        """Read `size_bytes` bytes from `start` on, at least 1; fewer only where the object ends."""

    async def get_file(self, path: str, local: Path) -> None:
        """To a file that does not exist yet."""

    async def size(self, path: str) -> int | None:
        """In bytes; None when there is no such object."""

    async def names(self, prefix: str) -> list[str]:
        """Direct children, sorted."""

    async def objects(self, prefix: str) -> list[StoredObject]:
        """List every object below, however deep, sorted by path."""

    async def delete_file(self, path: str) -> None:
        """Delete an object; one that is gone already is no error."""

    async def abort_orphaned_uploads(self, prefix: str) -> int:
        """Remove unfinished uploads of other processes, and count them."""


class MemoryBucket:
    """Objects in fsspec's global in-process dictionary, for tests and for a first look."""

    _lock = threading.Lock()

    def __init__(self, root: str) -> None:
        self._filesystem = fsspec.filesystem("memory")
        self._root = f"/{root}"

    async def put_file(self, local: AnyFile, path: str) -> None:
        await self.put_bytes(await asyncio.to_thread(read_whole, local), path)

    async def put_bytes(self, data: bytes, path: str) -> None:
        with self._lock:
            self._filesystem.pipe_file(f"{self._root}/{path}", data)

    async def create_bytes(self, data: bytes, path: str) -> bool:
        with self._lock:
            try:
                self._filesystem.pipe_file(f"{self._root}/{path}", data, mode="create")
            except FileExistsError:
                return False
        return True

    async def read_bytes(self, path: str, limit_bytes: int) -> bytes:
        # `open` would hand out the one shared file object and move its position under other
        # readers.
        try:
            return bytes(
                self._filesystem.store[f"{self._root}/{path}"].getbuffer()[: limit_bytes + 1]
            )
        except KeyError:
            raise FileNotFoundError(path) from None

    async def read_piece(self, path: str, start: int, size_bytes: int) -> bytes:
        try:
            data = self._filesystem.store[f"{self._root}/{path}"].getbuffer()
        except KeyError:
            raise FileNotFoundError(path) from None
        return bytes(data[start : start + size_bytes])

    async def get_file(self, path: str, local: Path) -> None:
        size = await self.size(path)
        data = await self.read_bytes(path, size or 0)
        await asyncio.to_thread(local.write_bytes, data)

    async def size(self, path: str) -> int | None:
        file = self._filesystem.store.get(f"{self._root}/{path}")
        return None if file is None else file.getbuffer().nbytes

    async def names(self, prefix: str) -> list[str]:
        start = f"{self._root}/{prefix}/" if prefix else f"{self._root}/"
        below = [name for name in list(self._filesystem.store) if name.startswith(start)]
        return sorted({name[len(start) :].partition("/")[0] for name in below})

    async def objects(self, prefix: str) -> list[StoredObject]:
        start = f"{self._root}/{prefix}/" if prefix else f"{self._root}/"
        with self._lock:
            below = {n: f for n, f in self._filesystem.store.items() if n.startswith(start)}
        return [
            StoredObject(
                name.removeprefix(f"{self._root}/"), file.getbuffer().nbytes, file.modified
            )
            for name, file in sorted(below.items())
        ]

    async def delete_file(self, path: str) -> None:
        with self._lock:
            self._filesystem.store.pop(f"{self._root}/{path}", None)

    async def abort_orphaned_uploads(self, prefix: str) -> int:
        del prefix
        return 0


class RemoteBucket:
    """Objects behind an asynchronous fsspec file system.

    Its calls run on fsspec's own event loop and are awaited from the caller's: no thread is held,
    and cancelling the caller cancels the transfer. One file system, that is one connection pool,
    per store.
    """

    put_options: ClassVar[Mapping[str, Any]] = {}
    get_options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, filesystem: Any, root: str) -> None:
        self._filesystem = filesystem
        self._root = root
        self._bucket_seen = False
        self._composing = asyncio.Semaphore(COMPOSED_AT_ONCE)  # on the file system's own loop

    async def put_file(self, local: AnyFile, path: str) -> None:
        key = self._key(path)
        _IN_FLIGHT[key] += 1
        try:
            if isinstance(local, Path):
                await self._run(self._filesystem._put_file(str(local), key, **self.put_options))
            else:
                await self._run(self._put_composed(local, key))
        finally:
            _IN_FLIGHT[key] -= 1

    async def _put_composed(self, source: ComposedFile | RemoteFile, key: str) -> None:
        async with self._composing:
            if source.size_bytes < 2 * PART_BYTES:
                data = await asyncio.to_thread(read_whole, source)
                await self._filesystem._pipe_file(key, data)
            else:
                await self._put_parts(source, key)

    async def _put_parts(self, source: ComposedFile | RemoteFile, key: str) -> None:
        """Upload in parts what no file holds; fsspec uploads files and bytes alone."""
        raise NotImplementedError

    async def put_bytes(self, data: bytes, path: str) -> None:
        await self._run(self._filesystem._pipe_file(self._key(path), data))

    async def create_bytes(self, data: bytes, path: str) -> bool:
        # Some stores ignore the condition and overwrite: look before, and see afterwards whose
        # bytes are there.
        if await self.size(path) is not None:
            return False
        try:
            await self._run(self._filesystem._pipe_file(self._key(path), data, mode="create"))
        except OSError as error:
            if is_precondition_failure(error):
                return False
            raise
        return await self.read_bytes(path, len(data)) == data

    async def read_bytes(self, path: str, limit_bytes: int) -> bytes:
        try:
            return await self._run(
                self._filesystem._cat_file(self._key(path), start=0, end=limit_bytes + 1)
            )
        except Exception as error:
            if answer(error)[0] == 416:  # no byte of an empty object can be asked for
                return b""
            raise

    async def read_piece(self, path: str, start: int, size_bytes: int) -> bytes:
        return await self._run(
            self._filesystem._cat_file(self._key(path), start=start, end=start + size_bytes)
        )

    async def get_file(self, path: str, local: Path) -> None:
        await self._run(self._filesystem._get_file(self._key(path), str(local), **self.get_options))

    async def size(self, path: str) -> int | None:
        try:
            info = await self._run(self._filesystem._info(self._key(path), refresh=True))
        except FileNotFoundError as error:
            await self._refuse_missing_bucket(error)
            return None
        self._bucket_seen = True
        return int(info["size"]) if info["type"] == "file" else None

    async def names(self, prefix: str) -> list[str]:
        directory = self._key(prefix)
        try:
            paths = await self._run(self._filesystem._ls(directory, detail=False, refresh=True))
        except FileNotFoundError as error:
            await self._refuse_missing_bucket(error)
            return []
        self._bucket_seen = True
        start = f"{directory}/"
        below = (path[len(start) :] for path in paths if path.startswith(start))
        return sorted({name.partition("/")[0] for name in below} - {""})

    async def objects(self, prefix: str) -> list[StoredObject]:
        try:
            listed = await self._run(self._filesystem._find(self._key(prefix), detail=True))
        except FileNotFoundError as error:
            await self._refuse_missing_bucket(error)
            return []
        below, start = self._key(prefix) + "/", f"{self._root}/"
        return [
            # One of unknown age counts as new, so that nothing is taken for old by mistake.
            StoredObject(
                name.removeprefix(start), int(info["size"]), modified_at(info) or utc_now()
            )
            for name, info in sorted(listed.items())
            if info["type"] == "file" and name.startswith(below) and not name.endswith("/")
        ]

    async def delete_file(self, path: str) -> None:
        try:
            await self._run(self._filesystem._rm_file(self._key(path)))
        except FileNotFoundError as error:
            await self._refuse_missing_bucket(error)

    async def abort_orphaned_uploads(self, prefix: str) -> int:
        """Remove none: a resumable upload is invisible and cannot be listed."""
        del prefix
        return 0

    async def _find_bucket(self, name: str) -> None:
        """Ask for the bucket itself; FileNotFoundError when there is none."""
        await self._filesystem._call("GET", f"b/{name}", json_out=True)

    async def _refuse_missing_bucket(self, error: FileNotFoundError) -> None:
        """StoreError if it was the bucket that was not found."""
        if self._bucket_seen:
            return
        name = self._root.partition("/")[0]
        try:
            await self._run(self._find_bucket(name))
        except Exception as asked:
            if is_missing(asked) or answer(error)[1] == MISSING_BUCKET:
                raise StoreError(name, NO_BUCKET) from None
            # The right to read objects need not include the right to look at the bucket.
            if not isinstance(asked, PermissionError) and answer(asked)[0] != 403:
                raise
        self._bucket_seen = True

    def _key(self, path: str) -> str:
        return f"{self._root}/{path}" if path else self._root

    async def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return await asyncio.wrap_future(
            asyncio.run_coroutine_threadsafe(coroutine, self._filesystem.loop)
        )


class GcsBucket(RemoteBucket):
    """Google Cloud Storage; a resumable upload that was broken off expires by itself.

    gcsfs repeats a failed request up to five times, and nothing switches that off; the deadline of
    the whole call bounds it (docs/decisions/0008).
    """

    put_options: ClassVar[Mapping[str, Any]] = {"chunksize": PART_BYTES}
    get_options: ClassVar[Mapping[str, Any]] = {"concurrency": 1}  # one stream, 128 KiB at a time

    async def _put_parts(self, source: ComposedFile | RemoteFile, key: str) -> None:
        from gcsfs.core import initiate_upload, upload_chunk

        kind = "application/octet-stream"
        bucket, name, _ = self._filesystem.split_path(key)
        location = await initiate_upload(self._filesystem, bucket, name, kind)
        parts, start = read_chunks(source, PART_BYTES), 0
        while part := await asyncio.to_thread(next, parts, b""):
            await upload_chunk(self._filesystem, location, part, start, source.size_bytes, kind)
            start += len(part)


class S3Bucket(RemoteBucket):
    """S3 and its many relatives."""

    put_options: ClassVar[Mapping[str, Any]] = {
        "chunksize": PART_BYTES,
        "max_concurrency": PARTS_AT_ONCE,
    }
    get_options: ClassVar[Mapping[str, Any]] = put_options

    async def _put_parts(self, source: ComposedFile | RemoteFile, key: str) -> None:
        call = self._filesystem._call_s3
        bucket, _, name = key.partition("/")
        upload = await call("create_multipart_upload", Bucket=bucket, Key=name)
        place = {"Bucket": bucket, "Key": name, "UploadId": upload["UploadId"]}
        waiting, done = enumerate(read_chunks(source, PART_BYTES), start=1), []
        try:
            while group := await asyncio.to_thread(list, islice(waiting, PARTS_AT_ONCE)):
                answers = await asyncio.gather(
                    *(call("upload_part", **place, PartNumber=n, Body=part) for n, part in group)
                )
                done += [
                    {"PartNumber": number, "ETag": answered["ETag"]}
                    for (number, _), answered in zip(group, answers, strict=True)
                ]
            await call("complete_multipart_upload", **place, MultipartUpload={"Parts": done})
        except BaseException:  # cancelled, it would be stored and paid for, and seen by nobody
            await call("abort_multipart_upload", **place)
            raise

    async def abort_orphaned_uploads(self, prefix: str) -> int:
        """Abort multipart uploads below `prefix` that are not this process's own."""
        return int(await self._run(self._abort_multipart_uploads(prefix)))

    async def _abort_multipart_uploads(self, prefix: str) -> int:
        call = self._filesystem._call_s3
        bucket, _, directory = f"{self._key(prefix)}/".partition("/")
        count = 0
        marks: dict[str, str] = {}
        while True:
            page = await call("list_multipart_uploads", Bucket=bucket, Prefix=directory, **marks)
            for upload in page.get("Uploads", []):
                key = upload["Key"]
                if key.startswith(directory) and not _IN_FLIGHT[f"{bucket}/{key}"]:
                    await call(
                        "abort_multipart_upload",
                        Bucket=bucket,
                        Key=key,
                        UploadId=upload["UploadId"],
                    )
                    count += 1
            if not page.get("IsTruncated"):
                return count
            marks = {
                "KeyMarker": page["NextKeyMarker"],
                "UploadIdMarker": page["NextUploadIdMarker"],
            }

    async def _find_bucket(self, name: str) -> None:
        await self._filesystem._call_s3("head_bucket", Bucket=name)


def modified_at(info: Mapping[str, Any]) -> datetime | None:
    """Read when an object was written: s3fs says `LastModified`, gcsfs `updated`, others `mtime`
    or `created`, some as text; None where nobody says.
    """
    keys = ("LastModified", "mtime", "updated", "created")
    written = next((info[key] for key in keys if info.get(key)), None)
    if isinstance(written, str):
        try:
            written = datetime.fromisoformat(written)
        except ValueError:
            return None
    if isinstance(written, int | float):
        return datetime.fromtimestamp(written, UTC)
    if not isinstance(written, datetime):
        return None
    return written if written.tzinfo else written.replace(tzinfo=UTC)
