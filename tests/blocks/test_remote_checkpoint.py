"""Checkpoints in stores of every kind: the same view as on a disk, and what is refused by name."""

import asyncio
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hotload.checkpoint.names import INDEX_FILE
from hotload.clients.remote_checkpoint import RemoteCheckpoint
from hotload.clients.store import Store
from hotload.clients.store.buckets import COMPOSED_AT_ONCE
from hotload.directory.arrivals import find_arrivals
from hotload.directory.file_digests import FileDigests
from hotload.directory.files import AnyFile, ComposedFile, copy_file, sha256_file
from hotload.directory.relayout import CheckpointView, view_checkpoint
from hotload.errors import InvalidCheckpointError, StoreUnavailableError
from hotload.spec import WatchSpec
from tests.blocks.conftest import GS, S3, make_store
from tests.hotload.test_arrivals import CYCLE, NAME

SHARD = "model-00002-of-00009.safetensors"
Fault = tuple[Callable[[bytes], bytes], str]


@pytest.fixture(params=["memory", S3, GS])
def remote_store(request: pytest.FixtureRequest) -> Store:
    """A store that is no directory."""
    return make_store(request.param, request)


async def put(store: Store, directory: Path, name: str) -> RemoteCheckpoint:
    for path in sorted(directory.iterdir()):  # noqa: ASYNC240
        await store.put_file(path, f"{name}/{path.name}")
    return RemoteCheckpoint(f"{store.url}/{name}", store.options)


@pytest.fixture
async def place(remote_store: Store, checkpoints: list[Path]) -> RemoteCheckpoint:
    """A checkpoint of nine shards in a store."""
    return await put(remote_store, checkpoints[1], "000001")


def files_of(view: CheckpointView) -> dict[str, AnyFile]:
    names = [one.file for one in (*view.checkpoint.shards, *view.checkpoint.side_files)]
    return {name: view.file(name) for name in names}


@pytest.mark.parametrize("is_served", [True, False])
async def test_a_view_is_the_same_as_of_a_directory(
    remote_store: Store, checkpoints: list[Path], tmp_path: Path, is_served: bool
) -> None:
    directory = tmp_path / "written"
    shutil.copytree(checkpoints[1], directory)
    if not is_served:  # as `save_pretrained` writes it: neither index nor spec
        for name in (INDEX_FILE, "model.weight.spec.json"):
            (directory / name).unlink()
    near = view_checkpoint(directory)
    far = view_checkpoint(await put(remote_store, directory, "000001"))
    assert far.checkpoint == near.checkpoint
    expected = {name: sha256_file(file) for name, file in files_of(near).items()}
    assert {name: sha256_file(file) for name, file in files_of(far).items()} == expected
    for name, file in files_of(far).items():
        assert copy_file(file, tmp_path / name) == expected[name]


async def test_a_file_is_put_from_one_store_into_another_without_a_disk(
    place: RemoteCheckpoint, file_store: Store, s3_store: Store, checkpoints: list[Path]
) -> None:
    far = view_checkpoint(place).file(SHARD)
    large = ComposedFile(SHARD, b"head" * (10 << 20))
    for source in (far, large):
        for store in (file_store, s3_store):
            await store.put_file(source, f"id/{SHARD}")
            assert await store.size(f"id/{SHARD}") == sizes(source)
    await s3_store.put_file(far, f"id/{SHARD}")
    data = await s3_store.read_bytes(f"id/{SHARD}", limit_bytes=1 << 30)
    assert data == (checkpoints[1] / SHARD).read_bytes()


class Counted:
    """A file elsewhere that notes how many like it are being read at a time."""

    name, modified_at = SHARD, 0.0
    reading: ClassVar[set[int]] = set()
    most: ClassVar[int] = 0

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes

    def read_into(self, offset: int, view: memoryview) -> None:
        self.reading.add(id(self))
        Counted.most = max(self.most, len(self.reading))
        if offset + len(view) == self.size_bytes:
            self.reading.discard(id(self))

    def is_unchanged(self) -> bool:
        return True


async def test_few_files_are_in_memory_at_a_time(s3_store: Store) -> None:
    sources = [Counted(size) for size in [100_000] * 20 + [33 << 20] * 2]
    await asyncio.gather(*(s3_store.put_file(one, f"id/{n}") for n, one in enumerate(sources)))
    assert await s3_store.size("id/21") == 33 << 20
    assert 1 <= Counted.most <= COMPOSED_AT_ONCE


def sizes(source: AnyFile) -> int:
    assert not isinstance(source, Path)
    return source.size_bytes


async def test_a_replaced_object_is_refused_or_known_to_be_another(
    place: RemoteCheckpoint, remote_store: Store
) -> None:
    digests, file = FileDigests(), view_checkpoint(place).file(SHARD)
    before = digests.of(file)
    assert digests.known(file) == before
    data = await remote_store.read_bytes(f"000001/{SHARD}", limit_bytes=1 << 30)
    await remote_store.put_bytes(data[:-1] + bytes([data[-1] ^ 1]), f"000001/{SHARD}")
    assert digests.known(file) is None
    if remote_store.url.startswith("s3://"):
        with pytest.raises(InvalidCheckpointError, match=r"changed_while_read.*another object"):
            sha256_file(file)
    else:
        assert digests.of(file) != before
    assert digests.of(view_checkpoint(place).file(SHARD)) != before


async def test_an_object_that_is_gone_or_shorter_is_named(
    place: RemoteCheckpoint, remote_store: Store
) -> None:
    file = view_checkpoint(place).file(SHARD)
    await remote_store.put_bytes(b"short", f"000001/{SHARD}")
    with pytest.raises(InvalidCheckpointError, match=f"{SHARD}: (truncated|changed_while_read)"):
        sha256_file(file)
    await remote_store.delete_file(f"000001/{SHARD}")
    with pytest.raises(InvalidCheckpointError, match="no such object any more"):
        sha256_file(file)
    assert FileDigests().known(file) is None


async def test_a_place_with_nothing_is_named(place: RemoteCheckpoint) -> None:
    gone = RemoteCheckpoint(place.url.replace("000001", "000002"), place.options)
    with pytest.raises(InvalidCheckpointError, match=r"000002: missing_directory"):
        view_checkpoint(gone)
    file = RemoteCheckpoint(f"{place.url}/{SHARD}", place.options)
    with pytest.raises(InvalidCheckpointError, match="not_a_directory"):
        view_checkpoint(file)


HOSTILE: dict[str, Fault] = {
    "longer than the file": (
        lambda data: (len(data)).to_bytes(8, "little") + data[8:],
        "truncated",
    ),
    "of gigabytes": (lambda data: (3 << 30).to_bytes(8, "little") + data[8:], "header_too_large"),
    "of exabytes": (lambda data: b"\xff" * 8 + data[8:], "header_too_large"),
    "no JSON": (lambda data: data[:8] + b"\0" * 40 + data[48:], "header_not_json"),
    "cut": (lambda data: data[:-1], "gap|truncated|file_size|tensor"),
    "empty": (lambda _: b"", "truncated"),
}


@pytest.mark.parametrize("change", HOSTILE)
async def test_a_hostile_header_is_refused_before_much_is_read(
    checkpoints: list[Path], file_store: Store, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    store = Store(f"memory://hostile/{Path(file_store.url).name}")
    place = await put(store, checkpoints[1], "000001")
    corrupt, rule = HOSTILE[change]
    await store.put_bytes(corrupt((checkpoints[1] / SHARD).read_bytes()), f"000001/{SHARD}")
    asked: list[int] = []
    cat = MemoryFileSystem.cat_file

    def counting(filesystem: Any, path: str, start: int, end: int, **_: Any) -> bytes:
        if path.endswith(SHARD):
            asked.append(end - start)
        return bytes(cat(filesystem, path, start, end))

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counting)
    with pytest.raises(InvalidCheckpointError, match=f"{SHARD}.*({rule})"):
        view_checkpoint(place)
    assert sum(asked) <= 1 << 17


@pytest.mark.server
async def test_a_store_that_is_away_may_come_back(s3_store: Store) -> None:
    options = {**s3_store.options, "endpoint_url": "http://127.0.0.1:9"}
    with pytest.raises(StoreUnavailableError, match="no connection"):
        view_checkpoint(RemoteCheckpoint(f"{s3_store.url}/000001", options))


async def test_what_cannot_be_opened_says_who_acts_and_no_secret(s3_store: Store) -> None:
    bucket = RemoteCheckpoint("s3://no-such-bucket/run/000001", s3_store.options)
    with pytest.raises(InvalidCheckpointError, match=r"bucket does not exist.*operator acts"):
        view_checkpoint(bucket)
    other = RemoteCheckpoint("nowhere://bucket/run", {"secret": "must-not-be-shown"})
    with pytest.raises(InvalidCheckpointError, match=r"unreadable.*operator acts") as refused:
        view_checkpoint(other)
    assert "must-not-be-shown" not in f"{refused.value} {other!r} {other}"


def hub_of(directory: Path) -> type[BaseHTTPRequestHandler]:
    """The hub's API, as far as a model of one directory is listed and read by it."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if "/resolve/" in path:
                start, end = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
                self.answer(206, (directory / Path(path).name).read_bytes()[start : end + 1])
                return
            sizes = {one.name: one.stat().st_size for one in directory.iterdir()}
            files = [
                {"type": "file", "oid": f"{name}-{size}", "path": name, "size": size}
                for name, size in sizes.items()
            ]
            model = {"id": "o/r", "_id": "1", "sha": "a" * 40, "siblings": []}
            self.answer(200, json.dumps(files if "/tree/" in path else model).encode())

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *said: object) -> None:
            pass

    return Hub


@contextmanager
def serving(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server on loopback; yields its URL."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.server
def test_a_model_on_a_hub_is_read_without_a_download(checkpoints: list[Path]) -> None:
    with serving(hub_of(checkpoints[1])) as url:
        view = view_checkpoint(RemoteCheckpoint("hf://o/r", {"endpoint": url, "token": False}))
        assert view.checkpoint == view_checkpoint(checkpoints[1]).checkpoint
        digests = FileDigests()
        expected = sha256_file(checkpoints[1] / SHARD)
        assert digests.of(view.file(SHARD)) == digests.known(view.file(SHARD)) == expected


@pytest.mark.server
def test_a_server_of_files_that_lists_no_sizes_is_refused(checkpoints: list[Path]) -> None:
    class Files(SimpleHTTPRequestHandler):
        def log_message(self, *said: object) -> None:
            pass

    handler = partial(Files, directory=str(checkpoints[1]))
    with serving(handler) as url, pytest.raises(InvalidCheckpointError, match="without a size"):
        view_checkpoint(RemoteCheckpoint(url))


async def test_a_watcher_finds_versions_below_a_prefix(
    remote_store: Store, checkpoints: list[Path]
) -> None:
    for version in (1, 2):
        await put(remote_store, checkpoints[version], f"run/{version:06d}")
    await remote_store.delete_file(f"run/000002/{SHARD}")
    parent = RemoteCheckpoint(f"{remote_store.url}/run", remote_store.options)

    def look(marker: str | None = None, now: float = 4e9) -> dict[str, str]:
        found = find_arrivals(parent, NAME, after=None, marker=marker, still_seconds=5, now=now)
        return {str(one.directory).rpartition("/")[2]: one.waits_for for one in found}

    first, second = look().values()
    assert first == ""
    assert SHARD in second
    assert look(now=0)["000001"] == "5 s without a write"
    await remote_store.put_bytes(b"", "run/000002/STABLE")
    assert look("STABLE") == {"000001": "STABLE", "000002": ""}


def test_a_watched_url_names_the_cycles_of_its_versions() -> None:
    cycle = {**CYCLE, "checkpoint": "s3://bucket/run/000001/"}
    spec = WatchSpec.model_validate({"cycle": cycle})
    assert spec.cycle.checkpoint == "s3://bucket/run/000001"
    assert spec.directory == "s3://bucket/run"
    assert spec.cycle_of("s3://bucket/run/000007", 7).checkpoint == "s3://bucket/run/000007"
    for url in ("s3://key:secret@bucket/run", "s3://bucket/run?versionId=7", "relative/run"):
        with pytest.raises(ValueError, match="checkpoint"):
            WatchSpec.model_validate({"cycle": {**CYCLE, "checkpoint": url}})
