"""Commands that make and use deltas: encode, apply, verify, convert, fold."""

from __future__ import annotations

import json
import time
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hotload.cli.outcome import FOUND, CommandResult
from hotload.cli.progress import ProgressBar
from hotload.cli.refusals import UsageError, refusal
from hotload.cli.wording import density_percent, ratio
from hotload.delta.checksums import Checksum
from hotload.delta.dialects import Dialect, Lineage
from hotload.delta.encode import DeltaStats
from hotload.delta.frame import best_method, describe_method
from hotload.delta.ordered_threads import Workers
from hotload.directory import operations, shards
from hotload.errors import DeltaError
from hotload.identity import check_identity
from hotload.publish.fireworks_api import delta_metadata
from hotload.quantities import plural, size


def encode(options: Namespace, bar: ProgressBar | None) -> CommandResult:
    """Write the delta from BASE to TARGET."""
    dialect, checksum = Dialect(options.dialect), Checksum(options.checksum)
    lineage = _lineage(options, dialect)
    if dialect is not Dialect.SLIME and checksum is not Checksum.ADLER32:
        raise UsageError(f"--checksum {checksum} goes with --dialect slime alone")
    started = time.monotonic()
    if _are_files(options.base, options.target):
        if lineage is not None:
            raise UsageError(f"a single file cannot say what it follows, as {dialect} deltas do")
        shards = [_encode_file(options, bar)]
        size_bytes = shards[0].size_bytes
    else:
        stats = operations.encode_directory(
            options.base,
            options.target,
            options.out,
            dialect=dialect,
            checksum=checksum,
            lineage=lineage,
            workers=options.workers,
            progress=bar,
        )
        shards, size_bytes = list(stats.shards.values()), stats.size_bytes
    facts: dict[str, Any] = {
        "out": str(options.out),
        "dialect": dialect.value,
        "checksum": checksum.value,
        "lineage": None if lineage is None else asdict(lineage),
        "frame_writer": describe_method(best_method()),
        "seconds": round(time.monotonic() - started, 3),
        **_counts(shards, size_bytes),
        **_signal(options, lineage),
    }
    return CommandResult(facts, tuple(_encode_lines(facts)))


def apply(options: Namespace, bar: ProgressBar | None) -> CommandResult:
    """Write what DELTA makes of BASE."""
    if _are_files(options.base, options.delta):
        _refuse_taken(options.out)
        with Workers(options.workers) as pool:
            shards.apply_file(options.base, options.delta, options.out, pool=pool)
    else:
        operations.apply_directory(
            options.base, options.delta, options.out, workers=options.workers, progress=bar
        )
    size_bytes = _size_bytes(options.out)
    line = f"{options.out}: {size(size_bytes)}, every tensor in the delta as its checksum says"
    return CommandResult({"out": str(options.out), "size_bytes": size_bytes}, (line,))


def verify(options: Namespace, bar: ProgressBar | None) -> CommandResult:
    """Decode DELTA on BASE and compare with TARGET."""
    try:
        if _are_files(options.base, options.delta, options.target):
            with Workers(options.workers) as pool:
                shards.verify_file(options.base, options.delta, options.target, pool=pool)
        else:
            operations.verify_directory(
                options.base, options.delta, options.target, workers=options.workers, progress=bar
            )
    except DeltaError as error:
        return replace(refusal(error), exit_code=FOUND)
    line = f"{options.delta} makes {options.target} of {options.base}, bit for bit"
    return CommandResult({"delta": str(options.delta), "target": str(options.target)}, (line,))


def convert(options: Namespace, bar: ProgressBar | None) -> CommandResult:
    """Write DELTA again for another family of receivers."""
    dialect = Dialect(options.dialect)
    lineage = _lineage(options, dialect)
    operations.convert_directory(
        options.delta,
        options.out,
        dialect=dialect,
        lineage=lineage,
        base=options.base,
        workers=options.workers,
        progress=bar,
    )
    facts: dict[str, Any] = {
        "out": str(options.out),
        "dialect": dialect.value,
        "lineage": None if lineage is None else asdict(lineage),
        "size_bytes": _size_bytes(options.out),
        **_signal(options, lineage),
    }
    line = f"{options.out}: {size(_size_bytes(options.out))}"
    return CommandResult(facts, (line, *_signal_lines(facts)))


def fold(options: Namespace, bar: ProgressBar | None) -> CommandResult:
    """Make one delta out of consecutive ones."""
    operations.fold_directory(options.delta, options.out, workers=options.workers, progress=bar)
    stored = sum(map(_size_bytes, options.delta))
    facts: dict[str, Any] = {
        "out": str(options.out),
        "delta_count": len(options.delta),
        "delta_size_bytes": stored,
        "size_bytes": _size_bytes(options.out),
    }
    line = f"{plural(len(options.delta), 'delta')} of {size(stored)}"
    return CommandResult(facts, (f"{options.out}: {size(facts['size_bytes'])}, from {line}",))


def _lineage(options: Namespace, dialect: Dialect) -> Lineage | None:
    """What the index is to say; names for a Fireworks signal are checked, and not in the files."""
    identity, previous = options.identity, options.previous
    if (identity is None) != (previous is None):
        raise UsageError("--identity and --previous go together")
    if dialect.tells_lineage:
        if identity is None:
            reason = "deltas state what they are and what they follow"
            raise UsageError(f"{dialect} {reason}: give --identity and --previous")
        return Lineage(identity, previous)
    if identity is not None:
        check_identity(identity)
        check_identity(previous)
    return None


def _signal(options: Namespace, lineage: Lineage | None) -> dict[str, Any]:
    """The body that tells Fireworks about the delta; empty where the delta tells it itself."""
    if options.identity is None or lineage is not None:
        return {}
    return {"signal": {"identity": options.identity} | delta_metadata(options.previous)}


def _encode_file(options: Namespace, bar: ProgressBar | None) -> DeltaStats:
    _refuse_taken(options.out)
    total, done = options.target.stat().st_size, 0

    def step(size_bytes: int) -> None:
        nonlocal done
        done += size_bytes
        if bar:
            bar(min(done, total), total)

    with Workers(options.workers) as pool:
        return shards.encode_file(
            options.base,
            options.target,
            options.out,
            pool=pool,
            with_sha256=False,
            on_bytes=step,
        )


def _counts(shards: Iterable[DeltaStats], size_bytes: int) -> dict[str, Any]:
    shards = list(shards)
    elements = sum(shard.element_count for shard in shards)
    changed = sum(shard.changed_element_count for shard in shards)
    content = sum(shard.content_size_bytes for shard in shards)
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    return {
        "shard_count": len(shards),
        "tensor_count": len(tensors),
        "unchanged_tensor_count": sum(tensor.is_unchanged for tensor in tensors),
        "element_count": elements,
        "changed_element_count": changed,
        "density": changed / max(1, elements),
        "size_bytes": size_bytes,
        "content_size_bytes": content,
        "ratio": content / size_bytes,
    }


def _encode_lines(facts: dict[str, Any]) -> list[str]:
    stored, content = facts["size_bytes"], facts["content_size_bytes"]
    seconds = facts["seconds"]
    tensors = plural(facts["tensor_count"], "tensor")
    unchanged = f"{facts['unchanged_tensor_count']:,} of them unchanged"
    rate = f"{size(int(content / seconds))}/s" if seconds else "at once"
    advice = " (larger than the target: publish that in full)" if stored > content else ""
    return [
        f"{facts['out']}: {size(stored)} for {size(content)}, 1 : {ratio(content, stored)}{advice}",
        f"{tensors}, {unchanged}; {density_percent(facts['density'])} of the elements changed",
        f"{seconds:.1f} s, {rate}; frames by {facts['frame_writer']}",
        *_signal_lines(facts),
    ]


def _signal_lines(facts: dict[str, Any]) -> list[str]:
    return [f"signal it with {json.dumps(facts['signal'])}"] if "signal" in facts else []


def _are_files(*paths: Path) -> bool:
    return all(path.is_file() for path in paths)


def _refuse_taken(out: Path) -> None:
    if out.exists():
        raise UsageError(f"{out}: there is something already, expected a new name for a file")


def _size_bytes(path: Path) -> int:
    paths = path.iterdir() if path.is_dir() else [path]
    return sum(one.stat().st_size for one in paths)
