"""How often a cycle reads and writes the bytes of a model: counted at the system's calls."""

import os
import shutil
import threading
from collections import Counter
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import pytest

from benchmarks.publish import SIDES, join_layers, write_model
from flows.cycle import checkpoint_to_rollout
from flows.publish import publish_version
from hotload.directory.supplied_digests import DIGESTS_FILE
from hotload.errors import InvalidCheckpointError
from hotload.identity import SnapshotKind
from tests.flows.fleet import Fleet, running_fleet, save_blocks

pytestmark = pytest.mark.slow

MODEL_BYTES = 64_000_000  # headers and samples are little beside it


class Passes(NamedTuple):
    """Passes over a model: bytes moved, by its size."""

    target: float
    base: float
    cloned: float
    written: float


class Counting:
    """Counts bytes by path at every call that moves them."""

    def __init__(self, patch: pytest.MonkeyPatch, fleet: Fleet) -> None:
        self._sums: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._baseline = str(fleet.root / "work" / "local" / "rollouts" / "baseline")
        self._work = str(fleet.root / "work")
        for name in ("read", "pread", "preadv"):
            patch.setattr(os, name, self._counted("read", getattr(os, name)))
        patch.setattr(os, "pwrite", self._counted("written", os.pwrite))
        patch.setattr(os, "copy_file_range", self._counted("cloned", os.copy_file_range))

    def taken(self, target: Path) -> Passes:
        """What has moved since the last look."""
        sums, self._sums = self._sums, Counter()
        found = Counter[str]()
        for key, size in sums.items():
            way, _, path = key.partition(" ")
            if way == "read" and path.startswith(f"{target}/"):
                found["target"] += size
            elif way == "read" and path.startswith(self._baseline):
                found["base"] += size
            elif way == "cloned" or (way == "written" and path.startswith(self._work)):
                found[way] += size
        return Passes(*(found[name] / MODEL_BYTES for name in Passes._fields))

    def _counted(self, way: str, call: Any) -> Any:
        def counted(descriptor: int, *arguments: Any) -> Any:
            result = call(descriptor, *arguments)
            size = len(result) if isinstance(result, bytes) else result
            if size > 1 << 12:
                path = os.readlink(f"/proc/self/fd/{descriptor}")
                with self._lock:
                    self._sums[f"{way} {path}"] += size
            return result

        return counted


def about(target: float, base: float, cloned: float, written: float) -> Any:
    """So many passes; headers, and the sample that predicts a delta's size, are not counted."""
    return pytest.approx(Passes(target, base, cloned, written), abs=0.15)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints a step apart, in the served layout, each with its digests beside it."""
    place = tmp_path_factory.mktemp("models")
    write_model(place, MODEL_BYTES)
    for side in SIDES:
        sums = {path.name: sha256(path.read_bytes()) for path in sorted((place / side).iterdir())}
        lines = (f"{digest.hexdigest()}  {name}\n" for name, digest in sums.items())
        (place / side / DIGESTS_FILE).write_text("".join(lines))
    return place


@pytest.fixture
async def large(prefect_api: str, tmp_path: Path, served: Path) -> AsyncIterator[Fleet]:
    """A fleet whose versions are in turn the two checkpoints."""
    checkpoints = [served / SIDES[version % 2] for version in range(6)]
    name = f"fleet-{uuid4().hex[:12]}"
    with running_fleet(name, tmp_path, checkpoints, engine="stub") as fleet:
        await save_blocks(fleet)
        yield fleet


async def test_every_pass_over_the_model_is_counted(
    large: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Counting(monkeypatch, large)
    # What the store's own copy of a full reads is not counted. The first delta after it reads its
    # base for the digest, too.
    for version, kind, base in ((1, "FULL", 0), (2, "DELTA", 2), (3, "DELTA", 1)):
        report = await checkpoint_to_rollout(large.spec(version))
        passes = counting.taken(large.checkpoints[version])
        assert report.snapshot.kind is SnapshotKind[kind]
        target = 1 if kind == "FULL" else 2
        assert passes == about(target=target, base=base, cloned=1, written=0)


async def test_a_trainer_that_vouches_spares_every_pass_but_one(
    large: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = large.root / "own"
    large.checkpoints[2] = Path(shutil.copytree(large.checkpoints[2], own))
    vouched = {"snapshot": {"trust_digests": True, "link_baseline": True}}
    for version in (1, 2):
        await checkpoint_to_rollout(large.spec(version, **vouched))
    (baseline,) = (large.root / "work" / "local" / "rollouts" / "baseline").iterdir()
    shard = next(baseline.glob("*.safetensors"))
    assert shard.samefile(own / shard.name)
    shutil.rmtree(own)  # a trainer keeps its newest only
    counting = Counting(monkeypatch, large)
    report = await checkpoint_to_rollout(large.spec(3, **vouched))
    assert report.snapshot.kind is SnapshotKind.DELTA
    passes = counting.taken(large.checkpoints[3])
    assert passes == about(target=1, base=1, cloned=0, written=0)


async def test_what_nothing_is_sampled_from_is_linked_too(large: Fleet) -> None:
    own = Path(shutil.copytree(large.checkpoints[1], large.root / "own"))
    linked = {"checkpoint": str(own), "snapshot": {"link_baseline": True}}
    await publish_version(large.spec(1, **linked))
    (baseline,) = (large.root / "work" / "local" / "rollouts" / "baseline").iterdir()
    assert all(path.samefile(own / path.name) for path in baseline.glob("*.safetensors"))


async def test_no_second_copy_is_written_for_another_layout(
    large: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in (1, 2):
        own = large.root / f"own-{version}"
        join_layers(large.checkpoints[version], own)
        large.checkpoints[version] = own
    counting = Counting(monkeypatch, large)
    await checkpoint_to_rollout(large.spec(1))
    assert counting.taken(large.checkpoints[1]) == about(2, 0, cloned=1, written=0)
    await checkpoint_to_rollout(large.spec(2))
    assert counting.taken(large.checkpoints[2]) == about(2, 2, cloned=1, written=0)
    kept = sum(path.stat().st_size for path in (large.root / "work").rglob("*") if path.is_file())
    assert kept < 1.1 * MODEL_BYTES  # the baseline, and the delta


async def test_a_trainer_that_vouches_and_leaves_no_digests_is_told(large: Fleet) -> None:
    own = large.root / "own"
    join_layers(large.checkpoints[1], own)
    spec = large.spec(1, checkpoint=str(own), snapshot={"trust_digests": True})
    with pytest.raises(InvalidCheckpointError, match=DIGESTS_FILE):
        await checkpoint_to_rollout(spec)
