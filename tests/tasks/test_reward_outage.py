"""A reward's service that fails is not the samples' fault: they are left for a later run."""

import json
from collections import Counter

import pytest

from hotload.errors import RewardError, RolloutsFailedError
from tests.scripted_server import Request, ScriptedServer, http
from tests.tasks.bench import Bench, replying, right_and_wrong

ONE_AFTER_THE_OTHER = {"mode": "fixed", "initial_window": 1}


class Judge(ScriptedServer):
    """A reward service that answers with `status` from call `fails_from` to call `fails_to`."""

    def __init__(self, status: int, fails_from: int = 0, fails_to: int = 10**6) -> None:
        super().__init__(self._score)
        self.status, self.fails_from, self.fails_to = status, fails_from, fails_to

    async def _score(self, asked: Request) -> bytes:
        if self.fails_from <= asked.number < self.fails_to:
            return http(b"", self.status)
        rewards = [float(each["text"] == "ab") for each in asked.body["trajectories"]]
        return http(json.dumps({"rewards": rewards}).encode(), content_type="application/json")

    def mend(self) -> None:
        """From now on it gives rewards."""
        self.fails_to = 0


def reward(judge: Judge) -> dict[str, object]:
    """One call a group; what fails is not tried again within so short a time."""
    url = f"http://127.0.0.1:{judge.port}/score"
    arguments = {"url": url, "key_variable": "REWARD_JUDGE_KEY"}
    return {"name": "remote", "per_group": True, "timeout_seconds": 1.0, "arguments": arguments}


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_JUDGE_KEY", "key-of-the-judge")


async def test_a_refused_key_stops_the_cycle_and_marks_nothing(bench: Bench) -> None:
    async with Judge(401, fails_from=2).running() as judge:
        spec = bench.spec(6, reward=reward(judge), concurrency=ONE_AFTER_THE_OTHER)
        with pytest.raises(RewardError, match="mend the key in REWARD_JUDGE_KEY"):
            await bench.run(spec, replying(right_and_wrong))
        stored = sum(part.group_count for part in (await bench.published()).parts)
        assert stored == 2
        judge.mend()
        manifest, server = await bench.run(spec, replying(right_and_wrong))
    assert len(server.requests) == 2 * (6 - stored)
    assert (manifest.summary.group_count, manifest.summary.failed_samples) == (6, {})


async def test_a_rollout_without_any_reward_is_not_recorded(bench: Bench) -> None:
    async with Judge(503).running() as judge:
        spec = bench.spec(4, reward=reward(judge), concurrency=ONE_AFTER_THE_OTHER)
        with pytest.raises(RolloutsFailedError, match=r"missing: reward_unavailable 8 \(HTTP 5"):
            await bench.run(spec, replying(right_and_wrong))
        judge.mend()
        manifest, server = await bench.run(spec, replying(right_and_wrong))
    assert len(server.requests) == 8
    assert (manifest.summary.group_count, manifest.summary.failed_samples) == (4, {})


async def test_an_outage_that_begins_later_leaves_the_rest(bench: Bench) -> None:
    async with Judge(503, fails_from=3).running() as judge:
        spec = bench.spec(20, reward=reward(judge), concurrency=ONE_AFTER_THE_OTHER)
        with pytest.raises(RolloutsFailedError, match=r"reward_unavailable .*breaker_open"):
            await bench.run(spec, replying(right_and_wrong))
        assert sum(part.group_count for part in (await bench.published()).parts) == 3
        judge.mend()
        manifest, server = await bench.run(spec, replying(right_and_wrong))
    rows = await bench.rows(manifest)
    assert Counter(row["problem_id"] for row in rows) == {str(n): 2 for n in range(20)}
    assert (len(server.requests), manifest.summary.failed_samples) == (34, {})


async def test_one_group_that_the_service_missed_is_marked(bench: Bench) -> None:
    async with Judge(503, fails_from=1, fails_to=2).running() as judge:
        spec = bench.spec(4, reward=reward(judge), concurrency=ONE_AFTER_THE_OTHER)
        manifest, _ = await bench.run(spec, replying(right_and_wrong))
    assert manifest.summary.failed_samples == {"reward_unavailable": 2}
    assert manifest.summary.groups.groups_by_mark == {"incomplete": 1}
