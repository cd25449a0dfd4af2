"""Our own flow publishes to agents, through a door or without one: a full, deltas, a full again
where a delta fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hotload.identity import SnapshotKind
from hotload.publish.publication import Publication
from tests.agent.tiny_engine import digests
from tests.waiting import wait_until

pytestmark = [pytest.mark.server, pytest.mark.timeout(600)]


async def publish(fleet: Any, version: int) -> Publication:
    from flows.publish import publish_version

    readiness = {"poll_interval_seconds": 0.1, "weight_sync_timeout": 60}
    return await publish_version(fleet.spec(version, readiness=readiness))


@pytest.mark.parametrize("has_door", [True, False], ids=["door", "no door"])
async def test_versions_travel_to_engines_of_ones_own(
    prefect_api: str, place: Any, checkpoints: list[Path], has_door: bool
) -> None:
    from blocks.account import InferenceAccount
    from blocks.checkpoint_store import CheckpointStore
    from blocks.hot_load_service import HotLoadService
    from tests.flows.fleet import NAMES, Fleet, save_blocks

    place.publisher.base = checkpoints[0]
    left, right = place.agent("left"), place.agent("right")
    place.open_door()
    problems = {"id": "one", "prompt": "1 + 1 = ", "answer": "2"}
    (place.root / "problems.jsonl").write_text(json.dumps(problems) + "\n")
    name = "door" if has_door else "agents"
    fleet = Fleet(name, place.door.address, place.root, checkpoints)
    await save_blocks(fleet)
    if not has_door:
        place.door.stop()
        service = HotLoadService(
            account=InferenceAccount(**NAMES),
            agents=(left.process.address, right.process.address),
            store=CheckpointStore(url=fleet.bucket.as_uri()),
        )
        await service.save(name, overwrite=True)

    kinds = []
    for version in (1, 2, 3):
        (publication,) = (await publish(fleet, version)).services
        kinds.append(publication.snapshot.kind)
        assert left.engine.serves == right.engine.serves == digests(checkpoints[version])
    assert kinds == [SnapshotKind.FULL, SnapshotKind.DELTA, SnapshotKind.DELTA]
    assert publication.snapshot.replica_count == 2
    assert {left.engine.version, right.engine.version} == {publication.snapshot.identity}

    # One engine fails once: every replica gets a full under another name.
    left.engine.refuses, left.engine.refusals_left = {"/reload"}, 1
    (publication,) = (await publish(fleet, 4)).services
    assert publication.snapshot.kind is SnapshotKind.FULL
    assert left.engine.serves == right.engine.serves == digests(checkpoints[4])

    # A replica that was away replays the chain by itself.
    right.kill()
    right.engine.restart(checkpoints[0])
    right.start()
    wait_until(lambda: right.engine.serves == digests(checkpoints[4]))
    (publication,) = (await publish(fleet, 5)).services
    assert publication.snapshot.kind is SnapshotKind.DELTA
    assert left.engine.serves == right.engine.serves == digests(checkpoints[5])
