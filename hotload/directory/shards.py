"""Shards and checkpoint directories: opened, encoded, applied, verified.

What no server reads is never part of a checkpoint: optimizer, schedule, random state, logs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hotload.checkpoint.checkpoint import Checkpoint, LeftOut
from hotload.checkpoint.names import ADAPTER_CONFIG_FILE, CONFIG_FILE, INDEX_FILE, SPEC_FILE
from hotload.checkpoint.safetensors import (
    PREFIX_BYTES,
    SHARD_SUFFIX,
    ShardHeader,
    header_size,
    name_obstacle,
    read_header,
)
from hotload.checkpoint.side_files import (
    CODE_SUFFIX,
    code_loaded,
    directory_left_out,
    reason_to_leave_out,
)
from hotload.delta.apply import Payload, apply_shard, payloads, verify_shard
from hotload.delta.byte_io import read_bytes
from hotload.delta.encode import DeltaStats, encode_shard
from hotload.delta.envelope import ARC_V2, Envelope, check_delta_shard
from hotload.delta.frame import content_size
from hotload.delta.ordered_threads import Workers
from hotload.directory.files import (
    AnyFile,
    OpenFile,
    open_file,
    read_whole,
    refuse_file,
    refuse_unreadable,
    replacing_file,
    size_and_sha256,
)
from hotload.directory.places import Directory
from hotload.directory.remote import RemoteFile
from hotload.errors import DeltaError, Finding, InvalidCheckpointError
from hotload.records import FileDigest

DOCUMENTS = (CONFIG_FILE, INDEX_FILE, SPEC_FILE, ADAPTER_CONFIG_FILE)
DOCUMENT_LIMIT_BYTES = 100_000_000
# Beside config.json, what libraries save again in other words; a code module is as short.
RESAVED = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json")
SMALL_DOCUMENT_BYTES = 1_000_000
# Headers and documents that lie elsewhere: each is a request or two, and at most 100 MB.
REMOTE_FILES_AT_ONCE = 8


class OpenShard:
    """A shard open for positional reads (`hotload.delta.byte_io.Readable`), its header checked."""

    def __init__(self, opened: OpenFile) -> None:
        self._opened, self.file, self.size_bytes = opened, opened.file, opened.size_bytes
        prefix = read_bytes(self, 0, min(PREFIX_BYTES, self.size_bytes))
        size_bytes = header_size(prefix, file=self.file, size_bytes=self.size_bytes)
        head = read_bytes(self, 0, size_bytes)
        self.header: ShardHeader = read_header(head, file=self.file, size_bytes=self.size_bytes)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill the whole view with the bytes from `offset` on.

        Raises:
            InvalidCheckpointError, StoreUnavailableError: as `OpenFile.read_into`.
        """
        self._opened.read_into(offset, view)


class _OpenDelta(OpenShard):
    """A delta open for reads; that it cannot be read is no fault of the checkpoint's."""

    def read_into(self, offset: int, view: memoryview) -> None:
        try:
            super().read_into(offset, view)
        except InvalidCheckpointError as error:
            raise DeltaError(self.file, error.findings[0].summary) from None


@contextmanager
def open_shard(path: AnyFile) -> Iterator[OpenShard]:
    """Open a shard, wherever its bytes lie, until the block ends.

    Raises:
        InvalidCheckpointError: no such file, not readable, or its header breaks a rule.
        StoreUnavailableError: it lies in a store that is away.
    """
    with open_file(path) as opened:
        yield OpenShard(opened)


def read_checkpoint(directory: Directory) -> Checkpoint:
    """Read the headers, documents and side files of a checkpoint directory; side files are
    digested.

    Which files there have to be is for `hotload.checkpoint.rules` to say.

    Raises:
        InvalidCheckpointError: no such directory; a link or device in it; a file that cannot be
        read; a shard whose header breaks a rule. All findings at once.
    """
    return read_files(list_files(directory))


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of a checkpoint directory in the order of their names, what is left out, and what
    may not be there."""

    paths: tuple[Path | RemoteFile, ...]
    left_out: tuple[LeftOut, ...]
    findings: tuple[Finding, ...]


def read_files(listing: Listing) -> Checkpoint:
    """Read the checkpoint that the listed files are, as `read_checkpoint` does.

    Raises:
        InvalidCheckpointError: as `read_checkpoint`.
    """
    findings = [*listing.findings]
    shards: list[ShardHeader] = []
    documents: dict[str, bytes] = {}
    side_files: list[FileDigest] = []
    is_near = all(isinstance(path, Path) for path in listing.paths)
    with ThreadPoolExecutor(REMOTE_FILES_AT_ONCE, "listed") as pool:
        in_turn: Iterable[Checkpoint | InvalidCheckpointError]
        in_turn = (map if is_near else pool.map)(_read_listed, listing.paths)
        for read in in_turn:
            if isinstance(read, InvalidCheckpointError):
                findings += read.findings
                continue
            shards += read.shards
            documents |= read.documents
            side_files += read.side_files
    if findings:
        raise InvalidCheckpointError(tuple(findings))
    return Checkpoint(tuple(shards), documents, tuple(side_files), listing.left_out)


def _read_listed(path: Path | RemoteFile) -> Checkpoint | InvalidCheckpointError:
    """Read what one file says, or say what is wrong with it."""
    documents: dict[str, bytes] = {}
    try:
        if path.name.endswith(SHARD_SUFFIX):
            with open_shard(path) as shard:
                return Checkpoint((shard.header,), {}, ())
        if path.name in DOCUMENTS:
            documents[path.name] = data = read_document(path)
            size_bytes, sha256 = len(data), hashlib.sha256(data).hexdigest()
        else:
            size_bytes, sha256 = size_and_sha256(path)
            if path.name in RESAVED and size_bytes <= SMALL_DOCUMENT_BYTES:
                documents[path.name] = read_document(path, SMALL_DOCUMENT_BYTES)
    except InvalidCheckpointError as error:
        return error
    side_file = FileDigest(file=path.name, size_bytes=size_bytes, sha256=sha256)
    return Checkpoint((), documents, (side_file,))


def code_in(directory: Directory, files: Iterable[str]) -> frozenset[str]:
    """Name those of the files that are code which a server loads with the model.

    Raises:
        InvalidCheckpointError: a file cannot be read, or is a module of more than a megabyte.
    """
    sources = [file for file in files if file.endswith(CODE_SUFFIX)]
    if not sources:
        return frozenset()
    documents = [file for file in files if file.endswith("config.json")]
    return code_loaded(
        [read_document(directory / file) for file in documents],
        {file: read_document(directory / file, SMALL_DOCUMENT_BYTES) for file in sources},
    )


def encode_file(
    base: Path,
    target: AnyFile,
    out: Path,
    *,
    envelope: Envelope = ARC_V2,
    pool: Workers | None = None,
    with_sha256: bool = True,
    target_sha256: str | None = None,
    on_bytes: Callable[[int], object] | None = None,
    self_check: bool = False,
) -> DeltaStats:
    """Write the delta from shard `base` to shard `target` at `out`; see `delta.encode_shard`.

    Raises:
        InvalidCheckpointError: one of the two cannot be read.
        LayoutMismatchError: they differ in more than values.
        DeltaError: `self_check` was asked for, and the delta does not decode again.
    """
    with open_shard(base) as old, open_shard(target) as new:
        with replacing_file(out) as file:
            stats = encode_shard(
                old,
                old.header,
                new,
                new.header,
                file,
                envelope=envelope,
                pool=pool,
                with_sha256=with_sha256,
                target_sha256=target_sha256,
                on_bytes=on_bytes,
                self_check=self_check,
            )
        if self_check:
            _require_frames(out, old.header, envelope)
    return stats


def _require_frames(delta: Path, base: ShardHeader, envelope: Envelope) -> None:
    """Return if a delta that was written has one whole frame for every tensor that it names.

    Raises:
        DeltaError: it has not.
    """
    with open_delta_shard(delta) as written:
        for name, payload in payloads(written, written.header, envelope).items():
            expected = base.by_name[name].size_bytes
            content_size(written, payload.start, payload.end, name, expected=expected)


def apply_file(
    base: Path,
    delta: Path,
    out: Path,
    *,
    envelope: Envelope = ARC_V2,
    pool: Workers | None = None,
    with_sha256: bool = True,
) -> str:
    """Write the shard that `delta` makes of `base` at `out`, and return its SHA-256 if asked for;
    `out` may be `base`.

    Raises:
        InvalidCheckpointError: the base cannot be read.
        DeltaError: the delta cannot be read or applied; also ChecksumMismatchError.
    """
    with open_shard(base) as old, open_delta_shard(delta) as change, replacing_file(out) as file:
        found = payloads_on(old, change, envelope)
        return apply_shard(old, old.header, found, file, pool=pool, with_sha256=with_sha256)


def verify_file(base: Path, delta: Path, target: Path, *, pool: Workers | None = None) -> None:
    """Return if `delta` makes of `base` every tensor of `target`, bit for bit.

    Raises:
        InvalidCheckpointError: base or target cannot be read.
        LayoutMismatchError: they differ in more than values.
        DeltaError: the delta cannot be read or applied, or restores other bytes.
    """
    with open_shard(base) as old, open_delta_shard(delta) as change, open_shard(target) as new:
        found = payloads_on(old, change)
        verify_shard(old, old.header, found, new, new.header, pool=pool)


def payloads_on(
    base: OpenShard, delta: OpenShard, envelope: Envelope = ARC_V2
) -> dict[str, Payload]:
    """Find the payloads of a delta shard: one for each tensor of its base, or for each that has
    changed, and no other.

    Raises:
        DeltaError: keys or payloads are not those of a delta on this base.
    """
    for finding in check_delta_shard(delta.header, base.header, envelope):
        raise DeltaError(finding.where, finding.summary)
    return payloads(delta, delta.header, envelope)


@contextmanager
def open_delta_shard(path: Path) -> Iterator[OpenShard]:
    """Open the delta shard at `path` until the block ends.

    Raises:
        DeltaError: no such file, not readable, or its header breaks a rule.
    """
    with ExitStack() as stack:
        try:
            delta = _OpenDelta(stack.enter_context(open_file(path)))
        except InvalidCheckpointError as error:
            raise DeltaError(path.name, error.findings[0].summary) from None
        yield delta


@dataclass(frozen=True, slots=True)
class _Entry:
    """A name in a directory; `is_file` and `is_directory` follow a link."""

    name: str
    is_file: bool
    is_directory: bool = False
    is_link: bool = False


def list_files(directory: Directory) -> Listing:
    """List the files of a checkpoint directory; a link becomes a finding.

    Raises:
        InvalidCheckpointError: no such directory, or it cannot be read.
    """
    entries = sorted(_entries(directory), key=lambda entry: entry.name)
    entries = [entry for entry in entries if not entry.name.startswith(".")]
    code = code_in(directory, [entry.name for entry in entries if entry.is_file])
    paths: list[Path | RemoteFile] = []
    left_out: list[LeftOut] = []
    findings: list[Finding] = []
    for entry in entries:
        if entry.is_directory:
            left_out.append(directory_left_out(entry.name))
        elif reason := reason_to_leave_out(entry.name, code):
            left_out.append(LeftOut(entry.name, reason))
        elif reason := name_obstacle(entry.name):
            findings.append(Finding("file_name", reason, None, "the name", "a plain file name"))
        elif entry.is_link or not entry.is_file:
            # A link may lead out of the checkpoint.
            found = "a link" if entry.is_link else "a device"
            expected = "files only; `hotload doctor` makes such a directory"
            findings.append(Finding("not_a_file", entry.name, None, found, expected))
        else:
            paths.append(directory / entry.name)
    return Listing(tuple(paths), tuple(left_out), tuple(findings))


def _entries(directory: Directory) -> list[_Entry]:
    if not isinstance(directory, Path):
        files = [_Entry(name, is_file=True) for name in directory.files]
        return files + [_Entry(name, False, is_directory=True) for name in directory.directories]
    try:
        return [
            _Entry(one.name, one.is_file(), one.is_dir(), one.is_symlink())
            for one in os.scandir(directory)
        ]
    except FileNotFoundError:
        refuse_file(
            "missing_directory", str(directory), "no such directory", "a checkpoint directory"
        )
    except NotADirectoryError:
        expected = "a checkpoint directory"
        refuse_file("not_a_directory", str(directory), "something else", expected, "caller")
    except OSError as error:
        refuse_unreadable(str(directory), error)


def read_document(path: Path | RemoteFile, limit_bytes: int = DOCUMENT_LIMIT_BYTES) -> bytes:
    """Read a file that is small enough to be held.

    Raises:
        InvalidCheckpointError: it is larger, or cannot be read.
    """
    with open_file(path) as opened:
        size_bytes = opened.size_bytes
    if size_bytes > limit_bytes:
        limit = f"at most {limit_bytes}"
        refuse_file("document_size", path.name, f"{size_bytes} bytes", limit)
    return read_whole(path)
