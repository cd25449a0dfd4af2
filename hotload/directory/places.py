"""Places: where a checkpoint lies, on this machine or elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hotload.directory.files import refuse_file
from hotload.directory.remote import RemoteFile


class RemotePlace(Protocol):
    """Where a checkpoint, or several of them, lie; its text is the URL."""

    @property
    def name(self) -> str:
        """The last part of the URL."""

    def look(self) -> RemoteDirectory:
        """List what is there now.

        Raises:
            InvalidCheckpointError: nothing is there, or it may not be listed.
            StoreUnavailableError: the network, or the store, is away.
        """

    def below(self, name: str) -> RemotePlace:
        """Name a directory in it."""


@dataclass(frozen=True)
class RemoteDirectory:
    """A directory as it was listed once: files by name, and the names of directories."""

    name: str
    files: Mapping[str, RemoteFile]
    directories: tuple[str, ...]

    def __truediv__(self, name: str) -> RemoteFile:
        """Find a file, as `/` does for paths.

        Raises:
            InvalidCheckpointError: there was none.
        """
        if name not in self.files:
            refuse_file("missing_file", name, "no such file", "a file")
        return self.files[name]


Directory = Path | RemoteDirectory
