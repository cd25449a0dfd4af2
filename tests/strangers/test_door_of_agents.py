"""The vendor's training SDK drives a door over agents: a fleet of one's own in place of theirs."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest
from fireworks import APIStatusError, Fireworks
from fireworks.training.sdk.deployment import (
    DeploymentConfig,
    DeploymentManager,
    DeploymentSampler,
)
from fireworks.training.sdk.weight_syncer import WeightSyncer

from tests.strangers.counting import CALLS, uncalled
from tests.strangers.door import (
    KEY,
    NAME,
    RANK,
    AdapterTrainer,
    AgentsDoor,
    SnapshotTrainer,
    delta_after,
    digests,
    load_chain,
)
from tests.waiting import wait_until

NO_REQUESTS = "a door carries no requests: ask the inference servers"


def manager_of(door: AgentsDoor) -> DeploymentManager:
    return DeploymentManager(api_key=KEY, base_url=door.url)


def settle(door: AgentsDoor, identity: str | None) -> None:
    """Wait for both agents: the SDK looks at one replica alone."""
    wait_until(lambda: door.served() == [identity] * 2)


def refusal(caplog: pytest.LogCaptureFixture) -> str:
    """What the SDK has last warned a person of."""
    return [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING][-1]


def test_the_deployment_manager(
    agents_door: AgentsDoor,
    trainer: SnapshotTrainer,
    checkpoints: list[Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    door, manager, before = agents_door, manager_of(agents_door), CALLS.copy()
    assert manager.account_id == "local"
    ready = manager.wait_for_ready(NAME)
    assert (ready.state, ready.inference_model) == ("READY", door.deployment)
    assert ready.hot_load_bucket_url == door.bucket.as_uri()
    assert ready.hot_load_transition_type == door.transition
    assert manager.get(NAME) == ready
    assert manager.get("other") is None
    config = DeploymentConfig(deployment_id=NAME, base_model=door.model)
    assert manager.create_or_get(config) == ready
    other = DeploymentConfig(deployment_id="other", base_model=door.model)
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        manager.create_or_get(other)
    assert "there is one deployment here, 'rollouts'" in refusal(caplog)

    settle(door, None)
    version = 0

    def load(kind: str, previous: str | None = None, **fields: Any) -> str:
        nonlocal version
        identity = trainer.save_weights_for_sampler_ext("sdk", kind).snapshot_name
        metadata = delta_after(previous) if previous is not None else None
        assert manager.hotload_and_wait(NAME, door.model, identity, metadata, **fields)
        assert manager.last_hotload_error_message is None
        settle(door, identity)
        version += 1
        assert door.sampled() == [digests(checkpoints[version])] * 2
        return identity

    full, first, second, third = load_chain(manager, door.model, load)

    for identity, previous, words in (
        ("absent", None, "snapshot 'absent' is not in the bucket"),
        ("late", "unknown", "'unknown' is not in the ledger"),
        ("late", first, f"{first!r} is not the snapshot being served"),
    ):
        with pytest.raises(httpx.HTTPStatusError, match="400"):
            manager.hotload(NAME, door.model, identity, delta_after(previous) if previous else None)
        assert words in refusal(caplog)
    with pytest.raises(httpx.HTTPStatusError, match="404"):
        manager.hotload(NAME, "accounts/local/models/other", third)
    assert "'accounts/local/models/other' not found" in refusal(caplog)
    assert not manager.wait_for_hotload(NAME, door.model, "absent", timeout_seconds=0.2)
    assert "Hotload did not complete" in manager.last_hotload_error_message

    entries = door.ledger("GET")["entries"]
    assert [entry["identity"] for entry in entries] == [third, second, first, full]
    assert door.ledger("DELETE") == {}
    settle(door, None)
    assert door.sampled() == [digests(checkpoints[0])] * 2
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        manager.hotload(NAME, door.model, "next", delta_after(third))
    assert f"{third!r} is not in the ledger" in refusal(caplog)

    # What the deployment is, the command lines say.
    for change in (
        lambda: manager.update(NAME, {"maxReplicaCount": 3}, ["max_replica_count"]),
        lambda: manager.reattach_trainer(
            NAME, base_model=door.model, trainer_job_name="job", timeout_s=1
        ),
    ):
        with pytest.raises(httpx.HTTPStatusError, match="400"):
            change()
    manager.scale_to_zero(NAME)
    assert "400 Bad Request" in refusal(caplog)
    manager.delete(NAME)
    assert "400 Bad Request" in refusal(caplog)
    assert manager.get(NAME) == ready
    assert not manager.warmup(door.deployment, max_retries=1)

    wrong = DeploymentManager(api_key="wrong", base_url=door.url)
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        print(wrong.account_id)
    wrong.close()
    manager.close()
    assert not uncalled(DeploymentManager, before)


def test_a_failed_load_is_told_by_the_status(
    agents_door: AgentsDoor, trainer: SnapshotTrainer, checkpoints: list[Path]
) -> None:
    door = agents_door
    with manager_of(door) as manager:
        full = trainer.save_weights_for_sampler_ext("sdk", "base").snapshot_name
        assert manager.hotload_and_wait(NAME, door.model, full)
        settle(door, full)
        spoilt = trainer.save_weights_for_sampler_ext("sdk", "delta").snapshot_name
        for shard in (door.bucket / spoilt).glob("*.safetensors"):
            shard.write_bytes(shard.read_bytes()[:-1])
        assert not manager.hotload_and_wait(NAME, door.model, spoilt, delta_after(full))
        assert f"target snapshot: {spoilt}; stage=error" in manager.last_hotload_error_message
        assert door.sampled() == [digests(checkpoints[1])] * 2


def test_the_weight_syncer(
    agents_door: AgentsDoor, trainer: SnapshotTrainer, checkpoints: list[Path]
) -> None:
    door, manager, before = agents_door, manager_of(agents_door), CALLS.copy()
    settle(door, None)
    syncer = WeightSyncer(
        trainer, manager, NAME, door.model, hotload_timeout=60, warmup_after_hotload=False
    )
    syncer.wait_for_hotload_ready()
    assert syncer.check_deployment_state() is None
    for step in (1, 2, 3):
        identity = syncer.save_and_hotload(f"step-{step}")
        assert syncer.check_deployment_state() == syncer.base_identity == identity
        settle(door, identity)
        assert door.sampled() == [digests(checkpoints[step])] * 2
    kinds = [entry["kind"] for entry in door.ledger("GET")["entries"]]
    assert kinds == ["delta", "delta", "full"]

    # A new trainer begins a chain of its own.
    syncer.reset_delta_chain()
    snapshot = syncer.save_only("resumed", checkpoint_type="base")
    assert syncer.hotload(snapshot, "base")
    settle(door, snapshot)
    assert door.sampled() == [digests(checkpoints[4])] * 2
    samplers = {"get_deployment_sampler", "get_sampling_client"}
    assert uncalled(WeightSyncer, before) == samplers
    manager.close()


def test_adapters_are_refused_in_words(
    agents_door: AgentsDoor, checkpoints: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    door = agents_door
    trainer = AdapterTrainer(checkpoints[0], door.bucket)
    with manager_of(door) as manager:
        syncer = WeightSyncer(trainer, manager, NAME, door.model, lora_rank=RANK)
        with pytest.raises(httpx.HTTPStatusError, match="400"):
            syncer.save_and_hotload("adapter-1")
    warnings = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert any("adapters are not loaded by agents" in one for one in warnings)
    settle(door, None)


def test_requests_are_refused_at_once(agents_door: AgentsDoor) -> None:
    """A 404 or 425 is a swap to the SDK, which waits for its end ten times."""

    async def sample() -> None:
        sampler = DeploymentSampler(agents_door.url, agents_door.deployment, KEY)
        with pytest.raises(httpx.HTTPStatusError, match="400"):
            await sampler.sample_with_prompt_tokens([1, 2], max_tokens=1)
        await sampler._get_async_client().aclose()

    asyncio.run(sample())


def test_the_typed_client_reads_lists_and_is_refused_in_words(agents_door: AgentsDoor) -> None:
    door = agents_door
    with Fireworks(api_key=KEY, account_id="local", base_url=door.url, max_retries=0) as typed:
        (account,) = typed.accounts.list()
        assert account.name == typed.accounts.get(account_id="local").name == "accounts/local"
        (deployment,) = typed.deployments.list()
        assert deployment == typed.deployments.get(NAME)
        assert (deployment.name, deployment.state) == (door.deployment, "READY")
        (model,) = typed.models.list()
        assert model == typed.models.get("policy")
        assert model.name == door.model
        with pytest.raises(APIStatusError, match="deployment not found"):
            typed.deployments.get("other")
        asked: dict[str, Any] = {"model": door.deployment, "max_tokens": 1}
        with pytest.raises(APIStatusError, match=NO_REQUESTS):
            typed.completions.create(prompt="1 + 1", **asked)
        with pytest.raises(APIStatusError, match=NO_REQUESTS):
            typed.chat.completions.create(messages=[{"role": "user", "content": "1 + 1"}], **asked)
        with pytest.raises(APIStatusError, match="adapters are not loaded by agents"):
            typed.lora.load(model=door.model, deployment=door.deployment)
