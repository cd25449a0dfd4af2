"""The probe after a load: replicas that report the right identity and serve other weights."""

import json
from typing import Any

import pytest

from flows.cycle import checkpoint_to_rollout
from hotload.directory.shards import read_checkpoint
from hotload.errors import FullSnapshotFailedError, InvalidCheckpointError
from hotload.identity import SnapshotKind
from hotload.report.cycle_report import CycleReport
from tests.flows.fleet import API_KEY, Fleet
from tests.flows.test_cycle import answer, copied

PROBED = {
    "poll_interval_seconds": 0.05,
    "warmup_after_hotload": False,
    "probe_sessions": 64,
}


async def run(fleet: Fleet, version: int, **changes: Any) -> CycleReport:
    return await checkpoint_to_rollout(fleet.spec(version, readiness=PROBED, **changes))


async def test_replicas_that_agree_are_believed(fleet: Fleet) -> None:
    for version in (1, 2):
        report = await run(fleet, version)
        assert (report.outcome, report.snapshot.warnings) == ("published", ())
    # Nothing was asked for the samples' sake but the samples, and one session a replica or more.
    assert len(fleet.log()["requests"]) - 16 >= 2 * 2


async def test_a_replica_that_damaged_a_full_is_found_out(fleet: Fleet) -> None:
    """A full carries no checksum: the replica reports the right identity and is ready."""
    shard = fleet.checkpoints[1] / "model-00002-of-00009.safetensors"
    size = read_checkpoint(fleet.checkpoints[1]).shards[1].tensors[-1].size_bytes
    fleet.fault(
        fault="corrupt_object",
        file=shard.name,
        replica="replica-1",
        offset=-size,
        size=size,
        count=1,
    )
    report = await run(fleet, 1)
    assert (report.outcome, report.snapshot.kind) == ("fell back", SnapshotKind.FULL)
    assert "probe: replica-" in str(report.fallback_reason)
    assert "nats a token" in str(report.fallback_reason)
    assert fleet.served() == {report.snapshot.identity}
    assert report.snapshot.warnings == ()


async def test_the_trainers_own_figures_count(fleet: Fleet) -> None:
    own = copied(fleet, 1)
    await run(fleet, 1)
    served = answer(fleet)
    tokens = [5, 6, 7, 8]
    fleet_says = probed(fleet, tokens)
    (own / "probe.json").write_text(json.dumps({"token_ids": tokens, "logprobs": fleet_says}))
    again = await run(fleet, 1, checkpoint=str(own), run_id="other")
    # The trainer's file is no part of the checkpoint: it is not published, and forces no full.
    assert (again.outcome, again.snapshot.kind) == ("published", SnapshotKind.DELTA)
    assert not (fleet.bucket / again.snapshot.identity / "probe.json").exists()
    assert answer(fleet) == served
    wrong = [value - 1 for value in fleet_says]
    (own / "probe.json").write_text(json.dumps({"token_ids": tokens, "logprobs": wrong}))
    with pytest.raises(FullSnapshotFailedError, match="and the trainer differ by 1 nats"):
        await run(fleet, 1, checkpoint=str(own), run_id="third")


def probed(fleet: Fleet, tokens: list[int]) -> list[float]:
    """What the service says of `tokens`, asked by hand."""
    import httpx

    answered = httpx.post(
        f"{fleet.url}/inference/v1/completions",
        json={
            "model": "accounts/local/models/policy",
            "prompt": tokens,
            "max_tokens": 1,
            "echo": True,
            "logprobs": True,
        },
        headers={
            "Authorization": f"Bearer {API_KEY}",
            "fireworks-deployment": "accounts/local/deployments/rollouts",
        },
        timeout=60,
    ).raise_for_status()
    content = answered.json()["choices"][0]["logprobs"]["content"]
    return [entry["logprob"] for entry in content[1 : len(tokens)]]


@pytest.mark.parametrize(
    ("probe", "found"),
    [(b"{", "not a probe"), (b'{"token_ids": [1, 99999999]}', "token id 99999999")],
)
async def test_a_probe_that_is_none_costs_no_upload(fleet: Fleet, probe: bytes, found: str) -> None:
    own = copied(fleet, 1)
    (own / "probe.json").write_bytes(probe)
    with pytest.raises(InvalidCheckpointError, match=found):
        await run(fleet, 1, checkpoint=str(own))
    assert not (fleet.bucket / "_hotload" / "snapshots").exists()


async def test_a_version_that_is_not_due_is_not_held_to_its_own_figures(fleet: Fleet) -> None:
    own = copied(fleet, 3)
    wrong = {"token_ids": [5, 6, 7], "logprobs": [-90.0, -90.0]}
    (own / "probe.json").write_text(json.dumps(wrong))
    every_second = {"weight_sync_interval": 2}
    await run(fleet, 2, cadence=every_second)
    report = await run(fleet, 3, checkpoint=str(own), cadence=every_second)
    assert (report.outcome, report.snapshot.policy_version) == ("not due", 2)
