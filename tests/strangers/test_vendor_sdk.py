"""The vendor's training SDK drives the emulator: every call of a trainer with its own loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fireworks.training.sdk.client import FiretitanSamplingClient
from fireworks.training.sdk.concurrency import (
    AdaptiveConcurrencyController,
    FixedConcurrencyController,
)
from fireworks.training.sdk.deployment import (
    DeploymentConfig,
    DeploymentManager,
    DeploymentSampler,
    SamplingRequestError,
)
from fireworks.training.sdk.types import ModelInput, SamplingParams
from fireworks.training.sdk.weight_syncer import WeightSyncer
from tokenizers import Tokenizer

from tests.strangers.counting import uncalled
from tests.strangers.door import (
    KEY,
    NAME,
    RANK,
    AdapterTrainer,
    Door,
    SnapshotTrainer,
    delta_after,
    load_chain,
)

PROMPT = list(b"What is 2 + 2?")
SESSION = "x-multi-turn-session-id"


class TemplateTokenizer:
    """The two methods of a transformers tokenizer that the SDK calls."""

    def __init__(self, directory: Path) -> None:
        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[int]:
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return self._tokenizer.encode(f"{text}assistant: ").ids

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def manager_of(door: Door) -> DeploymentManager:
    return DeploymentManager(api_key=KEY, base_url=door.url)


def sampler_of(door: Door, **settings: Any) -> DeploymentSampler:
    return DeploymentSampler(door.url, door.deployment, KEY, **settings)


def test_the_deployment_manager(
    door: Door, trainer: SnapshotTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    manager = manager_of(door)
    assert manager.account_id == "local"
    ready = manager.wait_for_ready(NAME)
    assert (ready.state, ready.inference_model) == ("READY", door.deployment)
    assert ready.hot_load_bucket_url == str(door.bucket)
    assert ready.hot_load_transition_type == door.transition
    assert manager.get(NAME) == ready
    assert manager.get("other") is None
    config = DeploymentConfig(deployment_id=NAME, base_model=door.model)
    assert manager.create_or_get(config) == ready
    other = DeploymentConfig(deployment_id="other", base_model=door.model)
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        manager.create_or_get(other)

    def load(kind: str, previous: str | None = None, **fields: Any) -> str:
        identity = trainer.save_weights_for_sampler_ext("sdk", kind).snapshot_name
        metadata = delta_after(previous) if previous is not None else None
        assert manager.hotload_and_wait(NAME, door.model, identity, metadata, **fields)
        assert manager.last_hotload_error_message is None
        assert door.served()[0] == identity
        door.tick()  # the SDK looks at one replica alone
        assert door.served() == [identity] * 2
        return identity

    full, first, second, third = load_chain(manager, door.model, load)
    assert manager.warmup(door.deployment)

    for identity, previous in (("absent", None), ("late", "unknown"), ("late", first)):
        metadata = delta_after(previous) if previous else None
        with pytest.raises(httpx.HTTPStatusError, match="400"):
            manager.hotload(NAME, door.model, identity, metadata)
    assert not manager.wait_for_hotload(NAME, door.model, "absent", timeout_seconds=0.2)
    assert "Hotload did not complete" in manager.last_hotload_error_message

    entries = door.ledger("GET")["entries"]
    assert [entry["identity"] for entry in entries] == [third, second, first, full]
    assert door.ledger("DELETE") == {}
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        manager.hotload(NAME, door.model, third, delta_after(second))

    # What the emulator's deployment is, its command line says.
    for change in (
        lambda: manager.update(NAME, {"maxReplicaCount": 3}, ["max_replica_count"]),
        lambda: manager.reattach_trainer(
            NAME, base_model=door.model, trainer_job_name="job", timeout_s=1
        ),
    ):
        with pytest.raises(httpx.HTTPStatusError, match="400"):
            change()
    with caplog.at_level(logging.WARNING):
        manager.scale_to_zero(NAME)
        manager.delete(NAME)
    assert [record.message.count("400 Bad Request") for record in caplog.records[-2:]] == [1, 1]
    assert manager.get(NAME) == ready

    wrong = DeploymentManager(api_key="wrong", base_url=door.url)
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        print(wrong.account_id)
    wrong.close()
    manager.close()
    assert not uncalled(DeploymentManager)


def test_a_failed_load_is_told_by_the_status(
    open_door: Callable[..., Door], trainer: SnapshotTrainer
) -> None:
    door = open_door("ASYNC", "--replicas", "1", "--chain-error", "load_error")
    with manager_of(door) as manager:
        identity = trainer.save_weights_for_sampler_ext("sdk", "delta").snapshot_name
        assert not manager.hotload_and_wait(NAME, door.model, identity, delta_after("unknown"))
        assert f"target snapshot: {identity}; stage=error" in manager.last_hotload_error_message


def test_a_service_that_does_not_know_the_prompt_cache_field(
    open_door: Callable[..., Door], trainer: SnapshotTrainer
) -> None:
    door = open_door("ASYNC", "--replicas", "1", "--reject-reset-prompt-cache")
    with manager_of(door) as manager:
        identity = trainer.save_weights_for_sampler_ext("sdk", "base").snapshot_name
        assert manager.hotload_and_wait(NAME, door.model, identity)
        assert manager._hotload_reset_prompt_cache_supported is False


def test_the_weight_syncer(door: Door, trainer: SnapshotTrainer, checkpoints: list[Path]) -> None:
    manager = manager_of(door)
    syncer = WeightSyncer(trainer, manager, NAME, door.model, hotload_timeout=60)
    syncer.wait_for_hotload_ready()
    assert syncer.check_deployment_state() is None
    base = syncer.save_and_hotload("step-1")
    assert syncer.check_deployment_state() == base
    for step in (2, 3):
        identity = syncer.save_and_hotload(f"step-{step}")
        assert syncer.base_identity == identity
        assert syncer.last_timing.keys() == {
            "save_time_s", "hotload_time_s", "warmup_time_s", "total_time_s",
        }  # fmt: skip
    kinds = [entry["kind"] for entry in door.ledger("GET")["entries"]]
    assert kinds == ["delta", "delta", "full"]

    tokenizer = TemplateTokenizer(checkpoints[0])
    sampler = syncer.get_deployment_sampler(tokenizer)
    messages = [{"role": "user", "content": "2 + 2?"}]
    (answer,) = asyncio.run(sampler.sample_with_tokens(messages, max_tokens=4))
    assert answer.finish_reason in ("length", "stop")
    client = syncer.get_sampling_client(tokenizer)
    parameters = SamplingParams(max_tokens=4, temperature=1.0)
    (sequence,) = client.sample(ModelInput.from_ints(PROMPT), 1, parameters).result(60).sequences
    assert len(sequence.tokens) == len(sequence.logprobs) <= 4
    client.close()

    # A new trainer begins a chain of its own.
    syncer.reset_delta_chain()
    snapshot = syncer.save_only("resumed", checkpoint_type="base")
    assert syncer.hotload(snapshot, "base")
    assert syncer.check_deployment_state() == snapshot
    door.tick()
    assert door.served() == [snapshot] * 2
    assert not uncalled(WeightSyncer)
    manager.close()


def test_the_weight_syncer_with_adapters(door: Door, checkpoints: list[Path]) -> None:
    trainer = AdapterTrainer(checkpoints[0], door.bucket)
    with manager_of(door) as manager:
        syncer = WeightSyncer(trainer, manager, NAME, door.model, lora_rank=RANK)
        client = syncer.get_sampling_client()
        prompt, seen = ModelInput.from_ints(PROMPT), []
        for step in (1, 2):
            assert syncer.save_and_hotload(f"adapter-{step}") == f"adapter-{step}"
            door.tick()
            seen.append(client.compute_logprobs(prompt).result(60)[1:])
        assert seen[0] != pytest.approx(seen[1])
        client.close()
    assert {entry["kind"] for entry in door.ledger("GET")["entries"]} == {"lora"}


def test_the_sampler(door: Door, checkpoints: list[Path]) -> None:
    async def sample() -> None:
        tokenizer = TemplateTokenizer(checkpoints[0])
        sampler = sampler_of(door, tokenizer=tokenizer)
        ask: dict[str, Any] = {"max_tokens": 6, "logprobs": True, "ignore_eos": True}
        messages = [{"role": "user", "content": "2 + 2?"}]
        for completion in await sampler.sample_with_tokens(messages, n=4, **ask):
            assert completion.completion_len == 6
            assert completion.inference_logprobs == completion.sampling_logprobs
            assert completion.full_tokens[: completion.prompt_len] == (
                tokenizer.apply_chat_template(messages)
            )

        async def one(**fields: Any) -> Any:
            (completion,) = await sampler.sample_with_prompt_tokens(PROMPT, **{**ask, **fields})
            return completion

        greedy = await one(temperature=0.0)
        assert greedy.sampling_logprobs == [0.0] * 6
        tempered = await one(temperature=0.7, top_p=0.9, top_k=20, seed=3)
        assert tempered.sampling_logprobs != tempered.inference_logprobs
        assert (await one(temperature=0.7, top_p=0.9, top_k=20, seed=3)).text == tempered.text
        alternatives = await one(top_logprobs=5)
        assert [len(ids) for ids in alternatives.inference_topk_token_ids] == [5] * 6

        # Echo: P + C - 1 aligned log-probabilities, the first token's row dropped.
        echoed = await one(echo=True, top_logprobs=1, seed=3)
        assert len(echoed.inference_logprobs) == len(PROMPT) - 1 + 6
        assert echoed.echoed_prompt_logprob_count == len(PROMPT) - 1
        assert len(echoed.inference_topk_logprobs) == len(PROMPT) - 1 + 6
        assert None not in echoed.sampling_logprobs[len(PROMPT) - 1 :]
        last = await one(echo_last=3, seed=3)
        assert last.echoed_prompt_logprob_count == 3
        assert last.inference_logprobs == pytest.approx(echoed.inference_logprobs[-9:])
        assert last.full_tokens == echoed.full_tokens

        text = (await one(seed=5)).text
        stopped = await one(seed=5, stop=[text[2:4]])
        assert (stopped.text, stopped.finish_reason) == (text[: text.index(text[2:4])], "stop")
        by_id = await one(stop=[PROMPT[0]])  # decoded by the SDK
        assert by_id.finish_reason in ("stop", "length")
        assert await sampler.sample_with_prompt_tokens(PROMPT, max_seq_len=4) == []

        # One session stays with its replica, whose cache it then finds.
        headers = {SESSION: "trajectory-1", "x-session-affinity": "trajectory-1"}
        for _ in range(3):
            result = await sampler.sample_with_prompt_tokens_result(
                PROMPT, additional_headers_snapshot=headers, logical_request_id="mine", **ask
            )
        assert (result.attempts, result.server_metrics.response_request_id) == (1, "mine")
        assert result.server_metrics.cached_prompt_tokens == len(PROMPT) - 1
        keyed = [await one(prompt_cache_key="k", user="u") for _ in range(3)]
        assert len(keyed) == 3
        sessions = {(e["session"], e["replica"]) for e in door.log()["requests"] if e["session"]}
        assert len(sessions) == 2

        raw, metrics = await sampler.async_completions_stream(PROMPT, max_tokens=3)
        assert raw["usage"]["prompt_tokens"] == metrics.prompt_tokens == len(PROMPT)
        for name in (
            "num_concurrent_requests", "prefill_queue_duration", "generation_queue_duration",
            "server_ttft", "server_processing_time", "prefill_duration", "generation_duration",
            "client_latency", "backend_host", "deployment",
        ):  # fmt: skip
            assert getattr(metrics, name) is not None, name
        drained = sampler.drain_metrics()
        assert len(drained) > 10
        assert all(record.error is None for record in drained)
        assert "avg_pq" in sampler.concurrency_controller.step_completed()
        sampler.concurrency_controller = FixedConcurrencyController(2)
        assert len(await sampler.sample_with_prompt_tokens(PROMPT, n=5, **ask)) == 5
        assert sampler.account_id == "local"

        # Parquet routing is refused by the sentence the SDK falls back on; the numpy model has no
        # experts to show either.
        sampler.negotiate_routing_matrix_format("parquet_v1", "store")
        with pytest.raises(httpx.HTTPStatusError, match="400"):
            await one(include_routing_matrix=True)
        assert (sampler._r3_negotiated, sampler.routing_matrix_format) == (True, "base64_inline")
        with pytest.raises(httpx.HTTPStatusError, match="does not support Parquet sampling"):
            await one(top_sampling_logprobs=4, top_sampling_format="parquet_v1")
        await sampler._get_async_client().aclose()
        sampler.close()

    asyncio.run(sample())
    assert not uncalled(DeploymentSampler)


def test_routing_matrices_fall_back_to_base64(open_door: Callable[..., Door]) -> None:
    door = open_door("ASYNC", "--replicas", "1", "--engine", "stub")

    async def sample() -> Any:
        sampler = sampler_of(door)
        sampler.negotiate_routing_matrix_format("parquet_v1", "store")
        (completion,) = await sampler.sample_with_prompt_tokens(
            PROMPT, max_tokens=3, logprobs=True, include_routing_matrix=True
        )
        assert sampler.routing_matrix_format == "base64_inline"
        assert completion.routing_matrices == ["AAECAwACAQM="] * 3
        await sampler._get_async_client().aclose()

    asyncio.run(sample())


def test_the_tinker_like_client(door: Door) -> None:
    client = FiretitanSamplingClient.create(
        inference_url=door.url, model=door.deployment, api_key=KEY
    )
    prompt = ModelInput.from_ints(PROMPT)
    logprobs = client.compute_logprobs(prompt).result(60)
    assert logprobs[0] is None
    assert len(logprobs) == len(PROMPT)
    assert all(value < 0 for value in logprobs[1:])
    assert asyncio.run(client.compute_logprobs_async(prompt)) == pytest.approx(logprobs)
    parameters = SamplingParams(max_tokens=5, temperature=1.0, seed=1, stop=["never there"])
    answer = asyncio.run(client.sample_async(prompt, 2, parameters, include_prompt_logprobs=True))
    assert answer.prompt_logprobs[1:] == pytest.approx(logprobs[1:])
    assert len(answer.sequences) == 2
    handle = client.get_sampler_handle()
    other = FiretitanSamplingClient.from_sampler_handle(handle, api_key=KEY)
    assert other.sample(prompt, 1, parameters).result(60).sequences
    other.close()
    client.close()


@pytest.mark.parametrize("transition", ["ASYNC", "SYNC"])
def test_a_swap_while_samples_run(
    open_door: Callable[..., Door], trainer: SnapshotTrainer, transition: str
) -> None:
    pace = ("--seconds-per-state", "2", "--seconds-per-token", "1")
    door = open_door(transition, "--replicas", "1", *pace)
    full = trainer.save_weights_for_sampler_ext("sdk", "base").snapshot_name
    delta = trainer.save_weights_for_sampler_ext("sdk", "delta").snapshot_name
    ask: dict[str, Any] = {"logprobs": True, "ignore_eos": True}

    async def until(wanted: Callable[[list[dict[str, Any]]], bool]) -> None:
        while not wanted((await asyncio.to_thread(door.log))["requests"]):
            pass

    async def swap() -> None:
        manager, sampler = manager_of(door), sampler_of(door)
        await asyncio.to_thread(manager.hotload, NAME, door.model, full)
        door.tick(20)
        assert await asyncio.to_thread(manager.wait_for_hotload, NAME, door.model, full)

        def sample(count: int) -> asyncio.Task[Any]:
            return asyncio.create_task(
                sampler.sample_with_prompt_tokens_result(
                    PROMPT, max_tokens=count, hotload_retry_interval=0.01,
                    hotload_max_retries=100_000, **ask,
                )
            )  # fmt: skip

        running = sample(12)
        await until(lambda requests: len(requests) == 1 and requests[0]["replica"])
        door.tick()
        await asyncio.to_thread(manager.hotload, NAME, door.model, delta, delta_after(full))
        door.tick(5)  # pending and downloading are over; the swap has begun, or waits for the drain
        new = sample(2)
        await until(lambda requests: len(requests) >= 2)
        if transition == "SYNC":
            await until(lambda requests: requests[-1]["status"] == 425)
        while not (running.done() and new.done()):
            await asyncio.to_thread(door.tick, 1)
        assert await asyncio.to_thread(manager.wait_for_hotload, NAME, door.model, delta)
        for task, count in ((running, 12), (new, 2)):
            (completion,) = task.result().completions
            assert completion.completion_len == count
            assert task.result().attempts == 1
        await sampler._get_async_client().aclose()
        manager.close()

    asyncio.run(swap())
    requests = door.log()["requests"]
    served = [entry for entry in requests if entry["status"] == 200]
    old = next(entry for entry in served if entry["completion_tokens"] == 12)
    new = next(entry for entry in served if entry["completion_tokens"] == 2)
    spans = {"ASYNC": (full, delta), "SYNC": (full, full)}[transition]
    assert (old["identity_first"], old["identity_last"]) == spans
    assert (new["identity_first"], new["identity_last"]) == (delta, delta)
    refused = {entry["status"] for entry in requests} - {200}
    assert refused == ({425} if transition == "SYNC" else set())


PASSING: list[tuple[str, dict[str, Any], int]] = [
    ("respond", {"status": 429, "retry_after": 0.01}, 2),
    ("respond", {"status": 500}, 2),
    ("respond", {"status": 503}, 2),
    ("respond", {"status": 425, "count": 2}, 1),
    ("respond", {"status": 404, "count": 2}, 1),
    ("truncate_stream", {}, 2),
    ("truncate_stream", {"abrupt": True}, 2),
    ("stream_error", {"status": 500}, 2),
    ("stream_error", {"status": 429, "as_event": True}, 2),
    ("disconnect", {}, 2),
]


def test_faults_that_pass_and_faults_that_do_not(open_door: Callable[..., Door]) -> None:
    door = open_door("ASYNC", "--replicas", "1")

    async def sample() -> None:
        sampler = sampler_of(door, concurrency_controller=AdaptiveConcurrencyController())

        async def one() -> Any:
            return await sampler.sample_with_prompt_tokens_result(
                PROMPT, max_tokens=4, hotload_retry_interval=0.01
            )

        for name, parameters, attempts in PASSING:
            door.fault(name, **{"count": 1, **parameters})
            assert (await one()).attempts == attempts, (name, parameters)
        for status in (400, 401, 402, 403, 413):
            door.fault("respond", status=status, count=1)
            with pytest.raises(httpx.HTTPStatusError, match=str(status)):
                await one()
        # Documented in docs/unknown.md: inside a stream the SDK takes a 425 for final.
        door.fault("stream_error", status=425, count=1)
        with pytest.raises(SamplingRequestError) as caught:
            await one()
        assert caught.value.attempts == 1
        await sampler._get_async_client().aclose()

    asyncio.run(sample())
