"""The bucket as the service sees it: snapshot directories below one fsspec URL, read only.

Names beginning with `_` or `.` are the publisher's own and not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
from fsspec.core import url_to_fs

from emulator.control.faults import Faults

READ_LIMIT_BYTES = 128 << 20


class MissingObjectError(OSError):
    """A snapshot, or a file its index names, is not in the bucket (yet)."""


class BucketError(OSError):
    """The bucket cannot be read at all."""


class SnapshotBucket:
    """Reads below `url`. All methods block and may be called from any thread."""

    def __init__(self, url: str, options: Mapping[str, Any], faults: Faults) -> None:
        self.url = url.rstrip("/")
        self._faults = faults
        # Instances and listings are shared by default: others' writes would stay unseen.
        protocol = fsspec.core.split_protocol(self.url)[0] or "file"
        shared = {} if protocol == "memory" else {"use_listings_cache": False}
        self._fs, self._root = url_to_fs(self.url, **{**shared, **options})

    def files(self, identity: str, *, replica: str | None = None) -> dict[str, int]:
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
                where = {"identity": identity, "file": name, "replica": replica}
                hidden = self._faults.take("missing_object", **where)
                if hidden is None and self._faults.take("late_object", **where) is None:
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
        """
        try:
            self._fs.get_file(f"{self._path(identity)}/{file}", str(target))
        except FileNotFoundError:
            raise MissingObjectError(f"{file} of {identity!r} is not in the bucket") from None
        except Exception as error:
            raise BucketError(f"{file} cannot be read: {type(error).__name__}") from error

    def _path(self, identity: str) -> str:
        return f"{self._root.rstrip('/')}/{identity}"
