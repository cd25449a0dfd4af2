"""How full the window is, what becomes of what comes too late, and when groups are written."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from hotload.clients.store import Store
from hotload.errors import RolloutsFailedError, ServiceRefusedError, StoreUnavailableError
from hotload.sampling.rollout import SECONDS_BETWEEN_WRITES
from tasks.roll_out import roll_out_chunk
from tests.blocks.scripted_inference import NO_IDS, saying
from tests.loop_clock import LoopClock
from tests.scripted_server import Request, http, never
from tests.tasks.bench import (
    Bench,
    carry_all,
    playing,
    replying,
    right_and_wrong,
    under_way,
    until,
)
from tests.waiting import PATIENCE_SECONDS


@pytest.mark.parametrize("groups", [{}, {"hedge_after_seconds": 3600}])
@pytest.mark.parametrize(("size", "window"), [(4, 8), (8, 2)])
async def test_the_slowest_samples_of_their_groups_fill_the_window(
    bench: Bench, groups: dict[str, Any], size: int, window: int
) -> None:
    slow: set[str] = set()
    is_full = asyncio.Event()

    async def one_of_each_is_slow(asked: Request) -> bytes:
        if asked.prompt not in slow:
            slow.add(asked.prompt)
            await is_full.wait()
        return right_and_wrong(asked)

    spec = bench.spec(
        12,
        completions_per_prompt=size,
        groups=groups,
        concurrency={"mode": "fixed", "initial_window": window},
    )
    async with bench.rollout(spec, one_of_each_is_slow) as (rollout, server):
        carrying = asyncio.create_task(carry_all(rollout))
        async with asyncio.timeout(PATIENCE_SECONDS):
            await until(lambda: len(slow) == under_way(rollout) == window)
        is_full.set()
        await carrying
    assert len(server.requests) == 12 * size


async def test_the_wait_for_a_slot_is_not_the_turn_s_time(
    bench: Bench, loop_clock: LoopClock
) -> None:
    """Four turns of 50 s, one after the other, none of which may take more than 60 s."""

    async def slow(asked: Request) -> bytes:
        loop_clock.pass_seconds(50)
        return right_and_wrong(asked)

    spec = bench.spec(
        1,
        completions_per_prompt=4,
        concurrency={"mode": "fixed", "initial_window": 1},
        rollout=playing("one_turn", turn_timeout_seconds=60),
    )
    manifest, server = await bench.run(spec, slow)
    assert manifest.summary.failed_samples == {}
    assert len(server.requests) == 4


async def test_nothing_is_asked_again_when_the_time_is_up(
    bench: Bench, loop_clock: LoopClock
) -> None:
    async def fails_answers_and_hangs(asked: Request) -> bytes:
        if asked.number == 2:
            loop_clock.pass_seconds(60)
            return await never()
        return saying("ab") if asked.number else NO_IDS

    spec = bench.spec(
        1,
        completions_per_prompt=3,
        groups={"deadline_seconds": 60, "max_incomplete_group_retries": 2},
        concurrency={"mode": "fixed", "initial_window": 1},
    )
    manifest, server = await bench.run(spec, fails_answers_and_hangs)
    counts = manifest.summary.groups
    assert manifest.summary.failed_samples == {"missing_token_ids": 1, "deadline": 1}
    assert counts.asked_again == {}
    assert counts.attempts == len(server.requests) == 3


async def test_a_pair_that_is_cut_off_is_counted_with_both_its_requests(
    bench: Bench, loop_clock: LoopClock
) -> None:
    async def one_session_is_answered(asked: Request) -> bytes:
        return saying("ab") if asked.number == 0 else await never()

    spec = bench.spec(1, groups={"deadline_seconds": 60, "hedge_after_seconds": 20})
    async with bench.rollout(spec, one_session_is_answered) as (rollout, server):
        carrying = asyncio.create_task(carry_all(rollout))
        await until(lambda: len(server.requests) == 2 and under_way(rollout) == 1)
        loop_clock.pass_seconds(20)
        await until(lambda: len(server.requests) == 3)
        loop_clock.pass_seconds(60)
        await carrying
        manifest = rollout.manifest(is_complete=True)
    counts = manifest.summary.groups
    assert manifest.summary.failed_samples == {"deadline": 1}
    assert (counts.hedges, counts.hedges_won, counts.cut_off) == (1, 0, 2)
    assert counts.failed_attempts == {"cancelled": 2}
    assert counts.attempts == len(server.requests) == 3


async def test_a_function_that_is_left_behind_asks_no_more(
    bench: Bench, loop_clock: LoopClock
) -> None:
    async def second_turns_hang(asked: Request) -> bytes:
        return saying("ab") if asked.number < 2 else await never()

    spec = bench.spec(1, rollout=playing("stubborn", trajectory_timeout_seconds=60))
    async with bench.rollout(spec, second_turns_hang) as (rollout, server):
        carrying = asyncio.create_task(carry_all(rollout))
        await until(lambda: len(server.requests) == 4)
        loop_clock.pass_seconds(60)
        await carrying
        manifest = rollout.manifest(is_complete=True)
    assert manifest.summary.failed_samples == {"trajectory_timeout": 2}
    assert manifest.summary.groups.attempts == len(server.requests) == 4


async def test_a_turn_that_begins_as_the_group_s_time_is_up_is_not_sent(
    bench: Bench, loop_clock: LoopClock
) -> None:
    function = playing("pausing", arguments={"seconds": 60})
    spec = bench.spec(1, rollout=function, groups={"deadline_seconds": 60})
    async with bench.rollout(spec, replying(lambda _: saying("ab"))) as (rollout, server):
        carrying = asyncio.create_task(carry_all(rollout))
        await until(lambda: len(server.requests) == 2 and under_way(rollout) == 0)
        rollout._sampler.end_step()
        loop_clock.pass_seconds(60)
        await carrying
        manifest = rollout.manifest(is_complete=True)
        assert rollout._sampler.end_step().max_in_flight == 0  # not even a slot was taken for it
    assert manifest.summary.failed_samples == {"deadline": 2}
    assert manifest.summary.groups.failed_attempts == {}
    assert manifest.summary.groups.attempts == len(server.requests) == 2


async def test_rows_that_were_half_answered_are_kept_when_the_breaker_opens(bench: Bench) -> None:
    def half(asked: Request) -> bytes:
        return NO_IDS if asked.number % 2 else saying("ab")

    spec = bench.spec(12, concurrency={"mode": "fixed", "initial_window": 1})
    async with bench.rollout(spec, replying(half)) as (rollout, server):
        with pytest.raises(RolloutsFailedError, match="missing: breaker_open"):
            await carry_all(rollout)
    manifest = await bench.published()
    counts = manifest.summary.groups
    assert 5 <= manifest.summary.group_count < 12
    assert counts.groups_by_mark == {"incomplete": manifest.summary.group_count}
    assert counts.attempts == len(server.requests) == 2 * manifest.summary.group_count


class Telling(Store):
    """A store that tells when it has a file."""

    async def create_bytes(self, data: bytes, path: str) -> bool:
        is_new = await super().create_bytes(data, path)
        is_written.set()
        return is_new


is_written = asyncio.Event()


async def test_groups_that_waited_long_enough_are_written(
    bench: Bench, tmp_path: Path, loop_clock: LoopClock
) -> None:
    """Without waiting for their part to end, or to fill a file."""
    bench.store = Telling(url=f"file://{tmp_path}/store")

    async def row_1_waits(asked: Request) -> bytes:
        if asked.prompt.endswith("1"):
            await is_written.wait()
        return right_and_wrong(asked)

    spec = bench.spec(2, concurrency={"mode": "fixed", "initial_window": 1})
    async with bench.rollout(spec, row_1_waits) as (rollout, _):
        carrying = asyncio.create_task(carry_all(rollout))
        await until(lambda: rollout._writers[0].waits_seconds > 0)
        assert not is_written.is_set()
        loop_clock.pass_seconds(2 * SECONDS_BETWEEN_WRITES)
        await carrying
    assert [part.group_count for part in (await bench.published()).parts] == [1, 1]


async def test_the_manifest_never_names_less_than_before(bench: Bench) -> None:
    """As long as nobody has looked for all that an earlier run wrote."""
    spec = bench.spec(2, problems_per_task=1)
    before, _ = await bench.run(spec, replying(right_and_wrong))
    path = f"_hotload/rollouts/{before.identity}/{before.parts[0].file}"
    await bench.store.put_bytes(b"damaged", path)
    async with bench.rollout(spec, replying(right_and_wrong)) as (rollout, _):
        await roll_out_chunk.fn(rollout, 0)
    named = [(part.file, part.sha256) for part in (await bench.published()).parts]
    assert named == [(part.file, part.sha256) for part in before.parts]
    again, idle = await bench.run(spec, replying(right_and_wrong))
    assert idle.requests == []
    assert [part.file for part in again.parts] == ["part-00000-01.parquet", before.parts[1].file]


class HalfAway(Store):
    """A store that does not answer where the first part is concerned."""

    async def create_bytes(self, data: bytes, path: str) -> bool:
        if "part-00000" in path:
            raise StoreUnavailableError(path, "no connection to the store")
        return await super().create_bytes(data, path)


async def test_what_one_part_cannot_write_keeps_no_other_from_being_saved(
    bench: Bench, tmp_path: Path
) -> None:
    bench.store = HalfAway(url=f"file://{tmp_path}/store")
    spec = bench.spec(4, problems_per_task=2, concurrency={"mode": "fixed", "initial_window": 1})

    def refused_in_row_3(asked: Request) -> bytes:
        return http(b"", 401) if asked.prompt.endswith("3") else right_and_wrong(asked)

    async with bench.rollout(spec, replying(refused_in_row_3)) as (rollout, _):
        with pytest.raises(StoreUnavailableError):
            await roll_out_chunk.fn(rollout, 0)
        with pytest.raises(ServiceRefusedError):
            await roll_out_chunk.fn(rollout, 1)
    parts = (await bench.published()).parts
    assert [(part.file, part.group_count) for part in parts] == [("part-00001-00.parquet", 1)]
