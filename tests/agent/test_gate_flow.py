"""A checkpoint that ruins the reward never reaches the second half of the fleet.

Real parts: our own flow, a door with a gate by samples, four agents beside engines that sample.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hotload.errors import SnapshotRejectedError
from hotload.identity import SnapshotKind
from hotload.publish.explain import explain_service
from hotload.publish.fireworks_api import parse_status
from tests.agent.conftest import HOT_LOAD
from tests.agent.sampling_engine import SamplingEngine
from tests.agent.test_flow import publish
from tests.agent.test_gate import nudged, open_gate, with_head
from tests.agent.tiny_engine import digests
from tests.emulator.conftest import tensors, write_checkpoint
from tests.waiting import wait_until

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]
NAMES = ("a", "b", "c", "d")


@contextmanager
def watched(place: Any) -> Iterator[list[tuple[str | None, ...]]]:
    """Look at the status over and over: what the last two replicas are said to serve."""
    told: list[tuple[str | None, ...]] = []
    is_over = threading.Event()

    def look() -> None:
        while not is_over.is_set():
            told.append(tuple(one["current_snapshot_identity"] for one in place.replicas()[2:]))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield told
    finally:
        is_over.set()
        thread.join()


def snapshots(place: Any) -> set[str]:
    """What lies in the bucket."""
    return {path.name for path in place.publisher.bucket.iterdir() if path.name[0] != "_"}


async def test_a_ruined_checkpoint_never_reaches_the_second_half(
    prefect_api: str, place: Any
) -> None:
    from tests.flows.fleet import Fleet, save_blocks

    good = nudged(tensors(0), 1)
    weights = [tensors(0), good, with_head(good, 0), nudged(good, 2)]
    checkpoints = [place.root / f"{version:06d}" for version in range(4)]
    for path, saved in zip(checkpoints, weights, strict=True):
        write_checkpoint(path, saved)
    base, first, ruined, third = map(digests, checkpoints)
    place.publisher.base = checkpoints[0]
    agents = [place.agent(name, engine=SamplingEngine()) for name in NAMES]
    open_gate(place, share="0.5")
    (place.root / "problems.jsonl").write_text('{"id": "one", "prompt": "1", "answer": "2"}\n')
    fleet = Fleet("gate", place.door.address, place.root, checkpoints)
    await save_blocks(fleet)

    with watched(place) as told:
        (one,) = (await publish(fleet, 1)).services
        assert [agent.engine.serves for agent in agents] == [first] * 4

        with pytest.raises(SnapshotRejectedError, match="below that of the rest") as refused:
            await publish(fleet, 2)
        assert "reward 0.0" in str(refused.value)
        wait_until(lambda: [agent.engine.serves for agent in agents] == [first] * 4)
        stored = snapshots(place)
        assert len(stored) == 2  # the first version, and one try at the second

        # Started again, the cycle stops before it uploads anything.
        with pytest.raises(SnapshotRejectedError, match="the same bytes were refused"):
            await publish(fleet, 2)
        assert snapshots(place) == stored
        status = parse_status(place.ask("GET", HOT_LOAD).json())
        assert any("a gate refused run-000002" in line for line in explain_service(status, ()).seen)

        (three,) = (await publish(fleet, 3)).services
        assert three.snapshot.kind is SnapshotKind.DELTA
        assert [agent.engine.serves for agent in agents] == [third] * 4

    assert {one for pair in told for one in pair} == {
        None,
        one.snapshot.identity,
        three.snapshot.identity,
    }
    canaries, rest = agents[:2], agents[2:]
    assert all(ruined in agent.engine.loaded for agent in canaries)
    assert [agent.engine.loaded for agent in rest] == [[base, first, third]] * 2
