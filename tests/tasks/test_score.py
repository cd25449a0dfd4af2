"""Scoring: whatever a user's reward does costs one sample, marked, and never the batch."""

import asyncio
import fcntl
import os
import pickle
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hotload.errors import RewardError
from hotload.spec import RewardSpec
from hotload.trajectories import Problem, Provenance, Trajectory, TrajectoryGroup
from tasks.score import open_scorer

REWARDS = """
import fcntl, os, sys, time

def misbehave(problem, sample, scale=1):
    print("to standard output, which is not the reply channel")
    kind = sample.text
    if kind == "raise":
        raise RuntimeError("on purpose")
    if kind == "hang":
        time.sleep(600)
    if kind == "hang deaf":
        while True:
            pass
    if kind == "die":
        os._exit(3)
    if kind == "exit":
        sys.exit(3)
    if kind == "nan":
        return float("nan")
    if kind == "infinite":
        return float("inf")
    if kind == "words":
        return "1.0"
    if kind == "nothing":
        return None
    return scale * float(kind) + problem.extra.get("bonus", 0)

def slow_child(problem, sample):
    lock = os.open(problem.extra["lock"], os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.fork()  # the child holds the lock, too
    time.sleep(600)

async def coroutine(problem, sample):
    return 1.0
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable module of a user's, by name."""
    name = f"rewards_of_a_user_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def group(*texts: str, answer: object = None, **extra: object) -> TrajectoryGroup:
    origin = Provenance("i", "r", "s", 1, ("i",), "i")
    samples = (
        Trajectory("p", i, i, origin, 0.1, (1,), (2,), (-0.5,), (True,), text, "stop")
        for i, text in enumerate(texts)
    )
    return TrajectoryGroup(Problem("p", "x", answer=answer, extra=extra), tuple(samples))


async def test_a_built_in_scores_here() -> None:
    failed = replace(group("x").trajectories_G[0], failure="timeout", sample_number=3)
    good = group("a", "b", "a", answer="a")
    mixed = TrajectoryGroup(good.problem, (*good.trajectories_G, failed))
    async with open_scorer(RewardSpec()) as scorer:
        [scored, other] = await scorer.score([mixed, group("z", answer="a")])
    assert scored.rewards_G == (1, 0, 1, None)
    assert scored.advantages_G[3] is None
    assert scored.advantages_G[0] == pytest.approx(0.5773502, rel=1e-6)
    assert scored.trajectories_G[3].failure == "timeout"
    assert (other.rewards_G, other.advantages_G) == ((0,), (0,))


async def test_a_built_in_that_raises_is_marked() -> None:
    spec = RewardSpec(name="length", arguments={"target": 0})
    async with open_scorer(spec) as scorer:
        [scored] = await scorer.score([group("a", "b")])
    assert scored.rewards_G == (None, None)
    assert {each.failure for each in scored.trajectories_G} == {"reward_raised"}


async def test_whatever_a_reward_does_costs_one_sample(module: str) -> None:
    told = {
        "raise": "reward_raised",
        "exit": "reward_raised",
        "die": "reward_crashed",
        "hang": "reward_timeout",
        "hang deaf": "reward_timeout",
        "nan": "reward_not_a_number",
        "infinite": "reward_not_a_number",
        "words": "reward_not_a_number",
        "nothing": "reward_not_a_number",
    }
    spec = RewardSpec(name=f"{module}:misbehave", arguments={"scale": 2}, timeout_seconds=0.5)
    texts = ["1", *told, "2"]
    async with open_scorer(spec) as scorer:
        scored, other = await scorer.score([group(*texts, bonus=10), group("3")])
    assert scored.rewards_G == (12, *[None] * len(told), 14)
    assert [each.failure for each in scored.trajectories_G] == [None, *told.values(), None]
    assert scored.advantages_G[0] == pytest.approx(-scored.advantages_G[-1])  # type: ignore[operator]
    assert other.rewards_G == (6,)
    assert "on purpose" in scored.trajectories_G[1].detail


async def test_a_reward_that_hangs_takes_its_children_along(module: str, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    spec = RewardSpec(name=f"{module}:slow_child", timeout_seconds=0.3)
    async with open_scorer(spec) as scorer:
        [scored] = await scorer.score([group("1", lock=str(path))])
        assert scored.trajectories_G[0].failure == "reward_timeout"
        with path.open("r+") as lock:
            await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)  # free once both are gone


def test_a_worker_ends_with_its_parent(module: str) -> None:
    """Also in the middle of a reward that hangs, when nobody is left to stop it."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "tasks.reward_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
    )
    with worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        hanging = group("hang")
        calls = [(f"{module}:misbehave", {}), (hanging.problem, hanging.trajectories_G[0])]
        for call in calls:
            data = pickle.dumps(call)
            worker.stdin.write(struct.pack(">I", len(data)) + data)
        worker.stdin.flush()
        (size,) = struct.unpack(">I", worker.stdout.read(4))
        assert worker.stdout.read(size) == b'{"ready": true}'
        worker.stdin.close()
        assert worker.stdout.read() == b""
        assert worker.wait() == 0


async def test_a_failed_sample_is_not_scored(module: str) -> None:
    one = group("die")
    failed = replace(one.trajectories_G[0], failure="swap_timeout")
    async with open_scorer(RewardSpec(name=f"{module}:misbehave")) as scorer:
        [scored] = await scorer.score([TrajectoryGroup(one.problem, (failed,))])
    assert scored.trajectories_G == (failed,)


@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        ("nowhere", {}, "AttributeError"),
        ("coroutine", {}, "plain function"),
        ("misbehave", {"unknown": 1}, "unknown"),
    ],
)
async def test_a_reward_is_looked_at_before_it_is_used(
    module: str, function: str, arguments: dict[str, int], reason: str
) -> None:
    spec = RewardSpec(name=f"{module}:{function}", arguments=arguments)
    with pytest.raises(RewardError, match=reason):
        async with open_scorer(spec):
            pass


async def test_unknown_rewards_are_refused() -> None:
    for spec in (RewardSpec(name="nothing"), RewardSpec(name="nowhere_at_all:f")):
        with pytest.raises(RewardError):
            async with open_scorer(spec):
                pass
    with pytest.raises(RewardError, match="unknown"):
        async with open_scorer(RewardSpec(arguments={"unknown": 1})):
            pass
