"""Files: read with bounds, written whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import hotload
from hotload.checkpoint.index_and_spec import build_index, build_spec
from hotload.checkpoint.rules import check_full
from hotload.delta.rules import check_delta, delta_obstacle
from hotload.directory.file_digests import FileDigests
from hotload.directory.files import (
    clone_file,
    copy_file,
    remove_tree,
    sha256_file,
    write_atomic,
)
from hotload.directory.shards import (
    apply_file,
    encode_file,
    open_delta_shard,
    open_shard,
    read_checkpoint,
    verify_file,
)
from hotload.directory.supplied_digests import DIGESTS_FILE, read_supplied_digests
from hotload.errors import (
    ChecksumMismatchError,
    DeltaError,
    InvalidCheckpointError,
    LayoutMismatchError,
)
from tests.signals import signals_are_heard

GOLDEN = Path(__file__).parents[1] / "golden"
V0, V1, DELTA = (GOLDEN / f"{name}.safetensors" for name in ("v0", "v1", "delta"))
NAMES = ("model.embed_tokens.weight", "model.layers.0.a", "model.norm.weight")


def write_checkpoint(directory: Path, step: float = 0.0) -> Path:
    """A small checkpoint of three fp16 shards, every 50th value moved by `step`."""
    directory.mkdir()
    generator = np.random.default_rng(1)
    for number, name in enumerate(NAMES):
        values = generator.standard_normal((40, 10)).astype(np.float16)
        values.reshape(-1)[::50] += np.float16(step)
        save_file({name: values}, directory / f"model-{number}.safetensors", {"format": "pt"})
    shards = []
    for path in sorted(directory.iterdir()):
        with open_shard(path) as shard:
            shards.append(shard.header)
    (directory / "model.safetensors.index.json").write_bytes(build_index(shards))
    (directory / "model.weight.spec.json").write_bytes(build_spec(shards))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (directory / "tokenizer.json").write_text("{}")
    return directory


def rule(caught: pytest.ExceptionInfo[InvalidCheckpointError]) -> list[tuple[str, str, str]]:
    return [(found.rule, found.file, found.who) for found in caught.value.findings]


def in_child(script: str, *arguments: Path) -> str:
    """What the script prints in a process of its own."""
    finished = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(hotload.__file__).parents[1],
    )
    return finished.stdout


# Reading


def test_a_checkpoint_is_read_whole(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "c")
    checkpoint = read_checkpoint(directory)
    assert [shard.file for shard in checkpoint.shards] == [
        f"model-{i}.safetensors" for i in range(3)
    ]
    assert check_full(checkpoint) == ()
    sides = {side.file: side for side in checkpoint.side_files}
    assert sorted(sides) == [
        "config.json",
        "model.safetensors.index.json",
        "model.weight.spec.json",
        "tokenizer.json",
    ]
    for name, found in sides.items():
        data = (directory / name).read_bytes()
        assert (found.size_bytes, found.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert checkpoint.documents.get(name, data) == data


def test_hidden_files_are_no_part_of_a_checkpoint(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "c")
    expected = read_checkpoint(directory)
    (directory / ".env").write_text("SECRET=1")
    (directory / ".cache").mkdir()
    (directory / ".model-0.safetensors.12345678.partial").write_bytes(b"half")
    assert read_checkpoint(directory) == expected


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("missing", ("missing_directory", "trainer")),
        ("a-file", ("not_a_directory", "caller")),
    ],
)
def test_a_directory_that_is_none_is_refused(
    tmp_path: Path, name: str, found: tuple[str, str]
) -> None:
    (tmp_path / "a-file").write_bytes(b"")
    with pytest.raises(InvalidCheckpointError) as caught:
        read_checkpoint(tmp_path / name)
    assert rule(caught) == [(found[0], str(tmp_path / name), found[1])]


def test_all_findings_come_at_once(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "c")
    (directory / "checkpoint-7").mkdir()
    (directory / "link_config.json").symlink_to("/etc/hostname")
    (directory / "dangling.safetensors").symlink_to("nowhere")
    os.mkfifo(directory / "pipe.safetensors")
    (directory / "new\nconfig.json").write_bytes(b"")
    (directory / "bad.safetensors").write_bytes(b"12345678{}")
    with pytest.raises(InvalidCheckpointError) as caught:
        read_checkpoint(directory)
    assert sorted(rule(caught)) == sorted(
        [
            ("not_a_file", "link_config.json", "trainer"),
            ("not_a_file", "dangling.safetensors", "trainer"),
            ("not_a_file", "pipe.safetensors", "trainer"),
            ("file_name", r"'new\nconfig.json'", "trainer"),
            ("header_too_large", "bad.safetensors", "trainer"),
        ]
    )


@pytest.mark.parametrize("cut", [0, 7, 40, 115])
def test_a_truncated_shard_is_refused(tmp_path: Path, cut: int) -> None:
    (tmp_path / "m.safetensors").write_bytes(V0.read_bytes()[:cut])
    with pytest.raises(InvalidCheckpointError) as caught:
        read_checkpoint(tmp_path)
    assert rule(caught) == [("truncated", "m.safetensors", "trainer")]


def test_a_shard_cut_while_it_is_open_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(V0.read_bytes())
    with open_shard(path) as shard:
        os.truncate(path, 110)
        with pytest.raises(InvalidCheckpointError) as caught:
            shard.read_into(shard.header.data_start, memoryview(bytearray(12)))
    assert rule(caught) == [("truncated", "m.safetensors", "trainer")]


def test_a_document_of_a_gigabyte_is_refused_unread(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(InvalidCheckpointError) as caught:
        read_checkpoint(tmp_path)
    assert rule(caught) == [("document_size", "config.json", "trainer")]


@pytest.mark.parametrize(
    "read", [sha256_file, lambda path: copy_file(path, path.with_name("copy"))]
)
def test_a_missing_file_is_refused(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(InvalidCheckpointError) as caught:
        read(tmp_path / "missing")
    assert rule(caught) == [("missing_file", "missing", "trainer")]
    assert list(tmp_path.iterdir()) == []


def test_a_file_the_system_will_not_open_is_for_the_operator(tmp_path: Path) -> None:
    name = "x" * 300
    with pytest.raises(InvalidCheckpointError) as caught:
        sha256_file(tmp_path / name)
    assert rule(caught) == [("unreadable", name, "operator")]


# Encoding and applying files


def test_a_step_travels_as_a_delta(tmp_path: Path) -> None:
    base, target = write_checkpoint(tmp_path / "base"), write_checkpoint(tmp_path / "target", 0.5)
    before, after = read_checkpoint(base), read_checkpoint(target)
    assert delta_obstacle(before, after) is None
    delta = tmp_path / "delta"
    delta.mkdir()
    restored = tmp_path / "restored"
    restored.mkdir()
    for shard in before.shards:
        stats = encode_file(base / shard.file, target / shard.file, delta / shard.file)
        assert stats.sha256 == sha256_file(delta / shard.file)
        assert stats.size_bytes == (delta / shard.file).stat().st_size
        assert stats.content_sha256 == stats.target_sha256 == sha256_file(target / shard.file)
        assert stats.changed_element_count == 8
        verify_file(base / shard.file, delta / shard.file, target / shard.file)
        digest = apply_file(base / shard.file, delta / shard.file, restored / shard.file)
        assert digest == stats.content_sha256 == sha256_file(restored / shard.file)
    for side in before.side_files:
        copy_file(base / side.file, delta / side.file)
    assert check_delta(read_checkpoint(delta), before) == ()
    for number, name in enumerate(NAMES):
        file = f"model-{number}.safetensors"
        np.testing.assert_array_equal(
            load_file(restored / file)[name], load_file(target / file)[name]
        )
        assert load_file(delta / file)[name].dtype == np.uint8


def test_a_shard_may_be_replaced_by_its_successor(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    copy_file(V0, path)
    apply_file(path, DELTA, path)
    assert path.read_bytes() == V1.read_bytes()


def test_a_delta_that_is_no_shard_is_our_fault_not_the_trainers(tmp_path: Path) -> None:
    (tmp_path / "d.safetensors").write_bytes(b"garbage!")
    with pytest.raises(DeltaError, match="header_too_large"):
        apply_file(V0, tmp_path / "d.safetensors", tmp_path / "out")
    with pytest.raises(DeltaError, match="header_too_large"):
        verify_file(V0, tmp_path / "d.safetensors", V1)


@pytest.mark.parametrize("name", ["absent.safetensors", "directory.safetensors"])
def test_a_delta_that_cannot_be_opened_is_our_fault_too(tmp_path: Path, name: str) -> None:
    (tmp_path / "directory.safetensors").mkdir()
    with pytest.raises(DeltaError, match=name):
        apply_file(V0, tmp_path / name, tmp_path / "out")
    with pytest.raises(DeltaError, match=name):
        verify_file(V0, tmp_path / name, V1)


def test_a_delta_that_shrinks_while_it_is_read_is_our_fault_too(tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    copy_file(DELTA, path)
    with open_delta_shard(path) as delta:
        os.truncate(path, 16)
        with pytest.raises(DeltaError, match="truncated"):
            delta.read_into(8, memoryview(bytearray(16)))


@pytest.mark.parametrize(
    ("write", "error"),
    [
        (lambda out: apply_file(V1, DELTA, out), ChecksumMismatchError),
        (
            lambda out: apply_file(V0, GOLDEN / "hostile" / "delta-two-frames.safetensors", out),
            DeltaError,
        ),
        (lambda out: apply_file(V0.with_name("no"), DELTA, out), InvalidCheckpointError),
        (lambda out: encode_file(V0, V0.with_name("no"), out), InvalidCheckpointError),
        (lambda out: encode_file(V0, DELTA, out), LayoutMismatchError),
        (lambda out: copy_file(V0.with_name("no"), out), InvalidCheckpointError),
    ],
)
@pytest.mark.parametrize("old", [None, b"what was there"])
def test_nothing_half_written_remains(
    tmp_path: Path, write: Callable[[Path], object], error: type[Exception], old: bytes | None
) -> None:
    out = tmp_path / "out.safetensors"
    if old is not None:
        out.write_bytes(old)
    with pytest.raises(error):
        write(out)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([old] if old else [])


LIMITED = """
import resource, signal, sys
from pathlib import Path
from hotload.directory.files import write_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_atomic(Path(sys.argv[1]), bytes(100_000))
except OSError as error:
    print(error.errno)
"""


def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path: Path) -> None:
    found = in_child(LIMITED, tmp_path / "out")
    assert int(found) == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


COPYING = """
import sys
from pathlib import Path
from hotload.directory.files import copy_file
copy_file(*map(Path, sys.argv[1:]))
"""


@pytest.mark.slow
@signals_are_heard()
@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGKILL])
def test_a_write_that_is_broken_off_leaves_the_old_file(
    tmp_path: Path, ended_by: signal.Signals
) -> None:
    source, directory = tmp_path / "source", tmp_path / "c"
    with source.open("wb") as file:
        file.truncate(64 << 30)  # sparse, and too large to be copied before the signal
    directory.mkdir()
    out = directory / "out.safetensors"
    out.write_bytes(V0.read_bytes())
    program = [sys.executable, "-c", COPYING, source, out]
    root = Path(hotload.__file__).parents[1]
    with subprocess.Popen(program, cwd=root, stderr=subprocess.DEVNULL) as child:
        while len(list(directory.iterdir())) == 1:
            assert child.poll() is None
        child.send_signal(ended_by)
    assert child.returncode == -ended_by
    assert out.read_bytes() == V0.read_bytes()
    assert len(read_checkpoint(directory).shards) == 1
    # Nobody can tidy up behind a kill; what it leaves is hidden, and no part of a checkpoint.
    assert len(list(directory.iterdir())) == (2 if ended_by is signal.SIGKILL else 1)


def test_write_atomic_replaces_and_honours_the_umask(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    (tmp_path / "plain").write_bytes(b"")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_copies_carry_their_digest(tmp_path: Path) -> None:
    assert copy_file(V0, tmp_path / "copy") == hashlib.sha256(V0.read_bytes()).hexdigest()
    assert (tmp_path / "copy").read_bytes() == V0.read_bytes()


def test_clones_are_files_of_their_own(tmp_path: Path) -> None:
    source, clone = tmp_path / "source", tmp_path / "clone"
    source.write_bytes(V0.read_bytes())
    clone.write_bytes(b"what was there")
    clone_file(source, clone)
    source.write_bytes(b"changed later")
    assert clone.read_bytes() == V0.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clone", "source"]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is one file system")
def test_a_clone_onto_another_file_system_is_a_copy(tmp_path: Path) -> None:
    with NamedTemporaryFile(dir="/dev/shm") as source:
        source.write(V0.read_bytes())
        source.flush()
        clone_file(Path(source.name), tmp_path / "clone")
    assert (tmp_path / "clone").read_bytes() == V0.read_bytes()


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path, digests = tmp_path / "file", FileDigests()
    path.write_bytes(b"one")
    assert digests.known(path) is None
    first = digests.of(path)
    assert first == digests.known(path) == hashlib.sha256(b"one").hexdigest()
    other = tmp_path / "other"
    other.write_bytes(b"two")
    os.utime(other, ns=(0, path.stat().st_mtime_ns))
    other.replace(path)
    assert digests.known(path) is None
    assert digests.of(path) == hashlib.sha256(b"two").hexdigest()
    path.unlink()
    assert digests.known(path) is None


def test_a_change_in_place_is_seen_though_size_and_time_stay(tmp_path: Path) -> None:
    path, digests = tmp_path / "file", FileDigests()
    path.write_bytes(b"one")
    os.utime(path, ns=(0, 0))
    first, read_at = digests.of(path), path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == read_at:  # a file system's clock has ticks
        path.write_bytes(b"two")
        os.utime(path, ns=(0, 0))
    assert digests.of(path) != first


def test_a_link_that_comes_or_goes_is_no_change(tmp_path: Path) -> None:
    memory, directory, other = tmp_path / "digests.json", tmp_path / "ours", tmp_path / "theirs"
    directory.mkdir()
    path = directory / "file"
    path.write_bytes(b"one")
    digests = FileDigests(memory)
    digest = digests.of(path)
    wait_for_a_tick(path, tmp_path)
    os.link(path, other)
    assert digests.known(path) == digests.known(other) == digest
    digests.remember([directory])
    wait_for_a_tick(path, tmp_path)
    other.unlink()
    assert FileDigests(memory).known(path) == digests.known(path) == digest
    os.link(path, other)
    wait_for_a_tick(path, tmp_path)
    other.write_bytes(b"two")  # the same file by its other name
    assert digests.known(path) is None


def test_after_a_doubt_nothing_is_known_here_or_to_the_next_process(tmp_path: Path) -> None:
    memory, directory = tmp_path / "digests.json", tmp_path / "files"
    directory.mkdir()
    path = directory / "file"
    path.write_bytes(b"one")
    first = FileDigests(memory)
    digest = first.of(path)
    first.remember([directory])
    second = FileDigests(memory)
    assert second.known(path) == digest
    second.doubt()
    assert FileDigests(memory).known(path) is None  # also where this process ends here
    assert second.known(path) is None
    assert second.of(path) == second.known(path) == digest
    second.remember([directory])
    assert FileDigests(memory).known(path) is None


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (None, "no such file"),
        ("0" * 63 + "  a\n", "line 1"),
        ("0" * 64 + " a\n", "line 1"),
        ("0" * 64 + "  a\n" + "1" * 64 + " *a\n", "line 2"),
        ("0" * 64 + "  ../a\n", "line 1"),
        ("0" * 64 + "  a\n\n", "line 2"),
    ],
    ids=["missing", "no digest", "one space", "twice", "elsewhere", "an empty line"],
)
def test_supplied_digests_that_cannot_be_read_are_refused(
    tmp_path: Path, lines: str | None, words: str
) -> None:
    if lines is not None:
        (tmp_path / DIGESTS_FILE).write_text(lines)
    with pytest.raises(InvalidCheckpointError, match=words):
        read_supplied_digests(tmp_path)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no coreutils")
def test_supplied_digests_are_what_sha256sum_writes(tmp_path: Path) -> None:
    names = ["a b.safetensors", "c.safetensors"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    made = subprocess.run(["sha256sum", *names], cwd=tmp_path, check=True, stdout=subprocess.PIPE)
    (tmp_path / DIGESTS_FILE).write_bytes(made.stdout)
    assert read_supplied_digests(tmp_path) == {name: sha256_file(tmp_path / name) for name in names}


def wait_for_a_tick(path: Path, directory: Path) -> None:
    """Until the file system's clock is past the last change of `path`."""
    probe = directory / "probe"
    probe.touch()
    while probe.stat().st_ctime_ns == path.stat().st_ctime_ns:
        probe.touch()
    probe.unlink()


def test_remove_tree_takes_files_directories_links_and_nothing(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (tmp_path / "link").symlink_to(kept)
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "file").write_bytes(b"")
    for name in ("link", "tree", "file", "nothing"):
        remove_tree(tmp_path / name)
    assert list(tmp_path.iterdir()) == [kept]


MEASURED = """
import sys
from pathlib import Path
from hotload.directory.shards import (encode_file, verify_file)

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

base, target, out = map(Path, sys.argv[1:])
start = memory("VmRSS")
encode_file(base, target, out)
verify_file(base, out, target)
print(memory("VmHWM") - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    values = np.random.default_rng(6).integers(0, 256, 192 << 20, np.uint8)
    save_file({"w": values}, tmp_path / "base.safetensors")
    values[::997] ^= 1
    save_file({"w": values}, tmp_path / "target.safetensors")
    paths = (tmp_path / f"{name}.safetensors" for name in ("base", "target", "out"))
    found = in_child(MEASURED, *paths)
    assert int(found) < 48 << 10  # KiB; the tensor has 192 MiB


THROUGH_A_VIEW = (
    MEASURED.partition("base, target")[0]
    + """
from hotload.directory.files import clone_file, copy_file, sha256_file
from hotload.directory.relayout import view_checkpoint

old, new, out = map(Path, sys.argv[1:])
start = memory("VmRSS")
before, after = view_checkpoint(old), view_checkpoint(new)
for shard in after.checkpoint.shards:
    copy_file(before.file(shard.file), out / "base")
    sha256_file(after.file(shard.file))
    encode_file(out / "base", after.file(shard.file), out / "delta", self_check=True)
    clone_file(after.file(shard.file), out / "kept")
print(memory("VmHWM") - start)
"""
)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_a_tensor_of_another_layout(tmp_path: Path) -> None:
    values = np.random.default_rng(6).integers(0, 256, 64 << 20, np.uint8)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        tensor = values.view(np.float16).reshape(-1, 1024)
        layers = {f"model.layers.{number}.mlp.weight": tensor for number in range(2)}
        save_file(layers, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text('{"num_hidden_layers": 2}')
        values[::997] ^= 1
    found = in_child(THROUGH_A_VIEW, tmp_path / "old", tmp_path / "new", tmp_path)
    assert int(found) < 48 << 10  # KiB; a tensor has 64 MiB


@pytest.mark.parametrize(
    "name", ["trainer_state.json", "optimizer.pt", "rng_state_0.pth", "training_args.bin"]
)
def test_what_a_trainer_keeps_for_itself_is_no_part_of_a_checkpoint(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / name).write_bytes(b"changes with every step")
    (file,) = read_checkpoint(tmp_path).side_files
    assert file.file == "config.json"


def test_digests_are_remembered_for_the_next_process(tmp_path: Path) -> None:
    directory, memory = tmp_path / "files", tmp_path / "memory" / "digests.json"
    directory.mkdir()
    for name in ("kept", "changed", "other"):
        (directory / name).write_bytes(name.encode())
    outside = tmp_path / "outside"
    outside.write_bytes(b"outside")
    first = FileDigests(memory)
    known = {path: first.of(path) for path in (*directory.iterdir(), outside)}
    first.remember([directory])
    moved = directory.rename(tmp_path / "moved")
    (moved / "changed").write_bytes(b"something else")
    second = FileDigests(memory)
    assert second.known(moved / "kept") == known[directory / "kept"]
    assert second.known(moved / "changed") is None
    assert second.known(outside) is None
    memory.write_bytes(b'[["not", "a", "state"]]')
    assert FileDigests(memory).known(moved / "kept") is None
