"""Every rule for groups at work against a real HTTP server, and its effect in the counts."""

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hotload.dataset.rollout_plan import RolloutManifest
from hotload.errors import RolloutFunctionError, RolloutsFailedError
from hotload.options import ReadinessPolicy
from hotload.rollout.counts import rule_rows
from tests.blocks.scripted_inference import IDENTITY, MODEL, NO_IDS, saying
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
from tests.tasks.playing import KEY_VARIABLE

NEWER = "run-000004-0badf00d"


async def test_missing_samples_are_asked_again_under_new_numbers(bench: Bench) -> None:
    seen: Counter[str] = Counter()

    def first_of_every_problem_fails(asked: Request) -> bytes:
        seen[asked.prompt] += 1
        return NO_IDS if seen[asked.prompt] == 1 else right_and_wrong(asked)

    spec = bench.spec(groups={"max_incomplete_group_retries": 1})
    manifest, server = await bench.run(spec, replying(first_of_every_problem_fails))
    rows = await bench.rows(manifest)
    assert all(row["failure"] is None for row in rows)
    assert {row["sample_number"] for row in rows} <= {0, 1, 2, 3}
    assert manifest.summary.groups.asked_again == {"missing_token_ids": 2}
    assert manifest.summary.groups.failed_attempts == {"missing_token_ids": 2}
    assert len(server.requests) == manifest.summary.groups.attempts == 6
    assert len({asked.body["seed"] for asked in server.requests}) == 6


@pytest.mark.parametrize(
    "asked", [{"prompt": "q"}, {"messages": [{"role": "user", "content": "q"}]}]
)
async def test_ends_that_come_again_are_named_in_the_report_and_not_asked_again(
    bench: Bench, asked: dict[str, Any]
) -> None:
    ends = ["content_filter", "repetition", "content_filter", "stop"]

    def ending(request: Request) -> bytes:
        return saying("ab", finish=ends[request.number])

    problems = [{**asked, "answer": "ab"}] * 2
    spec = bench.spec(problems, groups={"max_incomplete_group_retries": 2})
    manifest, server = await bench.run(spec, replying(ending))
    assert len(server.requests) == manifest.summary.groups.attempts == 4
    assert manifest.summary.failed_samples == {"unusable_end": 3}
    assert rule_rows(manifest.summary.groups)["requests sent again or given up"] == (
        "2 × unusable end: content_filter, 1 × unusable end: repetition"
    )


@pytest.mark.parametrize(
    ("groups", "mark", "requests"),
    [
        ({}, "incomplete", 4),
        ({"on_incomplete": "fail_group"}, "incomplete", 4),
        ({"on_incomplete": "accept_partial", "min_group_size": 2}, "incomplete", 4),
        ({"max_incomplete_group_retries": 2}, "incomplete", 4 + 4),
    ],
)
async def test_a_group_that_stays_short(
    bench: Bench, groups: dict[str, Any], mark: str, requests: int
) -> None:
    good_session: dict[str, str] = {}

    def only_one_session_is_answered(asked: Request) -> bytes:
        is_good = good_session.setdefault(asked.prompt, asked.session) == asked.session
        return saying("ab") if is_good else NO_IDS

    manifest, server = await bench.run(
        bench.spec(groups=groups), replying(only_one_session_is_answered)
    )
    rows = await bench.rows(manifest)
    assert Counter(row["failure"] for row in rows) == {None: 2, "missing_token_ids": 2}
    assert {row["mark"] for row in rows} == {mark}
    assert {row["advantage"] for row in rows} == {None}
    assert manifest.summary.groups.groups_by_mark == {mark: 2}
    assert len(server.requests) == manifest.summary.groups.attempts == requests


async def test_a_group_is_used_with_what_it_has(bench: Bench) -> None:
    count: Counter[str] = Counter()

    def third_fails(asked: Request) -> bytes:
        count[asked.prompt] += 1
        texts = {1: saying("ab"), 2: saying("ba"), 3: NO_IDS}
        return texts[count[asked.prompt]]

    spec = bench.spec(
        completions_per_prompt=3, groups={"on_incomplete": "accept_partial", "min_group_size": 2}
    )
    manifest, _ = await bench.run(spec, replying(third_fails))
    rows = await bench.rows(manifest)
    assert {row["mark"] for row in rows} == {"partial"}
    assert sum(row["advantage"] is not None for row in rows) == 4
    assert manifest.summary.groups.groups_by_mark == {"partial": 2}


async def test_a_group_s_time_is_up(bench: Bench, loop_clock: LoopClock) -> None:
    async def one_answer_each(asked: Request) -> bytes:
        if any(other.prompt == asked.prompt for other in server_asked[: asked.number]):
            return await never()
        return saying("ab")

    spec = bench.spec(groups={"deadline_seconds": 60})
    async with bench.rollout(spec, one_answer_each) as (rollout, server):
        server_asked = server.requests
        carrying = asyncio.create_task(carry_all(rollout))
        await until(lambda: len(server.requests) == 4 and under_way(rollout) == 2)
        loop_clock.pass_seconds(60)
        await carrying
        manifest = rollout.manifest(is_complete=True)
    rows = await bench.rows(manifest)
    assert Counter(row["failure"] for row in rows) == {None: 2, "deadline": 2}
    assert manifest.summary.failed_samples == {"deadline": 2}
    assert manifest.summary.groups.cut_off == 2
    assert manifest.summary.groups.failed_attempts == {"cancelled": 2}
    assert manifest.summary.groups.attempts == len(server.requests) == 4
    late = next(row for row in rows if row["failure"] == "deadline")
    assert late["request_id"] in {asked.headers["x-request-id"] for asked in server.requests}


async def test_the_slowest_sample_is_asked_for_twice(bench: Bench) -> None:
    hung: dict[str, Request] = {}

    async def one_session_hangs(asked: Request) -> bytes:
        if hung.setdefault(asked.prompt, asked) is asked:
            return await never()
        return saying("ab")

    spec = bench.spec(groups={"hedge_after_seconds": 0.05})
    manifest, server = await bench.run(spec, one_session_hangs)
    rows = await bench.rows(manifest)
    assert [row["failure"] for row in rows] == [None] * 4
    assert {row["sample_number"] for row in rows} == {0, 1}
    assert sum(row["is_hedge"] for row in rows) == 2
    counts = manifest.summary.groups
    assert (counts.hedges, counts.hedges_won, counts.cut_off) == (2, 2, 2)
    assert counts.failed_attempts == {"cancelled": 2}
    assert counts.attempts == len(server.requests) == 6
    for prompt, first in hung.items():
        (second,) = [
            asked
            for asked in server.requests
            if asked.prompt == prompt
            and asked.body["seed"] == first.body["seed"]
            and asked is not first
        ]
        # The same sample, in another session: another replica may answer.
        assert second.session != first.session
        assert second.headers["x-request-id"] != first.headers["x-request-id"]


async def test_a_hedge_that_fails_leaves_the_first_request_its_time(bench: Bench) -> None:
    release = asyncio.Event()
    seen: Counter[int] = Counter()

    async def first_waits_for_the_second(asked: Request) -> bytes:
        seen[asked.body["seed"]] += 1
        if asked.prompt.endswith("0") and asked.number == 0:
            await release.wait()
            return saying("ab")
        if seen[asked.body["seed"]] == 2:
            release.set()
            return NO_IDS
        return saying("ba")

    spec = bench.spec(1, groups={"hedge_after_seconds": 0.02})
    manifest, server = await bench.run(spec, first_waits_for_the_second)
    rows = await bench.rows(manifest)
    assert [row["failure"] for row in rows] == [None, None]
    assert [row["is_hedge"] for row in rows] == [False, False]
    counts = manifest.summary.groups
    assert (counts.hedges, counts.hedges_won, counts.cut_off) == (1, 0, 0)
    assert counts.failed_attempts == {"missing_token_ids": 1}
    assert counts.attempts == len(server.requests) == 3


@pytest.mark.slow
async def test_every_request_was_answered_or_is_counted_by_what_it_met(bench: Bench) -> None:
    """Attempts = answers + failed attempts, over kept, dropped, replaced and cut-off samples."""
    kinds = [saying("ab"), http(b"", 400), saying("ab"), NO_IDS, saying("ba")]
    answered: Counter[bytes] = Counter()
    hung: set[str] = set()

    async def in_turn(asked: Request) -> bytes:
        if asked.prompt.endswith("7") and asked.prompt not in hung:
            hung.add(asked.prompt)
            return await never()
        # The hedge of one that hangs is answered well: it would be waited for otherwise.
        kind = saying("ab") if asked.prompt in hung else kinds[asked.number % len(kinds)]
        answered[kind] += 1
        return kind

    rules = {
        "max_incomplete_group_retries": 1,
        "hedge_after_seconds": 1.0,
        "on_uniform": "drop",
    }
    spec = bench.spec(20, groups=rules, problems_per_task=4)
    manifest, server = await bench.run(spec, in_turn)
    counts = manifest.summary.groups
    assert len(manifest.parts) > 1
    assert counts.dropped_groups
    assert counts.asked_again
    assert counts.cut_off > 0
    assert counts.failed_attempts == {
        "400": answered[kinds[1]],
        "missing_token_ids": answered[NO_IDS],
        "cancelled": len(hung),
    }
    assert counts.attempts == len(server.requests)
    good = answered[saying("ab")] + answered[saying("ba")]
    assert counts.attempts - sum(counts.failed_attempts.values()) == good
    # What the files of the parts say is all that a later run knows.
    again, idle = await bench.run(spec, in_turn)
    assert (again.summary.groups, idle.requests) == (counts, [])


@pytest.mark.parametrize(
    ("on_uniform", "rows_left", "dropped", "refilled"),
    [("keep", 4, 0, 0), ("drop", 2, 2, 0), ("refill", 3, 3, 2)],
)
async def test_groups_that_teach_nothing(
    bench: Bench, on_uniform: str, rows_left: int, dropped: int, refilled: int
) -> None:
    """Rows 0 and 1 are right in all answers, as is row 4; of 4 rows asked for, 6 are there."""

    def uniform_for_some(asked: Request) -> bytes:
        return saying("ab") if asked.prompt[-1] in "014" else right_and_wrong(asked)

    spec = bench.spec(
        6,
        prompt_groups_per_step=4,
        groups={"on_uniform": on_uniform},
        concurrency={"max_concurrency": 1},
    )
    manifest, server = await bench.run(spec, replying(uniform_for_some))
    rows = await bench.rows(manifest)
    assert len(rows) == 2 * rows_left
    counts = manifest.summary.groups
    assert sum(counts.dropped_groups.values()) == dropped
    assert counts.refilled_groups == refilled
    assert counts.groups_by_mark == ({"uniform": 2} if on_uniform == "keep" else {})
    assert counts.raw_samples == len(server.requests) == 2 * (rows_left + dropped)
    assert {row["problem_id"] for row in rows} == {
        "keep": {"0", "1", "2", "3"},
        "drop": {"2", "3"},
        "refill": {"2", "3", "5"},
    }[on_uniform]
    # Dropped groups are not sampled again either.
    again, silent = await bench.run(spec, replying(uniform_for_some))
    assert silent.requests == []
    assert again.summary.groups == counts


@pytest.mark.parametrize(
    ("policy", "failures", "masks"),
    [
        ("accept", {None: 4}, [True, True]),
        ("mask_from_change", {None: 4}, [True, False]),
        ("drop", {None: 2, "straddling": 2}, [True, True]),
    ],
)
@pytest.mark.parametrize("function", [None, "one_turn"])
async def test_samples_of_two_versions(
    bench: Bench,
    policy: str,
    failures: dict[str | None, int],
    masks: list[bool],
    function: str | None,
) -> None:
    newer = f"accounts/a/models/m@{NEWER}"

    def every_second_changes(asked: Request) -> bytes:
        return saying("ab", MODEL, newer) if asked.number % 2 else saying("ba")

    spec = bench.spec(
        groups={"on_straddling": policy},
        concurrency={"max_concurrency": 1},
        rollout=function and playing(function),
    )
    manifest, _ = await bench.run(spec, replying(every_second_changes))
    rows = await bench.rows(manifest)
    straddling = [row for row in rows if row["weights"] == "straddling"]
    assert [row["loss_mask"] for row in straddling] == [masks, masks]
    runs = [{"start": 0, "identity": IDENTITY}, {"start": 1, "identity": NEWER}]
    assert [row["identity_runs"] for row in straddling] == [runs, runs]
    assert Counter(row["failure"] for row in rows) == failures
    counts = manifest.summary.groups
    assert counts.straddling_samples == 2
    assert counts.tokens_masked == (2 if policy == "mask_from_change" else 0)
    assert manifest.summary.samples_by_identity[f"{IDENTITY} → {NEWER}"] == 2


async def test_groups_begun_too_late_are_marked(bench: Bench) -> None:
    """O = 1: two versions ahead, what has not begun is not begun any more."""
    release = asyncio.Event()

    async def first_group_waits(asked: Request) -> bytes:
        if len(server.requests) == 2:
            assert rollout.gate.publish(4)
            assert not rollout.gate.is_stale
            assert rollout.gate.publish(5)
            release.set()
        await release.wait()
        return right_and_wrong(asked)

    spec = bench.spec(
        3, max_head_offpolicy_versions=1, concurrency={"max_concurrency": 2}, problems_per_task=1
    )
    async with bench.rollout(spec, first_group_waits) as (rollout, server):
        await carry_all(rollout)
        manifest = rollout.manifest(is_complete=True)
    rows = await bench.rows(manifest)
    stale = [row for row in rows if row["failure"] == "stale"]
    assert 0 < len(stale) < len(rows) == 6
    assert len(server.requests) == 6 - len(stale)
    assert {(row["mark"], row["attempts"], row["request_id"]) for row in stale} == {
        ("stale", 0, "")
    }
    assert manifest.summary.groups.groups_by_mark == {"stale": len(stale) // 2}


async def test_the_breaker_leaves_the_rest_for_a_later_run(bench: Bench) -> None:
    spec = bench.spec(12, concurrency={"max_concurrency": 1})
    is_down = True

    def fails_after_two_rows(asked: Request) -> bytes:
        return NO_IDS if is_down and asked.number >= 4 else right_and_wrong(asked)

    # Five rows, and the one that was begun before the last of them had ended.
    with pytest.raises(RolloutsFailedError, match="missing_token_ids 12, breaker_open 8"):
        await bench.run(spec, replying(fails_after_two_rows))
    begun = await bench.published()
    assert not begun.is_complete
    assert begun.planned_group_count == 12
    answered = [part.group_count for part in begun.parts]
    is_down = False
    manifest, server = await bench.run(spec, replying(right_and_wrong))
    rows = await bench.rows(manifest)
    assert Counter(row["problem_id"] for row in rows) == {str(n): 2 for n in range(12)}
    assert len(server.requests) == 2 * (12 - sum(answered))
    assert manifest.summary.failed_samples == {}


SWAPS_ARE_WAITED_FOR_ONCE = ReadinessPolicy(weight_sync_timeout=1e-6)


@pytest.mark.parametrize(
    "function", [None, "one_turn", "undeterred"], ids=["none", "one turn", "undeterred"]
)
async def test_a_service_that_swaps_for_ever_opens_the_breaker(
    bench: Bench, function: str | None
) -> None:
    """However many requests a row has, and however often it may ask again."""
    spec = bench.spec(
        12,
        completions_per_prompt=5,
        concurrency={"max_concurrency": 1},
        groups={"max_incomplete_group_retries": 3},
        rollout=playing(function) if function else None,
    ).model_copy(update={"readiness": SWAPS_ARE_WAITED_FOR_ONCE})
    async with bench.rollout(spec, replying(lambda _: http(b"", 404))) as (rollout, server):
        with pytest.raises(RolloutsFailedError) as failed:
            await carry_all(rollout)
    # A row, and where it was begun before the last answer of that one, another.
    assert len(server.requests) in (5, 10)
    assert f"breaker_open {60 - len(server.requests)}" in str(failed.value)
    if function != "undeterred":  # that one gives its own reason
        assert f"swap_timeout {len(server.requests)}" in str(failed.value)
        assert "HTTP 404" in str(failed.value)


async def test_a_failing_service_leaves_no_trace_in_earlier_parts(bench: Bench) -> None:
    """Rows 1 to 5 fail, in three parts: the first two have ended when the breaker opens."""
    spec = bench.spec(6, problems_per_task=2, concurrency={"max_concurrency": 1})

    def row_0_alone(asked: Request) -> bytes:
        return right_and_wrong(asked) if asked.number < 2 else NO_IDS

    with pytest.raises(RolloutsFailedError, match="missing_token_ids 10"):
        await bench.run(spec, replying(row_0_alone))
    manifest, server = await bench.run(spec, replying(right_and_wrong))
    assert len(server.requests) == 10
    assert manifest.summary.failed_samples == {}
    assert manifest.summary.sample_count == 12


async def test_what_one_row_lacks_is_recorded_where_others_were_answered(bench: Bench) -> None:
    spec = bench.spec(3, problems_per_task=1, concurrency={"max_concurrency": 1})

    def not_row_0(asked: Request) -> bytes:
        return NO_IDS if asked.number < 2 else right_and_wrong(asked)

    manifest, _ = await bench.run(spec, replying(not_row_0))
    assert manifest.summary.failed_samples == {"missing_token_ids": 2}
    again, silent = await bench.run(spec, replying(right_and_wrong))
    assert silent.requests == []
    assert again.summary.sample_count == 6


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        ({"groups": {"deadline_seconds": 0.2}}, "deadline 2"),
        (
            {
                "rollout": {
                    "name": "tests.tasks.playing:two_turns",
                    "trajectory_timeout_seconds": 0.2,
                }
            },
            "trajectory_timeout 2",
        ),
    ],
)
async def test_silence_until_the_time_is_up_is_not_recorded(
    bench: Bench, sampling: dict[str, Any], told: str
) -> None:
    async def silence(asked: Request) -> bytes:
        return await never()

    spec = bench.spec(1, **sampling)
    with pytest.raises(RolloutsFailedError, match=told):
        await bench.run(spec, silence)
    manifest, _ = await bench.run(spec, replying(right_and_wrong))
    assert manifest.summary.failed_samples == {}


async def test_groups_are_handed_back_while_others_are_sampled(bench: Bench) -> None:
    so_far: list[RolloutManifest] = []

    async def row_1_waits_for_a_file(asked: Request) -> bytes:
        if asked.prompt.endswith("1") and not so_far:
            while not rollout.manifest(is_complete=False).parts:
                await asyncio.sleep(0)
                await rollout.save()
            so_far.append(rollout.manifest(is_complete=False))
        return right_and_wrong(asked)

    spec = bench.spec(3, concurrency={"max_concurrency": 1})
    async with bench.rollout(spec, row_1_waits_for_a_file) as (rollout, _):
        await carry_all(rollout)
        manifest = rollout.manifest(is_complete=True)
    (first,) = so_far[0].parts
    assert (first.file, first.group_count) == ("part-00000-00.parquet", 1)
    assert {row["problem_id"] for row in await bench.rows(so_far[0])} == {"0"}
    files = ["part-00000-00.parquet", "part-00000-01.parquet"]
    assert [part.file for part in manifest.parts] == files
    assert (manifest.summary.group_count, manifest.summary.sample_count) == (3, 6)
    # A file that is there is named in the store's manifest, which says that more may come.
    published = await bench.published()
    assert [part.file for part in published.parts] == files
    assert not published.is_complete


async def test_the_same_row_gives_the_same_requests(bench: Bench, tmp_path: Path) -> None:
    spec = bench.spec(3)
    (tmp_path / "other").mkdir()
    twice = []
    for root in (bench, Bench(tmp_path / "other")):
        _, server = await root.run(spec, replying(right_and_wrong))
        asked = [(one.headers["x-request-id"], one.session, one.body) for one in server.requests]
        twice.append(sorted(asked, key=lambda one: one[0]))
    assert twice[0] == twice[1]


async def test_a_rollout_of_two_turns(bench: Bench) -> None:
    spec = bench.spec(rollout=playing("two_turns", arguments={"question": "sure?"}))
    manifest, server = await bench.run(spec, replying(right_and_wrong))
    rows = await bench.rows(manifest)
    assert [row["turn_count"] for row in rows if row["segment_number"] == 0] == [2] * 4
    assert len(server.requests) == manifest.summary.groups.attempts == 8
    sessions = Counter(asked.session for asked in server.requests)
    assert set(sessions.values()) == {2}
    assert len(sessions) == 4
    assert len({asked.headers["x-request-id"] for asked in server.requests}) == 8
    second = next(asked for asked in server.requests if len(asked.body["messages"]) == 3)
    assert (second.prompt, second.body["max_tokens"]) == ("sure?", 3)


async def test_segments_of_a_function_s_own(bench: Bench) -> None:
    manifest, _ = await bench.run(
        bench.spec(rollout=playing("own_segments")), replying(right_and_wrong)
    )
    rows = await bench.rows(manifest)
    assert [row["token_ids"] for row in rows] == [[0, 1]] * 4
    assert [row["loss_mask"] for row in rows] == [[True, True]] * 4


ENDS = {
    "fine": None,
    "none": "rollout_skipped",
    "raise": "rollout_raised",
    "exit": "rollout_raised",
    "cancel": "rollout_raised",
    "number": "rollout_raised",
    "uneven": "rollout_raised",
    "nan": "rollout_raised",
    "promptless": "rollout_raised",
    "negative": "rollout_raised",
    "half": None,
    "halves": None,
    "routes": "rollout_raised",
    "half a cause": "rollout_raised",
    "sentence": "rollout_raised",
    "own fault": "rollout_raised",
    "own service": "rollout_raised",
    "unpicklable": None,
    "not json": "rollout_raised",
    "unprintable": "rollout_raised",
    "unusual": "rollout_raised",
    "no segments": "rollout_raised",
    "key": "rollout_raised",
    "key told": "own",
}
KEY = "judge-0123456789-0123456789"


async def test_a_failing_function_never_takes_the_batch_with_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    problems = [{"prompt": "go", "answer": each} for each in ENDS]
    # In a process of its own, so that what it is given must be of a form that travels.
    reward = {"name": "regex", "arguments": {"pattern": "."}}
    spec = bench.spec(problems, rollout=playing("by_problem"), reward=reward)
    manifest, _ = await bench.run(spec, replying(lambda _: saying("ab")))
    rows = await bench.rows(manifest)
    found = {problems[int(row["problem_id"])]["answer"]: row["failure"] for row in rows}
    assert found == ENDS
    named = {problems[int(row["problem_id"])]["answer"]: row for row in rows}
    assert named["half"]["text"] == "half ?"
    assert named["halves"]["finish_reason"] == "?"
    assert json.loads(named["unpicklable"]["transcript"]) == [{"role": "user", "content": "hi"}]
    assert named["unprintable"]["detail"] == "UnprintableError"
    assert named["key told"]["detail"] == "********"
    assert not any(KEY[:6] in (row["detail"] or "") for row in rows)
    assert manifest.summary.failed_samples == {
        "rollout_raised": 36,
        "rollout_skipped": 2,
        "own": 2,
    }


async def test_a_trajectory_that_takes_too_long(bench: Bench) -> None:
    rollout = playing("by_problem", trajectory_timeout_seconds=0.2)
    spec = bench.spec([{"prompt": "go", "answer": "hang"}], rollout=rollout)
    manifest, _ = await bench.run(spec, replying(lambda _: saying("ab")))
    assert manifest.summary.failed_samples == {"trajectory_timeout": 2}


async def test_turns_that_take_too_long_are_an_outage(bench: Bench) -> None:
    async def silence(asked: Request) -> bytes:
        return await never()

    spec = bench.spec(1, rollout=playing("two_turns", turn_timeout_seconds=0.2))
    with pytest.raises(RolloutsFailedError, match="turn_timeout 2"):
        await bench.run(spec, silence)


@pytest.mark.parametrize(
    ("name", "arguments", "told"),
    [
        ("nowhere", {}, "cannot be imported"),
        ("not_async", {}, "expected `async def"),
        ("two_turns", {"other": 1}, "cannot be called"),
    ],
)
async def test_a_function_that_cannot_be_used(
    bench: Bench, name: str, arguments: dict[str, Any], told: str
) -> None:
    spec = bench.spec(rollout=playing(name, arguments=arguments))
    with pytest.raises(RolloutFunctionError, match=told):
        await bench.run(spec, replying(right_and_wrong))
