"""Whole directories in every dialect: there and back, refused, converted, folded, broken off."""

import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import hotload
from hotload.checkpoint.index_and_spec import build_index, build_spec
from hotload.checkpoint.names import CONFIG_FILE, INDEX_FILE, SPEC_FILE
from hotload.checkpoint.rules import check_full
from hotload.delta.checksums import Checksum
from hotload.delta.dialects import Dialect, Lineage
from hotload.delta.rules import check_delta
from hotload.directory.files import new_directory
from hotload.directory.inputs import open_delta
from hotload.directory.operations import (
    ByteProgress,
    apply_directory,
    convert_directory,
    encode_directory,
    fold_directory,
    verify_directory,
)
from hotload.directory.shards import open_shard, read_checkpoint
from hotload.errors import (
    ChecksumMismatchError,
    DeltaError,
    InvalidCheckpointError,
    InvalidIdentityError,
    LayoutMismatchError,
)
from tests.hotload import slime_receiver
from tests.signals import signals_are_heard

GOLDEN = Path(__file__).parents[1] / "golden"
HOSTILE = sorted((GOLDEN / "hostile").glob("delta-*.safetensors"))
DRESSES = [
    (Dialect.FIREWORKS, Checksum.ADLER32),
    (Dialect.COREWEAVE, Checksum.ADLER32),
    *((Dialect.SLIME, checksum) for checksum in Checksum),
]
EMBED, LAYER, FROZEN, NORM = (
    f"model-{name}.safetensors" for name in ("embed", "layer-0", "layer-1", "norm")
)


def lineage_of(dialect: Dialect, step: int = 1) -> Lineage | None:
    return {
        Dialect.FIREWORKS: None,
        Dialect.SLIME: Lineage(f"{step:06d}", f"{step - 1:06d}"),
        Dialect.COREWEAVE: Lineage(f"run-{step}", f"run-{step - 1}"),
    }[dialect]


class Trainer:
    """A run whose every step is a checkpoint directory; one layer is frozen."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.generator = np.random.default_rng(11)
        words = self.generator.integers(0, 1 << 16, (300, 250), np.uint16)
        self.shards: dict[str, dict[str, Any]] = {
            EMBED: {"model.embed_tokens.weight": words},
            LAYER: {
                "model.layers.0.w": self.generator.standard_normal((64, 33)).astype(np.float16),
                "model.layers.0.scale": np.full((), 0.5, np.float32),
                "model.layers.0.none": np.ones((0, 4), np.int8),
                "model.layers.0.mask": np.ones(9, np.bool_),
            },
            FROZEN: {"model.layers.1.w": np.full((700, 300), 7, np.uint8)},
            NORM: {"model.norm.weight": np.ones(50, np.float32)},
        }
        self.step = 0

    def save(self) -> Path:
        path = self.directory / f"step-{self.step}"
        path.mkdir()
        for file, tensors in self.shards.items():
            save_file(tensors, path / file, {"format": "pt"})
        headers = []
        for file in sorted(path.iterdir()):
            with open_shard(file) as shard:
                headers.append(shard.header)
        (path / INDEX_FILE).write_bytes(build_index(headers))
        (path / SPEC_FILE).write_bytes(build_spec(headers))
        (path / CONFIG_FILE).write_text(json.dumps({"model_type": "llama"}))
        (path / "tokenizer.json").write_text('{"a": 0}')
        self.step += 1
        return path

    def train(self) -> None:
        """Move some elements of every tensor that is not frozen."""
        for tensors in (self.shards[EMBED], self.shards[LAYER]):
            for name, values in tensors.items():
                moved = values.copy()
                if moved.size:
                    flat = moved.reshape(-1).view(np.uint8)
                    flat[self.generator.integers(0, len(flat), len(flat) // 90 + 1)] ^= 1
                tensors[name] = moved


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tmp_path)


@pytest.fixture
def pair(trainer: Trainer) -> tuple[Path, Path]:
    base = trainer.save()
    trainer.train()
    return base, trainer.save()


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def rewrite(path: Path, change: Callable[[dict], None]) -> None:
    """Change the header of a shard, not its payloads."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


# There and back


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("dialect", "checksum"), DRESSES)
def test_a_delta_restores_its_target(
    pair: tuple[Path, Path], tmp_path: Path, dialect: Dialect, checksum: Checksum, workers: int
) -> None:
    base, target = pair
    before = contents(base)
    stats = encode_directory(
        base,
        target,
        tmp_path / "delta",
        dialect=dialect,
        checksum=checksum,
        lineage=lineage_of(dialect),
        workers=workers,
    )
    verify_directory(base, tmp_path / "delta", target, workers=workers)
    apply_directory(base, tmp_path / "delta", tmp_path / "restored", workers=workers)
    assert contents(tmp_path / "restored") == contents(target)
    assert contents(base) == before
    assert check_full(read_checkpoint(tmp_path / "restored")) == ()
    assert stats.size_bytes == sum(map(len, contents(tmp_path / "delta").values()))
    assert {tensor.name for tensor in stats.tensors if tensor.is_unchanged} == {
        "model.layers.0.none",
        "model.layers.1.w",
        "model.norm.weight",
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "delta",
        "restored",
        "step-0",
        "step-1",
    ]


def test_a_fireworks_delta_is_laid_out_as_its_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, target = pair
    encode_directory(base, target, tmp_path / "delta")
    assert check_delta(read_checkpoint(tmp_path / "delta"), read_checkpoint(base)) == ()
    found, expected = contents(tmp_path / "delta"), contents(base)
    assert found.keys() == expected.keys()
    for file in (INDEX_FILE, SPEC_FILE, CONFIG_FILE, "tokenizer.json"):
        assert found[file] == expected[file]


@pytest.mark.parametrize(("dialect", "checksum"), DRESSES[1:])
def test_the_others_hold_an_index_and_what_changed(
    pair: tuple[Path, Path], tmp_path: Path, dialect: Dialect, checksum: Checksum
) -> None:
    delta = tmp_path / "delta"
    lineage = lineage_of(dialect)
    encode_directory(*pair, delta, dialect=dialect, checksum=checksum, lineage=lineage)
    assert contents(delta).keys() == {EMBED, LAYER, INDEX_FILE}
    index = json.loads((delta / INDEX_FILE).read_bytes())
    assert index["metadata"] == {
        "version": lineage.version,
        "base_version": lineage.base_version,
        "delta_encoding": "xor",
        "compression_format": "zstd",
        "checksum_format": checksum.value,
    }
    assert index["weight_map"] == {
        "model.embed_tokens.weight": EMBED,
        "model.layers.0.w": LAYER,
        "model.layers.0.scale": LAYER,
        "model.layers.0.mask": LAYER,
    }
    with open_shard(delta / EMBED) as shard:
        (text,) = shard.header.metadata.values()
    assert len(text) == checksum.digits
    with open_delta(delta) as opened:
        assert (opened.dialect, opened.lineage) == (dialect, lineage)
        assert opened.envelope.checksum is checksum
        assert {name: one.file for name, one in opened.payloads.items()} == index["weight_map"]


@pytest.mark.parametrize(("dialect", "checksum"), DRESSES)
def test_no_change_is_a_delta_too(
    pair: tuple[Path, Path], tmp_path: Path, dialect: Dialect, checksum: Checksum
) -> None:
    base, _ = pair
    lineage = lineage_of(dialect)
    delta = tmp_path / "delta"
    encode_directory(base, base, delta, dialect=dialect, checksum=checksum, lineage=lineage)
    if dialect is not Dialect.FIREWORKS:
        assert contents(delta).keys() == {INDEX_FILE}
        assert json.loads((delta / INDEX_FILE).read_bytes())["weight_map"] == {}
    verify_directory(base, delta, base)
    apply_directory(base, delta, tmp_path / "restored")
    assert contents(tmp_path / "restored") == contents(base)


def test_a_checkpoint_in_a_single_file_needs_no_index(tmp_path: Path) -> None:
    for name, step in (("base", 0), ("target", 1)):
        (tmp_path / name).mkdir()
        save_file({"w": np.arange(9) + step}, tmp_path / name / "model.safetensors")
        (tmp_path / name / CONFIG_FILE).write_text("{}")
    for dialect, checksum in DRESSES:
        delta, out = tmp_path / f"d-{dialect}-{checksum}", tmp_path / f"o-{dialect}-{checksum}"
        encode_directory(
            tmp_path / "base",
            tmp_path / "target",
            delta,
            dialect=dialect,
            checksum=checksum,
            lineage=lineage_of(dialect),
        )
        apply_directory(tmp_path / "base", delta, out)
        assert contents(out) == contents(tmp_path / "target")


def test_shards_of_others_may_be_cut_otherwise(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A slime trainer writes shards of its own making; receivers go by tensor names."""
    base, target = pair
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    encode_directory(base, target, ours, dialect=Dialect.SLIME, lineage=lineage_of(Dialect.SLIME))
    theirs.mkdir()
    frames, checksums = {}, {}
    for file in (EMBED, LAYER):
        frames |= load_file(ours / file)
        with open_shard(ours / file) as shard:
            checksums |= shard.header.metadata
    weight_map = {}
    for number, name in enumerate(sorted(frames, reverse=True)):
        file = f"model-{number:05d}-of-{len(frames):05d}.safetensors"
        save_file({name: frames[name]}, theirs / file, {name: checksums[name], "format": "pt"})
        weight_map[name] = file
    index = json.loads((ours / INDEX_FILE).read_bytes())
    (theirs / INDEX_FILE).write_text(json.dumps(index | {"weight_map": weight_map}))
    apply_directory(base, theirs, tmp_path / "restored", workers=2)
    assert contents(tmp_path / "restored") == contents(target)
    convert_directory(theirs, tmp_path / "arc", dialect=Dialect.FIREWORKS, base=base)
    encode_directory(base, target, tmp_path / "direct")
    assert contents(tmp_path / "arc") == contents(tmp_path / "direct")


def test_progress_grows_to_all_there_is(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, target = pair
    slime, arc, back, delta = (tmp_path / name for name in ("slime", "arc", "back", "delta"))
    lineage = lineage_of(Dialect.SLIME)

    def runs() -> list[Callable[[ByteProgress], object]]:
        return [
            lambda tell: encode_directory(base, target, delta, workers=3, progress=tell),
            lambda tell: apply_directory(base, delta, tmp_path / "o", workers=3, progress=tell),
            lambda tell: verify_directory(base, delta, target, workers=3, progress=tell),
            lambda tell: convert_directory(
                delta, slime, dialect=Dialect.SLIME, lineage=lineage, workers=3, progress=tell
            ),
            lambda tell: convert_directory(
                slime, back, dialect=Dialect.FIREWORKS, base=base, workers=3, progress=tell
            ),
            lambda tell: fold_directory([delta, delta], arc, workers=3, progress=tell),
        ]

    for run in runs():
        told: list[tuple[int, int]] = []
        run(lambda done, total, told=told: told.append((done, total)))
        (total,) = {total for _, total in told}
        assert [done for done, _ in told] == sorted(done for done, _ in told)
        assert told[-1] == (total, total)


# A receiver that is not ours


@pytest.mark.parametrize("checksum", list(Checksum))
def test_a_slime_receiver_walks_our_chain(
    trainer: Trainer, tmp_path: Path, checksum: Checksum
) -> None:
    local, source = tmp_path / "local", tmp_path / "source"
    previous = trainer.save()
    slime_receiver.seed(local, previous)
    source.mkdir()
    for version in range(1, 5):
        trainer.train()
        target = trainer.save()
        encode_directory(
            previous,
            target,
            source / f"weight_v{version:06d}",
            dialect=Dialect.SLIME,
            checksum=checksum,
            lineage=lineage_of(Dialect.SLIME, version),
        )
        previous = target
    slime_receiver.pull(local, source, 2)
    slime_receiver.pull(local, source, 4)
    assert slime_receiver.applied(local) == "000004"
    shutil.rmtree(local / ".weight_sync")
    assert contents(local) == contents(previous)


def test_a_slime_receiver_counts_on_past_six_digits(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    local, source = tmp_path / "local", tmp_path / "source"
    base, target = pair
    slime_receiver.seed(local, base)
    (local / ".weight_sync" / "state.json").write_text('{"version": "999999"}')
    source.mkdir()
    delta = source / "weight_v1000000"
    lineage = Lineage("1000000", "999999")
    encode_directory(base, target, delta, dialect=Dialect.SLIME, lineage=lineage)
    slime_receiver.pull(local, source, 1_000_000)
    assert slime_receiver.applied(local) == "1000000"
    assert (local / EMBED).read_bytes() == (target / EMBED).read_bytes()


def test_a_slime_receiver_takes_a_fireworks_delta_that_was_converted(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    local, source = tmp_path / "local", tmp_path / "source"
    base, target = pair
    source.mkdir()
    slime_receiver.seed(local, base)
    encode_directory(base, target, tmp_path / "arc")
    delta = source / "weight_v000001"
    convert_directory(
        tmp_path / "arc", delta, dialect=Dialect.SLIME, lineage=lineage_of(Dialect.SLIME)
    )
    slime_receiver.pull(local, source, 1)
    assert (local / LAYER).read_bytes() == (target / LAYER).read_bytes()


def test_a_slime_receiver_refuses_decimals_and_a_gap(trainer: Trainer, tmp_path: Path) -> None:
    """What the rules above are for."""
    local, source = tmp_path / "local", tmp_path / "source"
    base = trainer.save()
    trainer.train()
    target = trainer.save()
    slime_receiver.seed(local, base)
    source.mkdir()
    lineage = lineage_of(Dialect.SLIME, 2)
    delta = source / "weight_v000001"
    encode_directory(base, target, delta, dialect=Dialect.SLIME, lineage=lineage)
    with pytest.raises(RuntimeError, match="at 000000, the delta follows 000001"):
        slime_receiver.pull(local, source, 1)
    encode_directory(base, target, tmp_path / "arc")
    shutil.copyfile(tmp_path / "arc" / EMBED, delta / EMBED)
    index = (delta / INDEX_FILE).read_text().replace("000001", "000000")
    (delta / INDEX_FILE).write_text(index)
    with pytest.raises(RuntimeError, match="checksum mismatch"):
        slime_receiver.pull(local, source, 1)


# Chains and folds


@pytest.fixture
def chain(trainer: Trainer) -> list[Path]:
    """Twenty-six checkpoints in a row."""
    paths = [trainer.save()]
    for _ in range(25):
        trainer.train()
        paths.append(trainer.save())
    return paths


@pytest.mark.slow
def test_twenty_five_steps_equal_the_last_full_and_their_fold(
    chain: list[Path], tmp_path: Path
) -> None:
    deltas = [tmp_path / f"delta-{step:02d}" for step in range(25)]
    for step, delta in enumerate(deltas):
        encode_directory(chain[step], chain[step + 1], delta, workers=2)
    current = chain[0]
    for step, delta in enumerate(deltas):
        apply_directory(current, delta, tmp_path / f"now-{step}")
        current = tmp_path / f"now-{step}"
    assert contents(current) == contents(chain[-1])
    fold_directory(deltas, tmp_path / "fold")
    verify_directory(chain[0], tmp_path / "fold", chain[-1])
    fold_directory(deltas[5:9], tmp_path / "part", workers=2)
    apply_directory(chain[5], tmp_path / "part", tmp_path / "after")
    assert contents(tmp_path / "after") == contents(chain[9])
    assert check_delta(read_checkpoint(tmp_path / "fold"), read_checkpoint(chain[0])) == ()


@pytest.mark.parametrize(("dialect", "checksum"), DRESSES[1:])
def test_a_fold_tells_from_where_to_where(
    trainer: Trainer, tmp_path: Path, dialect: Dialect, checksum: Checksum
) -> None:
    paths = [trainer.save()]
    deltas = []
    for step in range(1, 4):
        trainer.train()
        paths.append(trainer.save())
        deltas.append(tmp_path / f"delta-{step}")
        lineage = lineage_of(dialect, step)
        encode_directory(
            paths[-2], paths[-1], deltas[-1], dialect=dialect, checksum=checksum, lineage=lineage
        )
    fold_directory(deltas, tmp_path / "fold")
    verify_directory(paths[0], tmp_path / "fold", paths[-1])
    first, last = lineage_of(dialect, 1), lineage_of(dialect, 3)
    with open_delta(tmp_path / "fold") as folded:
        assert folded.lineage == Lineage(last.version, first.base_version)
        assert folded.envelope.checksum is checksum
    for wrong in (deltas[::-1], [deltas[0], deltas[2]], [deltas[0], deltas[0]]):
        with pytest.raises(DeltaError, match="follows"):
            fold_directory(wrong, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_a_fold_for_slime_is_converted_to_the_number_it_waits_for(
    trainer: Trainer, tmp_path: Path
) -> None:
    local, source = tmp_path / "local", tmp_path / "source"
    source.mkdir()
    paths, deltas = [trainer.save()], []
    slime_receiver.seed(local, paths[0])
    for step in (1, 2):
        trainer.train()
        paths.append(trainer.save())
        deltas.append(tmp_path / f"delta-{step}")
        lineage = lineage_of(Dialect.SLIME, step)
        encode_directory(*paths[-2:], deltas[-1], dialect=Dialect.SLIME, lineage=lineage)
    fold_directory(deltas, tmp_path / "fold")
    lineage = lineage_of(Dialect.SLIME)
    renumbered = source / "weight_v000001"
    convert_directory(tmp_path / "fold", renumbered, dialect=Dialect.SLIME, lineage=lineage)
    slime_receiver.pull(local, source, 1)
    assert (local / LAYER).read_bytes() == (paths[-1] / LAYER).read_bytes()


def test_deltas_of_other_kinds_do_not_fold(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, target = pair
    arc, slime, blake, other = (tmp_path / name for name in ("arc", "slime", "blake", "other"))
    encode_directory(base, target, arc)
    lineages = [lineage_of(Dialect.SLIME, step) for step in (1, 2)]
    encode_directory(base, target, slime, dialect=Dialect.SLIME, lineage=lineages[0])
    encode_directory(
        target,
        base,
        blake,
        dialect=Dialect.SLIME,
        checksum=Checksum.BLAKE3,
        lineage=lineages[1],
    )
    for wrong in ([arc, slime], [slime, blake]):
        with pytest.raises(DeltaError, match="another dialect or checksum"):
            fold_directory(wrong, tmp_path / "out")
    shutil.copytree(arc, other)
    (other / CONFIG_FILE).write_text("{}")
    with pytest.raises(DeltaError, match="other files beside the shards than in arc"):
        fold_directory([arc, other], tmp_path / "out")
    shutil.copyfile(arc / CONFIG_FILE, other / CONFIG_FILE)
    (other / INDEX_FILE).unlink()
    (other / NORM).unlink()
    with pytest.raises(DeltaError, match="other tensors or shards"):
        fold_directory([arc, other], tmp_path / "out")
    with pytest.raises(DeltaError, match="found no delta"):
        fold_directory([], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Converting


def test_the_contracts_file_changes_its_dress_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "arc").mkdir()
    (tmp_path / "base").mkdir()
    shutil.copyfile(GOLDEN / "delta.safetensors", tmp_path / "arc" / "w.safetensors")
    shutil.copyfile(GOLDEN / "v0.safetensors", tmp_path / "base" / "w.safetensors")
    hexed = (GOLDEN / "delta-hex.safetensors").read_bytes()
    for dialect in (Dialect.SLIME, Dialect.COREWEAVE):
        out, back = tmp_path / dialect, tmp_path / f"back-{dialect}"
        convert_directory(tmp_path / "arc", out, dialect=dialect, lineage=lineage_of(dialect))
        assert (out / "w.safetensors").read_bytes() == hexed
        convert_directory(out, back, dialect=Dialect.FIREWORKS, base=tmp_path / "base")
        assert contents(back) == contents(tmp_path / "arc")


@pytest.mark.parametrize("start", [Dialect.FIREWORKS, Dialect.SLIME, Dialect.COREWEAVE])
@pytest.mark.parametrize("end", [Dialect.FIREWORKS, Dialect.SLIME, Dialect.COREWEAVE])
def test_a_converted_delta_is_the_one_that_would_have_been_encoded(
    pair: tuple[Path, Path], tmp_path: Path, start: Dialect, end: Dialect
) -> None:
    base, target = pair
    lineages = lineage_of(start), lineage_of(end)
    encode_directory(base, target, tmp_path / "one", dialect=start, lineage=lineages[0])
    encode_directory(base, target, tmp_path / "direct", dialect=end, lineage=lineages[1])
    convert_directory(
        tmp_path / "one", tmp_path / "other", dialect=end, lineage=lineages[1], base=base, workers=2
    )
    assert contents(tmp_path / "other") == contents(tmp_path / "direct")


def test_a_conversion_reads_no_base_it_does_not_need(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    encode_directory(*pair, tmp_path / "arc")
    nowhere = tmp_path / "nowhere"
    lineage = lineage_of(Dialect.SLIME)
    convert_directory(
        tmp_path / "arc", tmp_path / "slime", dialect=Dialect.SLIME, lineage=lineage, base=nowhere
    )
    with pytest.raises(InvalidCheckpointError, match="nowhere"):
        convert_directory(
            tmp_path / "slime", tmp_path / "back", dialect=Dialect.FIREWORKS, base=nowhere
        )


def test_what_a_conversion_cannot_do(
    trainer: Trainer, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, target = pair
    slime, blake, out = tmp_path / "slime", tmp_path / "blake", tmp_path / "out"
    lineage = lineage_of(Dialect.SLIME)
    encode_directory(base, target, slime, dialect=Dialect.SLIME, lineage=lineage)
    encode_directory(
        base, target, blake, dialect=Dialect.SLIME, checksum=Checksum.BLAKE3, lineage=lineage
    )
    for dialect in (Dialect.FIREWORKS, Dialect.COREWEAVE):
        with pytest.raises(DeltaError, match=r"adler32, not blake3.*encode again"):
            convert_directory(blake, out, dialect=dialect, lineage=lineage_of(dialect), base=base)
    with pytest.raises(DeltaError, match="a base is needed"):
        convert_directory(slime, out, dialect=Dialect.FIREWORKS)
    with pytest.raises(InvalidIdentityError, match="state a version"):
        convert_directory(slime, out, dialect=Dialect.COREWEAVE)
    with pytest.raises(InvalidIdentityError, match="in the signal"):
        convert_directory(slime, out, dialect=Dialect.FIREWORKS, lineage=lineage, base=base)
    del trainer.shards[LAYER]
    smaller = trainer.save()
    with pytest.raises(DeltaError, match="not a tensor of the base"):
        convert_directory(slime, out, dialect=Dialect.FIREWORKS, base=smaller)
    assert not out.exists()


# Refusals of encode


def refused_encode(
    base: Path, target: Path, error: type[Exception], told: str, **options: object
) -> None:
    before, there = contents(base), sorted(base.parent.iterdir())
    with pytest.raises(error, match=told):
        encode_directory(base, target, base.parent / "out", **options)
    assert sorted(base.parent.iterdir()) == there
    assert contents(base) == before


@pytest.mark.parametrize("dialect", list(Dialect))
@pytest.mark.parametrize(
    ("file", "data"),
    [
        (CONFIG_FILE, b"{}"),
        ("tokenizer.json", b"{}"),
        ("new_config.json", b"{}"),
        (SPEC_FILE, b'{"tensor_map": {}}'),
    ],
)
def test_a_changed_side_file_needs_a_full(
    pair: tuple[Path, Path], dialect: Dialect, file: str, data: bytes
) -> None:
    base, target = pair
    (target / file).write_bytes(data)
    options = {"dialect": dialect, "lineage": lineage_of(dialect)}
    refused_encode(
        base, target, LayoutMismatchError, f"beside the shards changed: {file}", **options
    )


def test_another_layout_needs_a_full(trainer: Trainer) -> None:
    base = trainer.save()
    kept = {file: dict(tensors) for file, tensors in trainer.shards.items()}
    changes: list[tuple[Callable[[dict], object], str]] = [
        (lambda shards: shards[NORM].update({"more": np.ones(3)}), "tensors of"),
        (lambda shards: shards[NORM].update({"model.norm.weight": np.ones(50)}), "from F32"),
        (lambda shards: shards.update({"z.safetensors": shards.pop(NORM)}), "shard files changed"),
    ]
    for change, told in changes:
        trainer.shards = {file: dict(tensors) for file, tensors in kept.items()}
        change(trainer.shards)
        refused_encode(base, trainer.save(), LayoutMismatchError, told)


def test_what_is_no_whole_checkpoint_has_no_deltas(pair: tuple[Path, Path]) -> None:
    base, target = pair
    (base.parent / "empty").mkdir()
    refused_encode(base.parent / "empty", target, InvalidCheckpointError, "no_shard")
    refused_encode(base, base.parent / "absent", InvalidCheckpointError, "missing_directory")
    (target / NORM).unlink()
    refused_encode(base, target, InvalidCheckpointError, "missing_shard")
    (target / NORM).write_bytes(b"garbage of a shard")
    refused_encode(base, target, InvalidCheckpointError, "header_too_large")
    shutil.copyfile(base / LAYER, target / NORM)
    refused_encode(base, target, InvalidCheckpointError, "duplicate_tensor")
    (target / INDEX_FILE).unlink()
    refused_encode(base, target, InvalidCheckpointError, "duplicate_tensor")
    (target / INDEX_FILE).write_text('{"weight_map": 1}')
    refused_encode(base, target, InvalidCheckpointError, "an object")
    (target / "adapter_config.json").write_text("{}")
    refused_encode(base, target, InvalidCheckpointError, "an adapter has no deltas")


def test_a_lineage_or_checksum_of_another_dialect_is_refused(pair: tuple[Path, Path]) -> None:
    slime = {"dialect": Dialect.SLIME}
    refused_encode(*pair, InvalidIdentityError, "state a version", **slime)
    refused_encode(*pair, InvalidIdentityError, "six digits", **slime, lineage=Lineage("b", "a"))
    refused_encode(*pair, InvalidIdentityError, "signal", lineage=Lineage("b", "a"))
    refused_encode(*pair, DeltaError, "adler32, not blake3", checksum=Checksum.BLAKE3)


# Refusals of apply and verify


def refused_apply(base: Path, delta: Path, error: type[Exception], told: str) -> None:
    """Refused, with the base as it was and nothing written."""
    before, there = contents(base), sorted(base.parent.iterdir())
    threads = threading.active_count()
    for workers in (1, 3):
        with pytest.raises(error, match=told):
            apply_directory(base, delta, base.parent / "out", workers=workers)
        assert sorted(base.parent.iterdir()) == there
        assert threading.active_count() == threads
    assert contents(base) == before
    with pytest.raises(DeltaError, match=f"{told}|restores other bytes"):
        verify_directory(base, delta, base)


@pytest.fixture(params=list(Dialect))
def dressed(request: pytest.FixtureRequest, pair: tuple[Path, Path], tmp_path: Path) -> Path:
    """A delta on the pair in each dialect."""
    lineage = lineage_of(request.param)
    encode_directory(*pair, tmp_path / "delta", dialect=request.param, lineage=lineage)
    return tmp_path / "delta"


def test_a_wrong_base_is_refused(trainer: Trainer, dressed: Path) -> None:
    trainer.train()
    refused_apply(trainer.save(), dressed, ChecksumMismatchError, "checksum is")


def test_a_delta_is_not_applied_twice(pair: tuple[Path, Path], dressed: Path) -> None:
    refused_apply(pair[1], dressed, ChecksumMismatchError, "checksum is")


def test_a_delta_that_lacks_what_its_index_lists_is_refused(
    pair: tuple[Path, Path], dressed: Path
) -> None:
    (dressed / LAYER).unlink()
    refused_apply(pair[0], dressed, DeltaError, f"{LAYER}.*missing_shard")


def test_a_stray_shard_is_not_applied(pair: tuple[Path, Path], dressed: Path) -> None:
    shutil.copyfile(dressed / LAYER, dressed / "stray.safetensors")
    refused_apply(pair[0], dressed, DeltaError, "stray.safetensors.*stray_shard")


def test_a_damaged_shard_is_refused(pair: tuple[Path, Path], dressed: Path) -> None:
    path = dressed / EMBED
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    refused_apply(pair[0], dressed, DeltaError, EMBED)
    path.write_bytes(data[:-5])
    refused_apply(pair[0], dressed, DeltaError, f"{EMBED}.*truncated")


def test_a_checksum_that_is_missing_or_spelled_otherwise_is_refused(
    pair: tuple[Path, Path], dressed: Path
) -> None:
    name = "model.layers.0.w"
    texts = [None, "", "G" * 8, "1c8a046", "1C8A0466", " 1", "00000000001", "-1", "+1"]
    original = (dressed / LAYER).read_bytes()
    for text in texts:

        def spell(header: dict, text: str | None = text) -> None:
            header["__metadata__"].pop(name)
            if text is not None:
                header["__metadata__"][name] = text

        (dressed / LAYER).write_bytes(original)
        rewrite(dressed / LAYER, spell)
        refused_apply(pair[0], dressed, DeltaError, f"{LAYER}.*checksum")


def test_foreign_metadata_is_let_be(pair: tuple[Path, Path], dressed: Path) -> None:
    rewrite(dressed / LAYER, lambda header: header["__metadata__"].update({"format": "pt"}))
    verify_directory(pair[0], dressed, pair[1])


def test_a_tensor_the_base_does_not_know_is_refused(pair: tuple[Path, Path], dressed: Path) -> None:
    def rename(header: dict) -> None:
        for entries in (header, header["__metadata__"]):
            entries["model.layers.9.w"] = entries.pop("model.layers.0.w")

    rewrite(dressed / LAYER, rename)
    index = (dressed / INDEX_FILE).read_text().replace("model.layers.0.w", "model.layers.9.w")
    (dressed / INDEX_FILE).write_text(index)
    refused_apply(pair[0], dressed, DeltaError, "layers.9.w: not a tensor of the base")


def test_a_fireworks_delta_has_to_hold_every_tensor_where_its_base_does(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    delta = tmp_path / "delta"
    encode_directory(*pair, delta)
    (delta / INDEX_FILE).unlink()
    (delta / NORM).rename(delta / "other.safetensors")
    refused_apply(pair[0], delta, DeltaError, "norm.weight: found other.safetensors, expected one")
    (delta / "other.safetensors").unlink()
    refused_apply(pair[0], delta, DeltaError, f"{NORM}.*found no payload")


def test_side_files_of_another_base_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    delta = tmp_path / "delta"
    encode_directory(*pair, delta)
    (delta / "tokenizer.json").write_text("{}")
    refused_apply(pair[0], delta, DeltaError, "tokenizer.json: not the bytes of the base")


def test_a_payload_of_another_size_is_refused(pair: tuple[Path, Path], dressed: Path) -> None:
    base, _ = pair
    tensors = load_file(base / LAYER)
    tensors["model.layers.0.mask"] = np.ones(10, np.bool_)
    save_file(tensors, base / LAYER)
    refused_apply(base, dressed, DeltaError, "mask: frame states 9 bytes, the tensor has 10")


def test_overwrite_is_named_as_not_supported(pair: tuple[Path, Path], tmp_path: Path) -> None:
    delta = tmp_path / "delta"
    lineage = lineage_of(Dialect.SLIME)
    encode_directory(*pair, delta, dialect=Dialect.SLIME, lineage=lineage)
    index = (delta / INDEX_FILE).read_text().replace('"xor"', '"overwrite"')
    (delta / INDEX_FILE).write_text(index)
    refused_apply(pair[0], delta, DeltaError, "'overwrite'.*no other is supported")


def test_what_is_no_delta_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused_apply(pair[0], tmp_path / "empty", DeltaError, "neither shards nor the index")
    refused_apply(pair[0], tmp_path / "absent", DeltaError, "no such directory")
    refused_apply(pair[0], pair[1], DeltaError, "payload: found U16")


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda path: path.stem)
def test_hostile_deltas_are_refused_as_directories_too(tmp_path: Path, hostile: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "delta").mkdir()
    shutil.copyfile(GOLDEN / "v0.safetensors", tmp_path / "base" / "w.safetensors")
    shutil.copyfile(hostile, tmp_path / "delta" / "w.safetensors")
    refused_apply(tmp_path / "base", tmp_path / "delta", DeltaError, ".")


def test_verify_tells_a_target_that_is_another(
    trainer: Trainer, pair: tuple[Path, Path], dressed: Path
) -> None:
    trainer.train()
    other = trainer.save()
    with pytest.raises(DeltaError, match="restores other bytes"):
        verify_directory(pair[0], dressed, other, workers=2)
    (other / CONFIG_FILE).write_text("{}")
    with pytest.raises(LayoutMismatchError, match=CONFIG_FILE):
        verify_directory(pair[0], dressed, other)


# Where it goes, and being broken off


def test_an_output_takes_no_place_that_is_taken(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    encode_directory(*pair, out)  # an empty directory will do
    kept = contents(out)
    with pytest.raises(FileExistsError):
        encode_directory(*pair, out)
    assert contents(out) == kept
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileExistsError):
        encode_directory(*pair, tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="no such directory"):
        encode_directory(*pair, tmp_path / "absent" / "out")
    with pytest.raises(OSError, match="may not lie in an input"):
        encode_directory(*pair, pair[0] / "out")
    assert contents(pair[0]).keys() == contents(pair[1]).keys()


def test_an_output_may_be_named_from_here(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    encode_directory(Path("step-0"), Path("step-1"), Path("here/../delta/"))
    verify_directory(*pair[:1], tmp_path / "delta", pair[1])


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_whatever_breaks_it_off_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path, error: type[BaseException], workers: int
) -> None:
    base, target = pair
    delta, out = tmp_path / "delta", tmp_path / "out"
    encode_directory(base, target, delta)
    there = {path: contents(path) for path in tmp_path.iterdir()}
    threads = threading.active_count()

    def fail(done: int, total: int) -> None:
        if 3 * done > total:
            raise error

    told = {"workers": workers, "progress": fail}
    dress = {"dialect": Dialect.SLIME, "lineage": lineage_of(Dialect.SLIME)}
    runs: list[Callable[[], object]] = [
        lambda: encode_directory(base, target, out, **told),
        lambda: apply_directory(base, delta, out, **told),
        lambda: verify_directory(base, delta, target, **told),
        lambda: convert_directory(delta, out, **dress, **told),
        lambda: fold_directory([delta, delta], out, **told),
    ]
    for run in runs:
        with pytest.raises(error):
            run()
        assert {path: contents(path) for path in tmp_path.iterdir()} == there
        assert threading.active_count() == threads


FEW_FILES = """
import resource, sys
from pathlib import Path
from typing import Any
from hotload.directory.operations import fold_directory
*deltas, out = map(Path, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
fold_directory(deltas, out)
"""


def test_a_fold_opens_one_file_of_each_delta_at_a_time(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    base, target = pair
    delta = tmp_path / "delta"
    encode_directory(base, target, delta)
    program = [sys.executable, "-c", FEW_FILES, *[delta] * 25, tmp_path / "fold"]
    root = Path(hotload.__file__).parents[1]
    subprocess.run(program, cwd=root, check=True)
    verify_directory(base, tmp_path / "fold", target)  # an odd number of times the same change


ENDLESS = """
import sys
from pathlib import Path
from typing import Any
from hotload.directory.operations import encode_directory
base, target, out = map(Path, sys.argv[1:])
encode_directory(base, target, out, workers=2, progress=lambda *_: print("on", flush=True))
"""


@pytest.mark.slow
@signals_are_heard()
@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_it_soon(tmp_path: Path, ended_by: signal.Signals) -> None:
    """Two sparse shards of 200 GB take minutes; a third of a second into them comes the signal."""
    size = 200_000_000_000
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    for name in ("base", "target"):
        (tmp_path / name).mkdir()
        for number in range(2):
            text = json.dumps({f"w{number}": entry}).encode()
            text = text.ljust(-(-len(text) // 8) * 8)
            with (tmp_path / name / f"{number}.safetensors").open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(8 + len(text) + size)
    paths = [tmp_path / name for name in ("base", "target", "out")]
    program = [sys.executable, "-c", ENDLESS, *paths]
    root = Path(hotload.__file__).parents[1]
    with subprocess.Popen(
        program, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as child:
        assert child.stdout
        for _ in range(20):
            assert child.stdout.readline() == b"on\n"
        child.send_signal(ended_by)
        child.stdout.read()
    assert child.returncode == -ended_by
    left = {path.name for path in tmp_path.iterdir()} - {"base", "target"}
    if ended_by is signal.SIGINT:
        assert left == set()
    else:  # nobody can tidy up behind a kill; what it leaves is hidden, and OUT is not there
        (hidden,) = left
        assert hidden.startswith(".out.")


@pytest.mark.slow
def test_a_full_disk_is_an_os_error_and_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    script = """
import resource, signal, sys
from pathlib import Path
from typing import Any
from hotload.directory.operations import encode_directory
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
try:
    encode_directory(*map(Path, sys.argv[1:]), workers=2)
except OSError as error:
    sys.exit(error.errno)
"""
    there = sorted(tmp_path.iterdir())
    program = [sys.executable, "-c", script, *pair, tmp_path / "out"]
    root = Path(hotload.__file__).parents[1]
    assert subprocess.run(program, cwd=root, check=False).returncode == 27  # EFBIG
    assert sorted(tmp_path.iterdir()) == there


def test_what_takes_out_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def make_ours() -> None:
        with new_directory(out) as staged:
            (staged / "ours").write_text("ours")
            out.mkdir()
            (out / "precious").write_text("theirs")

    with pytest.raises(FileExistsError, match="something already"):
        make_ours()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "precious").read_text() == "theirs"
