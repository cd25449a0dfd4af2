"""Newer weights are noticed before the first sample of a cycle that goes on, and weights of nobody
of ours are not sampled."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger

from hotload.clients.access import Access
from hotload.clients.service import HotLoadClient
from hotload.clients.store import Store
from hotload.errors import ReadinessTimeoutError, ServiceRefusedError
from hotload.options import ReadinessPolicy, Sampling
from hotload.rollout.admission import Admission
from hotload.sampling.problems import plan_rollouts
from hotload.sampling.rollout import LOGGER, Rollout, SampledService, open_rollout
from hotload.sampling.row_gate import Gate
from hotload.sampling.stamp import Stamp
from hotload.sampling.watch_versions import VersionWatch, put_stamp
from tests.blocks.scripted_inference import IDENTITY, KEY, client
from tests.factories import cycle_spec
from tests.scripted_server import JSON, ScriptedServer, http

NEXT, LATER = "run-000004-0badf00d", "run-000005-0badf00d"
BACK, ON = "run-000003.1-0badf00d", "run-000004.1-0badf00d"
NAMES = {"account_id": "a", "model_id": "m", "deployment_id": "d"}
IMPATIENT = ReadinessPolicy(weight_sync_timeout=0.05, poll_interval_seconds=0.001)
PATIENT = IMPATIENT.model_copy(update={"weight_sync_timeout": 60.0})


def serving(*identities: str | None) -> bytes:
    """What the service says with one replica for each."""
    replicas = [{"readiness": True, "current_snapshot_identity": each} for each in identities]
    return http(json.dumps({"replicas": replicas}).encode(), 200, JSON)


async def look(
    *answers: bytes, identity: str = IDENTITY, readiness: ReadinessPolicy = PATIENT
) -> tuple[str, Gate, int]:
    """What samples are stamped with after the first look, the gate, and the requests it took."""
    admission = Admission(
        group_size=2, batch_size=4, initial_version=3, max_head_offpolicy_versions=1
    )
    gate = Gate(admission, lambda: 4)
    with disable_run_logger():
        async with (
            ScriptedServer().running() as server,
            client(1).session(Sampling(), identity=identity, policy_version=3) as sampler,
        ):
            server.replies += answers
            service = HotLoadClient(Access(base_url=server.address, api_key=KEY, **NAMES))
            spec = cycle_spec(readiness=readiness.model_dump())
            stamp = Stamp(identity, 3)

            def hand_on(stamp: Stamp) -> None:
                put_stamp(stamp, sampler, gate)

            await VersionWatch(service, spec, stamp, hand_on, LOGGER).first_look()
            return sampler.identity, gate, len(server.requests)


@pytest.mark.parametrize(
    ("answers", "identity", "is_stale"),
    [
        ([serving(IDENTITY, IDENTITY)], IDENTITY, False),
        ([serving(NEXT, NEXT)], NEXT, False),
        ([serving(LATER)], LATER, True),
        # A version on its way changes nothing as long as ours is there.
        ([serving(IDENTITY, NEXT)], IDENTITY, False),
        # It is gone, and what took its place is not everywhere yet.
        ([serving(NEXT, LATER), serving(LATER, LATER)], LATER, True),
        ([http(b"", 503, JSON), serving(), serving(NEXT)], NEXT, False),
        # A later line, from our version on and from the one after it.
        ([serving(BACK, BACK)], BACK, True),
        ([serving(ON, ON)], ON, False),
    ],
)
async def test_the_first_look(answers: list[bytes], identity: str, *, is_stale: bool) -> None:
    stamped, gate, requests = await look(*answers)
    assert (stamped, gate.is_stale, requests) == (identity, is_stale, len(answers))


@pytest.mark.parametrize(
    "answer",
    [
        serving("other-000009-0badf00d"),
        serving("run-000002-0badf00d"),
        serving(None),
        serving(),
        http(b"", 503, JSON),
    ],
)
async def test_weights_that_are_not_ours(answer: bytes) -> None:
    with pytest.raises(ReadinessTimeoutError, match=IDENTITY):
        await look(answer, readiness=IMPATIENT)


async def test_a_line_goes_on_with_its_own_weights_alone() -> None:
    stamped, gate, _ = await look(serving(NEXT, NEXT), serving(ON, ON), identity=BACK)
    assert (stamped, gate.is_stale) == (ON, False)


async def test_a_refused_key() -> None:
    with pytest.raises(ServiceRefusedError):
        await look(http(b"", 401, JSON))


@asynccontextmanager
async def opened(
    root: Path, answer: bytes, readiness: ReadinessPolicy = PATIENT
) -> AsyncIterator[Rollout]:
    (root / "problems.jsonl").write_text('{"id": 0, "prompt": "x", "answer": "y"}\n')
    spec = cycle_spec(
        work_dir=str(root),
        problems={"dataset": str(root / "problems.jsonl")},
        sampling={"max_head_offpolicy_versions": 1},
        readiness=readiness.model_dump(),
    )
    plan = await plan_rollouts(spec, IDENTITY)
    store = Store(url=f"file://{root}")
    with disable_run_logger():
        async with ScriptedServer().running() as server:
            server.replies.append(answer)
            service = HotLoadClient(Access(base_url=server.address, api_key=KEY, **NAMES))
            source = SampledService(client(1), IDENTITY, watched=service)
            async with open_rollout(spec, plan, source, store) as rollout:
                yield rollout


async def test_a_rollout_opens_after_the_first_look(tmp_path: Path) -> None:
    async with opened(tmp_path, serving(LATER)) as rollout:
        assert rollout.gate.is_stale
        await asyncio.sleep(0)  # what runs beside it begins
    with pytest.raises(ReadinessTimeoutError):
        async with opened(tmp_path, serving("other-000009-0badf00d"), IMPATIENT):
            pass
