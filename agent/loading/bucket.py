"""The bucket as a service sees it: snapshot directories below one fsspec URL, read only.

Names beginning with `_` or `.` are the publisher's own and not looked at.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsspec.core import split_protocol, url_to_fs

from hotload.clients.store.buckets import GcsBucket, S3Bucket
from hotload.clients.store.store import open_filesystem

DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
READ_LIMIT_BYTES = 128 << 20
# How the library's own store reads large objects: bounded in memory.
BOUNDED = {"s3": S3Bucket.get_options, "gs": GcsBucket.get_options}


class MissingObjectError(OSError):
    """A snapshot, or a file its index names, is not in the bucket (yet)."""


class BucketError(OSError):
    """The bucket cannot be read at all."""


class SnapshotBucket:
    """Reads below `url`. All methods block and may be called from any thread."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.url = url.rstrip("/")
        protocol, root = split_protocol(self.url)
        self._get_options = BOUNDED.get(protocol, {})
        if self._get_options:
            self._fs, self._root = open_filesystem(protocol, options), root
        else:
            # Listings are shared by default: others' writes would stay unseen.
            shared = {} if protocol == "memory" else {"use_listings_cache": False}
            self._fs, self._root = url_to_fs(self.url, **{**shared, **options})

    def files(self, identity: str) -> dict[str, int]:
        """List the files of a snapshot by name, with their sizes in bytes.

        Raises:
            MissingObjectError: no such snapshot.
            BucketError: the bucket refuses or does not answer.
        """
        try:
            self._fs.invalidate_cache()
            entries = self._fs.ls(self._path(identity), detail=True)
        except FileNotFoundError:
            entries = []
        except Exception as error:
            raise BucketError(f"the bucket cannot be listed: {type(error).__name__}") from error
        found: dict[str, int] = {}
        for entry in entries:
            name = str(entry["name"]).rpartition("/")[2]
            if entry["type"] == "file" and name and name[0] not in "_.":
                found[name] = int(entry["size"])
        if not found:
            raise MissingObjectError(f"snapshot {identity!r} is not in the bucket")
        return found

    def read(self, identity: str, file: str, start: int = 0, end: int | None = None) -> bytes:
        """Read bytes `start` to `end` (exclusive; None: all) of one file, at most 128 MiB.

        Raises:
            MissingObjectError: no such file.
            BucketError: the bucket refuses or does not answer, or the file is too large.
        """
        path = f"{self._path(identity)}/{file}"
        try:
            if end is None:
                end = int(self._fs.size(path))
            if end - start > READ_LIMIT_BYTES:
                raise BucketError(f"{file} is larger than {READ_LIMIT_BYTES} bytes")
            data: bytes = self._fs.cat_file(path, start=start, end=end) if end > start else b""
        except FileNotFoundError:
            raise MissingObjectError(f"{file} of {identity!r} is not in the bucket") from None
        except BucketError:
            raise
        except Exception as error:
            raise BucketError(f"{file} cannot be read: {type(error).__name__}") from error
        return data

    def download(self, identity: str, file: str, target: Path) -> None:
        """Copy one file to `target`.

        Raises:
            MissingObjectError: no such file.
            BucketError: the bucket refuses or does not answer.
            OSError: this machine's disk is full.
        """
        try:
            path = f"{self._path(identity)}/{file}"
            self._fs.get_file(path, str(target), **self._get_options)
        except FileNotFoundError:
            raise MissingObjectError(f"{file} of {identity!r} is not in the bucket") from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
                raise
            raise BucketError(f"{file} cannot be read: {type(error).__name__}") from error

    def _path(self, identity: str) -> str:
        return f"{self._root.rstrip('/')}/{identity}"
