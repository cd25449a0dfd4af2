"""One contract for every kind of store, and what only some of them can do wrong."""

# ruff: noqa: ASYNC110, ASYNC240 - the loop is the test's own: it may block, and wait for a thread

import asyncio
import pickle
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

from blocks.checkpoint_store import CheckpointStore
from hotload.clients.store import Store
from hotload.directory.files import ComposedFile, Stretch
from hotload.errors import InvalidCheckpointError, StoreError, StoreUnavailableError
from tests.blocks.conftest import GS, S3
from tests.blocks.proxy import Proxy, proxying
from tests.scripted_server import ScriptedServer, http, never

SECRET = "s3cr3tAccessKeyForTests"
# gcsfs hands aiohttp pieces of 16 MiB as bytes, on an event loop of its own.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "shard.safetensors"
    path.write_bytes(bytes(range(256)) * 4096)
    return path


async def test_a_put_file_comes_back_whole(store: Store, file: Path, tmp_path: Path) -> None:
    await store.put_file(file, "id-1/shard.safetensors")
    await store.get_file("id-1/shard.safetensors", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    assert await store.size("id-1/shard.safetensors") == file.stat().st_size


async def test_a_put_replaces(store: Store, file: Path) -> None:
    await store.put_bytes(b"old", "a/x")
    await store.put_file(file, "a/x")
    assert await store.size("a/x") == file.stat().st_size


async def test_a_file_of_many_parts_comes_back_whole(store: Store, tmp_path: Path) -> None:
    size = 33 << 20  # more than two parts of 16 MiB
    large = tmp_path / "large"
    large.write_bytes(b"\x07" * (size - 1) + b"\x09")
    await store.put_file(large, "id-1/large")
    await store.get_file("id-1/large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large.read_bytes()


def composed(directory: Path, size: int) -> tuple[ComposedFile, bytes]:
    """A file that lies nowhere, of stretches of two, and its bytes."""
    one, two = directory / "one", directory / "two"
    one.write_bytes(bytes(range(251)) * (size // 251 + 1))
    two.write_bytes(b"\x09" * 100)
    source = ComposedFile(
        "shard", b"head", (Stretch(two, 10, 20), Stretch(one, 3, size), Stretch(two, 0, 5))
    )
    middle = one.read_bytes()[3 : 3 + size]
    return source, b"head" + b"\x09" * 20 + middle + b"\x09" * 5


@pytest.mark.parametrize("size", [100, 33 << 20, 80 << 20])
async def test_a_composed_file_comes_back_whole(store: Store, tmp_path: Path, size: int) -> None:
    source, data = composed(tmp_path, size)
    await store.put_file(source, "id-1/composed")
    await store.get_file("id-1/composed", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data


@pytest.mark.parametrize("size", [100, 40 << 20])
async def test_a_composed_file_that_became_shorter_is_the_trainers_fault(
    store: Store, tmp_path: Path, size: int
) -> None:
    source, _ = composed(tmp_path, size)
    with (tmp_path / "one").open("r+b") as file:
        file.truncate(size // 2)
    with pytest.raises(InvalidCheckpointError, match="truncated"):
        await store.put_file(source, "id-1/composed")
    assert await store.size("id-1/composed") is None


async def test_a_composed_upload_that_is_cut_is_invisible_and_can_be_repeated(
    s3_store: Store, tmp_path: Path
) -> None:
    source, data = composed(tmp_path, 40 << 20)
    async with proxying(s3_store.options["endpoint_url"]) as proxy:
        store = _through(s3_store, proxy)
        proxy.cut_after = 20 << 20
        with pytest.raises(StoreUnavailableError):
            await store.put_file(source, "id-1/composed")
        assert await s3_store.names("id-1") == []
        proxy.cut_after = None
        await store.put_file(source, "id-1/composed")
    assert await s3_store.size("id-1/composed") == len(data)
    await s3_store.abort_orphaned_uploads("id-1")
    assert await s3_store.abort_orphaned_uploads("id-1") == 0


async def test_an_empty_object_is_an_object(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    await store.put_file(tmp_path / "empty", "a/empty")
    assert await store.size("a/empty") == 0
    assert await store.read_bytes("a/empty", limit_bytes=10) == b""
    await store.get_file("a/empty", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b""


async def test_create_writes_once(store: Store) -> None:
    assert await store.create_bytes(b"first", "_hotload/leases/1.json")
    assert not await store.create_bytes(b"second", "_hotload/leases/1.json")
    assert await store.read_bytes("_hotload/leases/1.json", limit_bytes=100) == b"first"


async def test_one_of_many_creators_wins(store: Store, request: pytest.FixtureRequest) -> None:
    if store.url.startswith("gs:"):
        pytest.skip("the GCS emulator ignores ifGenerationMatch")
    claims = [str(number).encode() for number in range(8)]
    won = await asyncio.gather(*(store.create_bytes(claim, "lease") for claim in claims))
    assert sum(won) == 1
    assert await store.read_bytes("lease", limit_bytes=100) == claims[won.index(True)]


async def test_a_read_is_bounded(store: Store) -> None:
    await store.put_bytes(b"12345", "a/x")
    assert await store.read_bytes("a/x", limit_bytes=5) == b"12345"
    with pytest.raises(StoreError, match="larger than 4 bytes"):
        await store.read_bytes("a/x", limit_bytes=4)


async def test_a_missing_object_is_an_error_to_read_and_no_size(
    store: Store, tmp_path: Path
) -> None:
    await store.put_bytes(b"", "there")
    assert await store.size("absent") is None
    with pytest.raises(StoreError, match=r"absent: .*(does not exist|404)") as caught:
        await store.read_bytes("absent", limit_bytes=10)
    assert not isinstance(caught.value, StoreUnavailableError)
    with pytest.raises(StoreError, match="does not exist"):
        await store.get_file("absent", tmp_path / "back")
    assert not list(tmp_path.glob("*back*"))


async def test_names_are_direct_children(store: Store) -> None:
    for path in ("id-1/a", "id-1/b/c", "id-10/d", "e"):
        await store.put_bytes(b"x", path)
    assert await store.names("id-1") == ["a", "b"]
    assert [name for name in await store.names("") if name != "_hotload"] == ["e", "id-1", "id-10"]
    assert await store.names("absent") == []


async def test_a_deleted_object_is_gone_and_may_be_deleted_again(store: Store) -> None:
    await store.put_bytes(b"x", "a/x")
    await store.delete_file("a/x")
    await store.delete_file("a/x")
    assert await store.size("a/x") is None


async def test_objects_are_listed_however_deep_with_size_and_age(store: Store) -> None:
    began = datetime.now(UTC)
    for path in ("id-1/a", "id-1/b/c", "id-10/d"):
        await store.put_bytes(b"x" * len(path), path)
    listed = await store.objects("id-1")
    assert [(one.path, one.size_bytes) for one in listed] == [("id-1/a", 6), ("id-1/b/c", 8)]
    for one in listed:  # another clock, whole seconds
        assert abs((one.modified_at - began).total_seconds()) < 3600
    assert {one.path for one in await store.objects("")} == {"id-1/a", "id-1/b/c", "id-10/d"}
    assert await store.objects("absent") == []


async def test_a_piece_is_read_from_its_place(store: Store) -> None:
    await store.put_bytes(b"0123456789", "a/x")
    assert await store.read_piece("a/x", 0, 4) == b"0123"
    assert await store.read_piece("a/x", 8, 4) == b"89"
    with pytest.raises(StoreError, match=r"absent: .*(does not exist|404)"):
        await store.read_piece("absent", 0, 4)


async def test_a_directory_with_no_object_left_is_not_listed(store: Store) -> None:
    await store.put_bytes(b"x", "id-1/deep/x")
    await store.put_bytes(b"x", "id-2/x")
    await store.delete_file("id-1/deep/x")
    assert [name for name in await store.names("") if name != "_hotload"] == ["id-2"]
    await store.put_bytes(b"y", "id-1/deep/y")
    assert await store.names("id-1") == ["deep"]


async def test_writers_and_deleters_of_one_directory_do_not_disturb_each_other(
    file_store: Store,
) -> None:
    async def come_and_go(number: int) -> None:
        for _ in range(40):
            await file_store.put_bytes(b"x", f"deep/shared/{number}")
            await file_store.delete_file(f"deep/shared/{number}")

    await asyncio.gather(*map(come_and_go, range(8)))
    assert "deep" not in await file_store.names("")


@pytest.mark.parametrize("name", ["a b.json", "größe", "a%20b", "x[1]*.bin", "a+b=c&d", "tilde~"])
async def test_unusual_names_are_kept(store: Store, name: str) -> None:
    await store.put_bytes(b"one", f"odd/{name}")
    await store.put_bytes(b"two", "odd/plain")
    assert await store.names("odd") == sorted([name, "plain"])
    assert await store.read_bytes(f"odd/{name}", limit_bytes=10) == b"one"
    await store.delete_file(f"odd/{name}")
    assert await store.names("odd") == ["plain"]


async def test_check_finds_nothing_missing_and_leaves_nothing(store: Store) -> None:
    await store.put_bytes(b"x", "there")
    lines = await store.check()
    assert [(line.name, line.ok) for line in lines] == [
        (name, True) for name in ("bucket", "write", "read", "create once", "delete")
    ]
    assert await store.names("_hotload") == []


BAD_PATHS = (
    "",
    "/a",
    "a/",
    "a//b",
    "../a",
    "a/../b",
    "./a",
    "a\\b",
    "a\nb",
    "a\x00",
    "a#12",
    "a?b",
    "x" * 901,
)


@pytest.mark.parametrize("path", BAD_PATHS)
async def test_a_path_that_leaves_the_store_is_refused(
    file_store: Store, path: str, tmp_path: Path
) -> None:
    for call in (
        file_store.put_bytes(b"x", path),
        file_store.create_bytes(b"x", path),
        file_store.read_bytes(path, limit_bytes=1),
        file_store.put_file(tmp_path / "x", path),
        file_store.get_file(path, tmp_path / "y"),
        file_store.size(path),
        file_store.delete_file(path),
    ):
        with pytest.raises(StoreError):
            await call
    assert await file_store.names("") == []


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("/data/store", "file:///data/store"),
        ("file:///data/store", "file:///data/store"),
        ("memory://x", "memory://x"),
        ("s3://bucket/account/account-service", "s3://bucket/account/account-service"),
        ("gs://bucket", "gs://bucket"),
    ],
)
def test_urls_that_are_taken(url: str, kept: str) -> None:
    assert Store(url).url == Store(kept).url == kept
    assert CheckpointStore(url=url).url == CheckpointStore(url=url).open().url == kept


@pytest.mark.parametrize(
    "url",
    ["", "store", "/", "file://", "file://host/x", "s3://", "s3://b/", "s3://b/../c", "http://x/y",
     "s3://key:secret@b/c", "gs://b//c", "s3://b?x=1"],
)  # fmt: skip
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(ValidationError):
        CheckpointStore(url=url)
    with pytest.raises(ValueError, match="expected"):
        Store(url)


def test_options_are_shown_nowhere() -> None:
    block = CheckpointStore(url="s3://bucket", options={"key": "AKIA", "secret": SECRET})
    shown = [repr(block), str(block), repr(block.model_dump()), block.model_dump_json()]
    store = block.open()
    assert store.options == {"key": "AKIA", "secret": SECRET}
    shown += [repr(store), str(store)]
    assert not [text for text in shown if SECRET in text]


async def test_an_open_store_travels_and_opens_again(store: Store) -> None:
    await store.put_bytes(b"x", "a/x")
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.url, copy.options) == (store.url, store.options)
    assert not vars(copy).keys() - {"url", "options"}  # no connection of another process
    assert await copy.read_bytes("a/x", limit_bytes=10) == b"x"


@pytest.mark.parametrize("kind", [S3, GS])
async def test_a_missing_bucket_is_said_to_be_missing(
    kind: str, request: pytest.FixtureRequest, file: Path
) -> None:
    server = request.getfixturevalue({"s3": "s3_server", "gs": "gcs_server"}[kind])
    store = Store(url=f"{kind}://no-such-bucket/x", options=dict(server.options))
    for call in (
        store.size("a"),
        store.names(""),
        store.delete_file("a"),
        store.put_file(file, "a"),
    ):
        with pytest.raises(StoreError, match="not exist") as caught:
            await call
        assert not isinstance(caught.value, StoreUnavailableError)
    (line,) = await store.check()
    assert not line.ok
    assert line.stops
    assert "does not exist" in line.found


async def test_a_missing_directory_is_not_created(tmp_path: Path) -> None:
    store = Store(url=str(tmp_path / "absent"))
    with pytest.raises(StoreError, match="never creates"):
        await store.put_bytes(b"x", "a")
    (line,) = await store.check()
    assert not line.ok
    assert not (tmp_path / "absent").exists()


async def test_a_vanished_source_leaves_nothing(file_store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        await file_store.put_file(tmp_path / "absent", "a/x")
    assert await file_store.names("") == []


async def test_unfinished_local_files_of_a_dead_process_are_removed(
    file_store: Store,
) -> None:
    await file_store.put_bytes(b"x", "id-1/a")
    partial = Path(file_store.url.removeprefix("file://")) / "_hotload" / "partial"
    (partial / "1-dead").write_bytes(b"half")
    assert await file_store.names("_hotload") == []
    assert await file_store.abort_orphaned_uploads() == 1
    assert not list(partial.iterdir())
    assert await file_store.size("id-1/a") == 1


async def _unfinished_upload(store: Store, path: str) -> None:
    """What a killed uploader leaves behind: a multipart upload with one part."""
    bucket, _, key = f"{store.url}/{path}".removeprefix("s3://").partition("/")
    call = store._bucket._filesystem.call_s3  # type: ignore[attr-defined]

    def leave() -> None:
        begun = call("create_multipart_upload", Bucket=bucket, Key=key)
        call(
            "upload_part",
            Bucket=bucket,
            Key=key,
            PartNumber=1,
            UploadId=begun["UploadId"],
            Body=b"x",
        )

    await asyncio.to_thread(leave)


async def test_orphaned_uploads_below_the_prefix_are_aborted(s3_store: Store) -> None:
    for path in ("id-1/a", "id-1/b", "id-10/c"):
        await _unfinished_upload(s3_store, path)
    assert await s3_store.abort_orphaned_uploads("id-1") == 2
    assert await s3_store.abort_orphaned_uploads() == 1
    assert await s3_store.abort_orphaned_uploads() == 0


def _through(store: Store, proxy: Proxy) -> Store:
    """The same store, reached through a proxy."""
    options = {**store.options, "endpoint_url": proxy.address}
    return Store(url=store.url, options=options)


async def test_an_upload_that_is_cut_is_invisible_and_can_be_repeated(
    s3_store: Store, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    large.write_bytes(b"\x05" * (33 << 20))
    async with proxying(s3_store.options["endpoint_url"]) as proxy:
        store = _through(s3_store, proxy)
        proxy.cut_after = 20 << 20
        with pytest.raises(StoreUnavailableError):
            await store.put_file(large, "id-1/large")
        assert await s3_store.size("id-1/large") is None
        assert await s3_store.names("id-1") == []
        proxy.cut_after = None
        await store.put_file(large, "id-1/large")
    assert await s3_store.size("id-1/large") == 33 << 20
    await s3_store.abort_orphaned_uploads("id-1")
    assert await s3_store.abort_orphaned_uploads("id-1") == 0


async def test_an_upload_to_gcs_that_is_cut_is_invisible_and_can_be_repeated(
    gs_store: Store, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    large.write_bytes(b"\x05" * (33 << 20))
    options = gs_store.options
    async with proxying(options["endpoint_url"]) as proxy:
        cut = Store(url=gs_store.url, options={**options, "endpoint_url": proxy.address})
        proxy.cut_after = 20 << 20
        upload = asyncio.ensure_future(cut.put_file(large, "id-1/large"))
        await proxy.full.wait()
        upload.cancel()  # gcsfs would try for half a minute
        with pytest.raises(asyncio.CancelledError):
            await upload
        assert await gs_store.size("id-1/large") is None
        proxy.cut_after = None
        await cut.put_file(large, "id-1/large")
    assert await gs_store.size("id-1/large") == 33 << 20


async def test_a_cancelled_upload_is_invisible_and_its_own_process_keeps_what_it_uploads(
    s3_store: Store, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    large.write_bytes(b"\x05" * (33 << 20))
    async with proxying(s3_store.options["endpoint_url"]) as proxy:
        store = _through(s3_store, proxy)
        proxy.cut_after, proxy.stalls = 4 << 20, True
        upload = asyncio.ensure_future(store.put_file(large, "id-1/large"))
        await proxy.full.wait()
        assert await s3_store.abort_orphaned_uploads() == 0
        upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload
        assert await s3_store.size("id-1/large") is None
        assert await s3_store.abort_orphaned_uploads() == 1


async def test_a_cancelled_local_copy_leaves_nothing(file_store: Store, tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as out:
        out.truncate(512 << 20)
    upload = asyncio.ensure_future(file_store.put_file(large, "id-1/large"))
    partial = Path(file_store.url.removeprefix("file://")) / "_hotload" / "partial"
    while not (partial.is_dir() and list(partial.iterdir())):
        await asyncio.sleep(0)
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    while list(partial.iterdir()):
        await asyncio.sleep(0)
    assert await file_store.size("id-1/large") is None


def _remote(raw: ScriptedServer) -> Store:
    options = {"endpoint_url": raw.address, "key": "AKIAFORTESTS", "secret": SECRET}
    return Store(url="s3://bucket/x", options=options)


async def test_a_black_hole_holds_nobody_beyond_the_deadline(
    raw_server: ScriptedServer, file: Path
) -> None:
    raw_server.replies = [never]
    with pytest.raises(StoreUnavailableError, match=r"not finished within 0\.5 s"):
        await _remote(raw_server).put_file(file, "a", timeout_seconds=0.5)


async def test_a_store_that_asks_for_patience_is_unavailable(
    raw_server: ScriptedServer, file: Path
) -> None:
    body = (
        b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
    )
    raw_server.replies = [http(body, 503, "application/xml")]
    with pytest.raises(StoreUnavailableError, match="HTTP 503 SlowDown"):
        await _remote(raw_server).put_file(file, "a")
    assert len(raw_server.requests) == 1  # repeating is the task's business


@pytest.mark.parametrize("body", [
    f"<Error><Code>AccessDenied</Code><Message>not with {SECRET}</Message></Error>",
    f"<Error><Code>{SECRET}</Code><Message>{SECRET}</Message></Error>",
    f"<html>{SECRET}</html>",
    "",
], ids=["message", "code", "html", "nothing"])  # fmt: skip
async def test_a_refusing_store_is_an_error_without_the_secret(
    raw_server: ScriptedServer, file: Path, body: str
) -> None:
    raw_server.replies = [http(body.encode(), 403, "application/xml")]
    store = _remote(raw_server)
    for call in (
        store.put_file(file, "a"),
        store.size("a"),
        store.names(""),
        store.delete_file("t"),
    ):
        with pytest.raises(StoreError, match=r"403|permission") as caught:
            await call
        assert not isinstance(caught.value, StoreUnavailableError)
        assert SECRET not in f"{caught.value!r} {caught.value}"
        assert caught.value.__suppress_context__
        assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
    assert SECRET not in " ".join(map(str, await store.check()))


async def test_options_the_client_does_not_know_are_an_error(raw_server: ScriptedServer) -> None:
    store = Store(url="s3://bucket", options={"config_kwargs": {"nonsense": SECRET}})
    with pytest.raises(StoreError) as caught:
        await store.size("a")
    assert SECRET not in str(caught.value)
