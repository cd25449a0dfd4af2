"""Chunks of problems to parts in a store, resumed and refused, on a scripted inference server."""

import asyncio
import hashlib
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import pytest
from prefect.logging import disable_run_logger

from hotload.clients.store import Store
from hotload.concurrently import overlap
from hotload.dataset.rollout_plan import MANIFEST_FILE, RolloutManifest, RolloutPlan
from hotload.errors import (
    ServiceRefusedError,
    StoreError,
    StoreUnavailableError,
)
from hotload.rollout.counts import RolloutSummary
from hotload.sampling.problems import plan_rollouts
from hotload.sampling.rollout import SampledService, open_rollout
from hotload.spec import CycleSpec
from tasks.roll_out import find_rollout, hand_back, roll_out_chunk
from tests.blocks.scripted_inference import DONE, GOOD, IDENTITY, client, event, token
from tests.factories import cycle_spec
from tests.scripted_server import Reply, Request, ScriptedServer, http
from tests.tasks.publishing import disk_full_after


@pytest.fixture
def store(tmp_path: Path) -> Store:
    (tmp_path / "store").mkdir()
    return Store(url=f"file://{tmp_path}/store")


@pytest.fixture
def spec(tmp_path: Path) -> CycleSpec:
    dataset = tmp_path / "problems.jsonl"
    rows = ({"id": i, "prompt": f"problem {i}", "answer": "ab"} for i in range(5))
    dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampling = {
        "completions_per_prompt": 2,
        "problems_per_task": 2,
        "concurrency": {"mode": "fixed", "initial_window": 1},
    }
    problems = {"dataset": str(dataset)}
    return cycle_spec(work_dir=str(tmp_path), problems=problems, sampling=sampling)


@asynccontextmanager
async def served(*replies: Reply) -> AsyncIterator[ScriptedServer]:
    async with ScriptedServer(*replies).running() as script:
        yield script


async def roll_out(
    spec: CycleSpec, store: Store, script: ScriptedServer
) -> tuple[RolloutPlan, RolloutManifest]:
    plan = await plan_rollouts(spec, IDENTITY)
    with disable_run_logger():
        async with open_rollout(
            spec, plan, SampledService(client(script.port), IDENTITY, 3), store
        ) as rollout:
            await overlap(roll_out_chunk.fn(rollout, number) for number in range(len(plan.parts)))
            return plan, rollout.manifest(is_complete=True)


async def whole(spec: CycleSpec, store: Store, script: ScriptedServer) -> RolloutSummary:
    plan, manifest = await roll_out(spec, store, script)
    return await hand_back.fn(store, manifest, plan.path(MANIFEST_FILE))


async def test_parts_and_then_the_manifest(spec: CycleSpec, store: Store) -> None:
    async with served(http(b"", 400), http(GOOD)) as script:
        summary = await whole(spec, store, script)
    assert len(script.requests) == 10
    assert (summary.group_count, summary.sample_count) == (5, 10)
    assert summary.failed_samples == {"refused": 1}
    assert summary.mean_reward == 1.0
    assert summary.samples_by_identity == {IDENTITY: 9}
    assert summary.completion_token_count == 18
    assert summary.parts_uri == f"{store.url}/_hotload/rollouts/{IDENTITY}"
    directory = f"_hotload/rollouts/{IDENTITY}"
    data = await store.read_bytes(f"{directory}/manifest.json", limit_bytes=1 << 20)
    manifest = RolloutManifest.parse(data, path="manifest.json")
    assert manifest.summary == summary
    assert await store.names(directory) == [
        "manifest.json",
        *(part.file for part in manifest.parts),
    ]
    rows = 0
    for part in manifest.parts:
        data = await store.read_bytes(f"{directory}/{part.file}", limit_bytes=1 << 20)
        assert hashlib.sha256(data).hexdigest() == part.sha256
        frame = pl.read_parquet(io.BytesIO(data))
        rows += frame.height
        assert frame.height == part.sample_count
    assert rows == 10
    assert all("problem" not in json.dumps(part.model_dump()) for part in manifest.parts)


@pytest.mark.slow
async def test_what_is_there_is_not_sampled_again(spec: CycleSpec, store: Store) -> None:
    async with served(http(GOOD)) as script:
        plan, manifest = await roll_out(spec, store, script)
        # So far the manifest names all there is and says that more may come.
        assert await find_rollout.fn(store, plan.directory, plan.digest) is None
        damaged = manifest.parts[1].file
        await store.put_bytes(b"damaged", plan.path(damaged))
        again, found = await roll_out(spec, store, script)
        assert len(script.requests) == 10 + 4
        assert again == plan
        # No file is written over: a reader may rely on it.
        assert [part.file for part in found.parts] == [
            "part-00000-00.parquet",
            "part-00001-01.parquet",
            "part-00002-00.parquet",
        ]
        assert (found.parts[0], found.parts[2]) == (manifest.parts[0], manifest.parts[2])
        # What was found took no time of this run, so its rates are without it.
        told = found.summary
        assert (told.sample_count, told.found_sample_count, told.found_token_count) == (10, 6, 12)
        assert told.samples_per_second == 4 / told.seconds
        assert told.tokens_per_second == 8 / told.seconds
        assert manifest.summary.found_sample_count == 0
        summary = await hand_back.fn(store, found, plan.path(MANIFEST_FILE))
        assert await find_rollout.fn(store, plan.directory, plan.digest) == summary

        other = spec.model_copy(update={"sampling": spec.sampling.model_copy(update={"seed": 9})})
        replanned = await plan_rollouts(other, IDENTITY)
        assert await find_rollout.fn(store, replanned.directory, replanned.digest) is None
        await roll_out(other, store, script)
        assert len(script.requests) == 14 + 10


async def test_a_failed_write_costs_no_sample(
    spec: CycleSpec, store: Store, tmp_path: Path
) -> None:
    plan = await plan_rollouts(spec, IDENTITY)
    in_the_way = tmp_path / "store" / "_hotload" / "rollouts"
    with disable_run_logger():

        async def in_the_way_now(request: Request) -> bytes:
            in_the_way.parent.mkdir(exist_ok=True)
            in_the_way.touch()
            return http(GOOD)

        async with (
            served(in_the_way_now) as script,
            open_rollout(
                spec, plan, SampledService(client(script.port), IDENTITY), store
            ) as rollout,
        ):
            with pytest.raises(StoreError):
                await roll_out_chunk.fn(rollout, 0)
            in_the_way.unlink()
            (part,) = await roll_out_chunk.fn(rollout, 0)
            assert len(script.requests) == part.sample_count == 4


async def test_a_disk_that_fills_up_leaves_no_half_file_and_costs_no_sample(
    spec: CycleSpec, store: Store
) -> None:
    plan = await plan_rollouts(spec, IDENTITY)
    with disable_run_logger():
        async with (
            served(http(b"", 400), http(GOOD)) as script,
            open_rollout(
                spec, plan, SampledService(client(script.port), IDENTITY), store
            ) as rollout,
        ):
            assert rollout.state() == "0 groups ended, 5 planned; 0 samples under way, window 1"
            with disk_full_after(1000), pytest.raises(StoreError, match="File too large"):
                await roll_out_chunk.fn(rollout, 0)
            assert await store.names(plan.directory) == []
            (part,) = await roll_out_chunk.fn(rollout, 0)
            assert len(script.requests) == part.sample_count == 4
            assert rollout.state() == (
                "2 groups ended, 5 planned; 0 samples under way, window 1; "
                "requests without an answer: 1 × HTTP 400"
            )
    data = await store.read_bytes(plan.path(part.file), limit_bytes=1 << 20)
    assert hashlib.sha256(data).hexdigest() == part.sha256


@dataclass(frozen=True, eq=False)
class MovedBucket(Store):
    """A store that is not to be reached until it `is_back`."""

    is_back: asyncio.Event = field(default_factory=asyncio.Event)
    tried: list[str] = field(default_factory=list)

    async def create_bytes(self, data: bytes, path: str) -> bool:
        self.tried.append(path)
        if not self.is_back.is_set():
            raise StoreUnavailableError(path, "no connection to the store")
        return await super().create_bytes(data, path)


def long_prompt() -> bytes:
    """A good answer that says of its prompt that a group of two fills a file."""
    raw = {"completion_token_ids": [1], "prompt_token_ids": [7] * (1 << 17)}
    choice = {"index": 0, "text": "", "finish_reason": "stop", "raw_output": raw}
    model = f"accounts/a/models/m@{IDENTITY}"
    return token(1, "a") + event({"model": model, "choices": [choice]}) + DONE


async def test_a_store_that_does_not_answer_holds_sampling_back(
    spec: CycleSpec, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    away = MovedBucket(url=f"file://{tmp_path}/store")
    many = spec.sampling.model_copy(update={"problems_per_task": 5})
    spec = spec.model_copy(update={"sampling": many})
    plan = await plan_rollouts(spec, IDENTITY)
    with disable_run_logger():
        async with (
            served(http(long_prompt())) as script,
            open_rollout(
                spec, plan, SampledService(client(script.port), IDENTITY), away
            ) as rollout,
        ):
            with pytest.raises(StoreUnavailableError):
                await roll_out_chunk.fn(rollout, 0)
            sampled, tries = len(script.requests), len(away.tried)
            assert sampled < 10
            with pytest.raises(StoreUnavailableError):
                await roll_out_chunk.fn(rollout, 0)
            assert (len(script.requests), len(away.tried)) == (sampled, tries + 1)
            away.is_back.set()
            parts = await roll_out_chunk.fn(rollout, 0)
            assert sum(part.sample_count for part in parts) == len(script.requests) == 10
            names = [request.headers["x-request-id"] for request in script.requests]
            assert len(set(names)) == 10


async def test_a_refused_key_stops_everything(spec: CycleSpec, store: Store) -> None:
    async with served(http(GOOD), http(b"", 401)) as script:
        with pytest.raises(ServiceRefusedError):
            await roll_out(spec, store, script)
        assert len(script.requests) < 10
    assert await store.names("_hotload/rollouts") == []
