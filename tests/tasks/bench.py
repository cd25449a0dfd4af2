"""A bench for rollouts: problems, a store, and a server that answers as a test says."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import polars as pl
from prefect.logging import disable_run_logger

from hotload.clients.store import Store
from hotload.concurrently import overlap
from hotload.dataset.rollout_plan import MANIFEST_FILE, RolloutManifest
from hotload.sampling.problems import plan_rollouts
from hotload.sampling.rollout import Rollout, SampledService, open_rollout
from hotload.spec import CycleSpec
from tasks.roll_out import roll_out_chunk
from tests.blocks.scripted_inference import IDENTITY, client, saying
from tests.factories import cycle_spec
from tests.scripted_server import Reply, Request, ScriptedServer


class Bench:
    """Problems, a store, and rollouts of them by a server that a test scripts."""

    def __init__(self, root: Path) -> None:
        (root / "store").mkdir()
        self.store = Store(url=f"file://{root}/store")
        self._root = root

    def spec(self, problems: int | list[dict[str, Any]] = 2, **changes: Any) -> CycleSpec:
        """Groups of 2, right answers `ab`; `changes` go into `sampling`, `groups` within it."""
        if isinstance(problems, int):
            problems = [{"prompt": f"problem {i}", "answer": "ab"} for i in range(problems)]
        dataset = self._root / "problems.jsonl"
        rows = ({"id": i, **problem} for i, problem in enumerate(problems))
        dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
        groups = changes.pop("groups", {})
        per_step = changes.pop("prompt_groups_per_step", None)
        reward = changes.pop("reward", {"name": "exact_match"})
        return cycle_spec(
            work_dir=str(self._root),
            problems={"dataset": str(dataset), "prompt_groups_per_step": per_step},
            sampling={"completions_per_prompt": 2, **changes, "groups": groups},
            reward=reward,
        )

    @asynccontextmanager
    async def rollout(
        self, spec: CycleSpec, reply: Reply
    ) -> AsyncIterator[tuple[Rollout, ScriptedServer]]:
        plan = await plan_rollouts(spec, IDENTITY)
        with disable_run_logger():
            async with (
                ScriptedServer(reply).running() as server,
                open_rollout(
                    spec, plan, SampledService(client(server.port), IDENTITY), self.store
                ) as rollout,
            ):
                yield rollout, server

    async def run(self, spec: CycleSpec, reply: Reply) -> tuple[RolloutManifest, ScriptedServer]:
        """All parts, and the manifest at their end."""
        async with self.rollout(spec, reply) as (rollout, server):
            await carry_all(rollout)
            rows = rollout.gate._admission
            # Whatever became of a draw and its row, it was counted out once.
            assert (rows.in_flight, rows.sampled, rows.reserved) == (0, 0, 0)
            return rollout.manifest(is_complete=True), server

    async def rows(self, manifest: RolloutManifest) -> list[dict[str, Any]]:
        """What is in the part files, in order of problem and sample."""
        frames = []
        for part in manifest.parts:
            path = f"_hotload/rollouts/{IDENTITY}/{part.file}"
            data = await self.store.read_bytes(path, limit_bytes=1 << 20)
            frames.append(pl.read_parquet(io.BytesIO(data)))
        return pl.concat(frames).sort("problem_id", "sample_number").to_dicts()

    async def published(self) -> RolloutManifest:
        """The manifest as it lies in the store."""
        path = f"_hotload/rollouts/{IDENTITY}/{MANIFEST_FILE}"
        return RolloutManifest.parse(
            await self.store.read_bytes(path, limit_bytes=1 << 20), path=path
        )


async def until(is_so: Callable[[], bool]) -> None:
    """Let everything else go on until something is so, and what follows from it was done."""
    while not is_so():  # noqa: ASYNC110 - what is looked at is nobody's event
        await asyncio.sleep(0)
    for _ in range(10):
        await asyncio.sleep(0)


def under_way(rollout: Rollout) -> int:
    """Requests that hold a slot."""
    return rollout.requests_in_flight


async def carry_all(rollout: Rollout) -> None:
    await overlap(roll_out_chunk.fn(rollout, number) for number in range(len(rollout.plan.parts)))


def replying(answer: Callable[[Request], bytes]) -> Reply:
    async def reply(asked: Request) -> bytes:
        return answer(asked)

    return reply


def right_and_wrong(asked: Request) -> bytes:
    """Two answers of which one is right, whichever comes first."""
    return saying("ab" if asked.number % 2 else "ba")


def playing(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": f"tests.tasks.playing:{name}", **fields}
