"""Read the rows of a dataset, wherever it lies and in whichever form: JSON lines, a JSON array,
Parquet, Arrow, each plain or compressed, one file or the shards of a directory.

What a file is, its first bytes say. Beside the rows that were yielded, memory holds one row, or one
batch of a table.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NoReturn

import fsspec
import zstandard

from hotload.clients.redaction import leaves
from hotload.clients.store.failures import store_error
from hotload.clients.store.store import open_filesystem
from hotload.errors import InvalidProblemsError, StoreUnavailableError
from hotload.rollout.problem_rows import ROW_LIMIT_BYTES, Row

DATASET_LIMIT_BYTES = 1 << 30
PIECE_CHARACTERS = 1 << 16
ZSTD_PIECE_BYTES = 1 << 10  # from which come 32 MiB at most
BATCH_ROWS = (64, 1 << 16)
BATCH_BYTES = 32 << 20
HEAD_BYTES = 512
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"
PATTERNS_SHOWN = 6
# Of several forms in one directory the first counts: others are of the library that wrote it.
SHARDS = (r"(?<!/)(?:.*/)?(?!cache-)[^/]+\.arrow", r".*\.parquet", r".*\.jsonl?(?:\.gz|\.zst)?")
NO_ROWS = re.compile(r"(?:^|.*/)(?:dataset_info|dataset_dict|dataset_infos|state)\.json")
# Forms that hold no rows for us: what they are, and what to do.
OTHER_FORMS: tuple[tuple[bytes, str], ...] = (
    (b"PK", "a zip archive: unpack it"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file: run `git lfs pull`"),
    (b"\xfd7zXZ", "compressed with xz: decompress it, or compress it with gzip or zstd"),
    (b"BZh", "compressed with bzip2: decompress it, or compress it with gzip or zstd"),
    (b"\x04\x22\x4d\x18", "compressed with lz4: decompress it, or use gzip or zstd"),
    (b"SQLite format 3", "an SQLite database: export the table as JSON lines"),
    (b"\x89HDF", "HDF5: export it as JSON lines"),
    (b"\x93NUMPY", "a NumPy array: export it as JSON lines"),
    (b"\x80", "a Python pickle: export it as JSON lines"),
    (b"Obj\x01", "Avro: export it as JSON lines"),
    (b"<", "an HTML or XML page, such as a failed download leaves: download it again"),
    (b"\0\0\0\0", "zeros, such as a broken download leaves: download it again"),
)


def read_rows(dataset: str, options: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the rows of a dataset: of a file, of the files a pattern with `*` names, or of a
    directory's shards, in the order of their names.

    Args:
        dataset: absolute path, or a URL of any file system that fsspec knows.
        options: of that file system.

    Raises:
        InvalidProblemsError: it cannot be read; says what was found instead, and what to do.
        StoreUnavailableError: the network, or the store, is away.
    """
    try:
        filesystem, root = _located(dataset, options)
        budget = _Budget(dataset)
        for path in _files(filesystem, root, dataset):
            name = dataset if path == root else path
            local = None if "://" in dataset else path
            with filesystem.open(path, "rb") as file:
                yield from _rows(file, name, budget, local=local)
    except InvalidProblemsError:
        raise
    except ImportError as error:  # fsspec says which package
        raise InvalidProblemsError(dataset, 0, str(error)[:200]) from None
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        reason = f"compressed, and damaged: {str(error)[:200]}; write or download it again"
        raise InvalidProblemsError(dataset, 0, reason) from None
    except Exception as error:  # noqa: BLE001 - client libraries raise what they like
        failure = store_error(error, dataset, leaves(options))
        if isinstance(failure, StoreUnavailableError):
            raise failure from None
        raise InvalidProblemsError(dataset, 0, f"cannot be read: {failure.reason}") from None


def _located(dataset: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Open the file system of a dataset; returns it with the path there."""
    if "://" not in dataset:
        return fsspec.filesystem("file"), dataset
    filesystem = open_filesystem(dataset.partition("://")[0], options)
    return filesystem, filesystem._strip_protocol(dataset)


def _files(filesystem: Any, root: str, dataset: str) -> list[str]:
    if "*" in root:
        found = sorted(path for path in filesystem.glob(root) if not filesystem.isdir(path))
        if not found:
            raise InvalidProblemsError(dataset, 0, "no file has such a name")
        return found
    kind = filesystem.info(root)["type"]
    if kind == "file":
        return [root]
    if kind != "directory":
        raise InvalidProblemsError(dataset, 0, "is not a regular file")
    start = root.rstrip("/") + "/"
    below = [path.removeprefix(start) for path in filesystem.find(root, maxdepth=4)]
    below = [name for name in below if not name.startswith(".") and not NO_ROWS.fullmatch(name)]
    shards: list[str] = next(
        filter(None, ([name for name in below if re.fullmatch(form, name)] for form in SHARDS)), []
    )
    if not shards:
        raise InvalidProblemsError(dataset, 0, "a directory without Parquet, Arrow or JSON files")
    splits = sorted({_split(name) for name in shards})
    if len(splits) > 1:
        patterns = ", ".join(f"{dataset.rstrip('/')}/{split}" for split in splits[:PATTERNS_SHOWN])
        raise InvalidProblemsError(
            dataset, 0, f"a directory of several splits, name one: {patterns}"
        )
    return [f"{start}{name}" for name in sorted(shards)]


def _split(name: str) -> str:
    """Make the pattern of all shards of one split: `data/train-*.parquet`."""
    return re.sub(r"[-_.]?\d+(?:-of-\d+)?(\.[a-z.]+)$", r"*\1", name)


class _Budget:
    """Counts the bytes that were read of a dataset, after they were decompressed."""

    def __init__(self, dataset: str) -> None:
        self._dataset = dataset
        self._left = DATASET_LIMIT_BYTES

    def take(self, size_bytes: int) -> None:
        """Count bytes; raises InvalidProblemsError where they are too many."""
        self._left -= size_bytes
        if self._left < 0:
            reason = f"larger than {DATASET_LIMIT_BYTES} bytes: say `problems.max_rows`, or cut it"
            raise InvalidProblemsError(self._dataset, 0, reason)


class _Stream(io.RawIOBase):
    """Reads whatever has `read`, and counts its bytes once there is a budget."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self.budget: _Budget | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._source.read(len(buffer))
        if self.budget is not None:
            self.budget.take(len(piece))
        buffer[: len(piece)] = piece
        return len(piece)


def _rows(
    file: Any, source: str, budget: _Budget, *, local: str | None = None, depth: int = 0
) -> Iterator[Row]:
    """Yield the rows of one file, in the form that its first bytes say."""
    raw = _Stream(file)
    stream = io.BufferedReader(raw, PIECE_CHARACTERS)
    head = stream.peek(HEAD_BYTES)
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
        if depth:
            raise InvalidProblemsError(source, 0, "compressed twice: decompress it once")
        opened = gzip.GzipFile(fileobj=stream) if head[0] == 0x1F else _ZstdFile(stream)
        yield from _rows(opened, source, budget, depth=1)
        return
    if head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        with _on_disk(stream, local, source) as path:
            yield from _table_rows(path, head, source, budget)
        return
    raw.budget = budget
    budget.take(len(head))
    for signature, what in OTHER_FORMS:
        if head.startswith(signature):
            raise InvalidProblemsError(source, 0, f"it is {what}")
    if head[257:262] == b"ustar":
        raise InvalidProblemsError(source, 0, "it is a tar archive: unpack it")
    encoding = json.detect_encoding(head[:4])
    text = head.decode(encoding, "replace").lstrip("\ufeff \t\r\n")
    read = _array_rows if text.startswith("[") else _line_rows
    yield from read(stream, encoding, source)


class _ZstdFile:
    """Decompresses zstd frames; unlike the package's own reader it sees that one is cut short."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._frame: Any = None
        self._rest, self._held = b"", io.BytesIO()

    def read(self, size_bytes: int) -> bytes:
        """Read some bytes, none at the end; raises EOFError in the middle of a frame."""
        while not (piece := self._held.read(size_bytes)):
            compressed = self._rest or self._stream.read(ZSTD_PIECE_BYTES)
            if not compressed and self._frame is None:
                return b""
            if not compressed:
                raise EOFError("it ends in the middle of a frame")
            frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._held = io.BytesIO(frame.decompress(compressed))
            self._frame = None if frame.eof else frame
            self._rest = frame.unused_data if frame.eof else b""
        return piece


def _line_rows(stream: IO[bytes], encoding: str, source: str) -> Iterator[Row]:
    lines: Iterable[bytes] = iter(lambda: stream.readline(ROW_LIMIT_BYTES + 1), b"")
    if not encoding.startswith("utf-8"):
        text = io.TextIOWrapper(stream, encoding=encoding, newline="\n")
        lines = (line.encode() for line in iter(lambda: text.readline(ROW_LIMIT_BYTES + 1), ""))
    for number, line in enumerate(lines, 1):
        row = (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).strip()
        if len(row) > ROW_LIMIT_BYTES:
            refuse_row(source, number)
        if row == b"{":
            reason = "a JSON object over several lines; expected one object a line: `jq -c . FILE`"
            raise InvalidProblemsError(source, number, reason)
        if number == 1 and row[:1] != b"{" and row:
            reason = (
                f"neither JSON lines nor a form known by its first bytes; it begins {row[:40]!r}."
                " Export it as JSON lines or Parquet"
            )
            raise InvalidProblemsError(source, number, f"not JSON: {reason}")
        if row:
            yield source, number, row


def refuse_row(source: str, number: int) -> NoReturn:
    """Refuse a row that is too large, before more of it is read."""
    reason = f"larger than {ROW_LIMIT_BYTES} bytes; a row has at most that many"
    raise InvalidProblemsError(source, number, reason)


def _array_rows(stream: IO[bytes], encoding: str, source: str) -> Iterator[Row]:
    """Yield the objects of one JSON array, as much in memory as the longest of them."""
    text = io.TextIOWrapper(stream, encoding=encoding)
    scan = json.JSONDecoder().raw_decode
    held, number, size = text.read(PIECE_CHARACTERS).lstrip()[1:], 1, PIECE_CHARACTERS
    is_first = True
    while True:
        held = held.lstrip()
        if not is_first and held.startswith(","):
            held = held[1:].lstrip()
        if held.startswith("]"):
            if (held[1:] + text.read(PIECE_CHARACTERS)).strip():
                raise InvalidProblemsError(source, 0, "something follows the end of its JSON array")
            return
        try:
            _, end = scan(held)
        except (ValueError, RecursionError) as error:
            if len(held) > ROW_LIMIT_BYTES:
                refuse_row(source, number)
            more = text.read(size)
            if not more:
                reason = f"not JSON: {str(error)[:200]}, and the array is not closed"
                raise InvalidProblemsError(source, number, reason) from None
            held, size = held + more, size * 2
            continue
        yield source, number, held[:end].encode("utf-8", "surrogatepass")
        held, number, size, is_first = held[end:], number + 1, PIECE_CHARACTERS, False


@contextlib.contextmanager
def _on_disk(stream: IO[bytes], local: str | None, source: str) -> Iterator[str]:
    """Name a file that polars can read: the file itself, or a copy of the stream."""
    if local is not None:
        yield local
        return
    with tempfile.NamedTemporaryFile() as copy:
        limited = _Stream(stream)
        limited.budget = _Budget(source)
        shutil.copyfileobj(limited, copy, BATCH_BYTES)
        copy.flush()
        yield copy.name


def _require_end(path: str, source: str) -> None:
    """Refuse an Arrow stream that is cut short: polars takes what is there."""
    with open(path, "rb") as file:
        file.seek(-len(ARROW_END), io.SEEK_END)
        if file.read() != ARROW_END:
            raise InvalidProblemsError(source, 0, "it is an Arrow stream, and cut short")


def _table_rows(path: str, head: bytes, source: str, budget: _Budget) -> Iterator[Row]:
    """Yield the rows of a Parquet or Arrow file, batch by batch."""
    import polars as pl

    is_parquet = head.startswith(b"PAR1")
    if not is_parquet:  # it is read whole
        budget.take(Path(path).stat().st_size)
    try:
        if is_parquet:
            frame = pl.scan_parquet(path, glob=False)
        elif head.startswith(b"ARROW1"):
            frame = pl.read_ipc(path).lazy()
        else:
            _require_end(path, source)
            frame = pl.read_ipc_stream(path).lazy()
        number, count = 0, BATCH_ROWS[0]
        while (batch := frame.slice(number, count).collect()).height:
            size = int(batch.estimated_size())
            for row in batch.iter_rows(named=True):
                number += 1
                budget.take(size // batch.height if is_parquet else 0)
                if size > ROW_LIMIT_BYTES and len(repr(row)) > ROW_LIMIT_BYTES:
                    refuse_row(source, number)
                yield source, number, row
            count = min(max(1, BATCH_BYTES * batch.height // max(1, size)), BATCH_ROWS[1])
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        form = "Parquet" if is_parquet else "Arrow"
        reason = f"it is {form}, and cannot be read: {' '.join(str(error).split())[:200]}"
        raise InvalidProblemsError(source, 0, reason) from None
