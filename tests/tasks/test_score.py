"""Scoring: whatever a user's reward does costs one sample, marked, and never the batch."""

import asyncio
import fcntl
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hotload.concurrently import overlap
from hotload.errors import RewardError
from hotload.options import RewardSpec
from hotload.rollout.trajectory import Problem, TrajectoryGroup
from hotload.sampling.reward import processes
from hotload.sampling.reward.processes import keep_reward_processes
from hotload.sampling.reward.scorer import open_scorer
from tests.factories import trajectory

REWARDS = """
import asyncio, fcntl, os, signal, sys, time

def misbehave(problem, sample, scale=1):
    print("to standard output, which is not the reply channel")
    kind = sample.text
    if kind == "raise":
        raise RuntimeError("on purpose")
    if kind == "hang":
        time.sleep(600)
    if kind == "hang deaf":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
        while True:
            pass
    if kind == "die":
        os._exit(3)
    if kind == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
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

def chatty(problem, sample):
    print("x" * int(sample.text), end="")
    os.write(1, b"y" * int(sample.text))
    return 1.0

async def chatty_later(problem, sample):
    return chatty(problem, sample)

def announce(problem, sample):
    if sample.text == "hang":
        open(problem.extra["pipe"], "w").close()
        time.sleep(600)
    return 1.0

async def announce_later(problem, sample):
    if sample.text == "hang":
        open(problem.extra["pipe"], "w").close()
        await asyncio.sleep(600)
    return 1.0

def slow_child(problem, sample):
    lock = os.open(problem.extra["lock"], os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.fork()  # the child holds the lock, too
    time.sleep(600)

def parts(problem, sample):
    return {"length": len(sample.text), "format": sample.text.isdigit()}

def group(problem, samples, best=1):
    texts = [sample.text for sample in samples]
    if "raise" in texts:
        raise RuntimeError("on purpose")
    if "short" in texts:
        return [1]
    return [None if text == "nothing" else {"rank": sorted(texts).index(text)} for text in texts]

waiting = 0
everybody = asyncio.Event()

async def meet(problem, sample):
    global waiting
    waiting += 1
    if waiting == problem.answer:
        everybody.set()
    await everybody.wait()
    return 1.0

async def misbehave_later(problem, sample):
    kind = sample.text
    await asyncio.sleep(0)
    if kind == "hang":
        await asyncio.sleep(600)
    if kind == "hang deaf":
        time.sleep(600)
    if kind == "cancelled":
        raise asyncio.CancelledError
    if kind == "own timeout":
        raise TimeoutError
    return misbehave(problem, sample)

class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError

def speaks(problem, sample):
    if sample.text == "unprintable":
        raise Unprintable
    if sample.text == "long":
        raise ValueError("x" * 1_000_000)
    if sample.text == "surrogate":
        raise ValueError("\\ud800")
    return os.environ.get(sample.text, "none") != "none"

def own_process(problem, sample):
    return os.getpid()

def tells(problem, sample):
    raise ValueError("no such key: " + os.environ["REWARD_JUDGE_KEY"])

def tells_late(problem, sample):
    raise ValueError("x" * 170 + os.environ["reward_judge_key"])
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An importable module of a user's, by name."""
    name = f"rewards_of_a_user_{os.getpid()}"
    (tmp_path / f"{name}.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def group(*texts: str, answer: object = None, **extra: object) -> TrajectoryGroup:
    samples = (trajectory(number=i, text=text) for i, text in enumerate(texts))
    return TrajectoryGroup(Problem("p", "x", answer=answer, extra=extra), tuple(samples))


async def test_a_built_in_scores_here() -> None:
    failed = replace(group("x").trajectories_G[0], failure="timeout", sample_number=3)
    good = group("a", "b", "a", answer="a")
    mixed = TrajectoryGroup(good.problem, (*good.trajectories_G, failed))
    async with open_scorer(RewardSpec()) as scorer:
        scored = await scorer.score_group(mixed)
        other = await scorer.score_group(group("z", answer="a"))
    assert scored.rewards_G == (1, 0, 1, None)
    assert scored.advantages_G[3] is None
    assert scored.advantages_G[0] == pytest.approx(0.5773502, rel=1e-6)
    assert scored.trajectories_G[3].failure == "timeout"
    assert (other.rewards_G, other.advantages_G) == ((0,), (0,))


async def test_a_built_in_that_raises_is_marked() -> None:
    async with open_scorer(RewardSpec(name="numeric_answer")) as scorer:
        good = await scorer.score_group(group("12", answer="12"))
        pair = await scorer.score_group(group("12", answer="(1,2)"))
        none = await scorer.score_group(group("None"))
    assert (good.rewards_G, pair.rewards_G, none.rewards_G) == ((1,), (None,), (None,))
    assert [each.trajectories_G[0].failure for each in (pair, none)] == ["reward_raised"] * 2
    assert "one number, found '(1,2)'" in pair.trajectories_G[0].detail


@pytest.mark.slow
async def test_whatever_a_reward_does_costs_one_sample(module: str) -> None:
    told = {
        "raise": "reward_raised",
        "exit": "reward_raised",
        "die": "reward_crashed",
        "segfault": "reward_crashed",
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
        scored, other = await overlap(
            scorer.score_group(each) for each in (group(*texts, bonus=10), group("3"))
        )
    assert scored.rewards_G == (12, *[None] * len(told), 14)
    assert [each.failure for each in scored.trajectories_G] == [None, *told.values(), None]
    assert scored.advantages_G[0] == pytest.approx(-scored.advantages_G[-1])  # type: ignore[operator]
    assert other.rewards_G == (6,)
    assert "on purpose" in scored.trajectories_G[1].detail


def is_ended(process: int) -> bool:
    """Whether a child has ended, and somebody knows."""
    try:
        os.waitpid(process, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


async def test_processes_are_kept_for_the_next_scorer(module: str) -> None:
    reward = RewardSpec(name=f"{module}:own_process")

    async def own_process() -> int:
        async with open_scorer(reward) as scorer:
            (number,) = (await scorer.score_group(group("any"))).rewards_G
        return int(number or 0)

    assert await own_process() != await own_process()
    async with keep_reward_processes():
        kept = await own_process()
        async with keep_reward_processes(), open_scorer(reward):
            other = await own_process()  # the kept one is in use
        assert {await own_process(), await own_process()} <= {kept, other}
    assert is_ended(kept)
    assert is_ended(other)


async def test_a_reward_that_hangs_takes_its_children_along(module: str, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    spec = RewardSpec(name=f"{module}:slow_child", timeout_seconds=0.3)
    async with open_scorer(spec) as scorer:
        scored = await scorer.score_group(group("1", lock=str(path)))
        assert scored.trajectories_G[0].failure == "reward_timeout"
        with path.open("r+") as lock:
            await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)  # free once both are gone


@pytest.mark.parametrize("function", ["announce", "announce_later"])
async def test_a_group_that_is_given_up_holds_up_no_other(
    module: str, function: str, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    spec = RewardSpec(name=f"{module}:{function}", timeout_seconds=600)
    async with open_scorer(spec) as scorer:
        hanging = asyncio.create_task(scorer.score_group(group("hang", pipe=str(pipe))))
        await asyncio.to_thread(pipe.read_bytes)  # ends once the reward was called
        hanging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await hanging
        scored = await scorer.score_group(group(*"abcdef"))
    assert scored.rewards_G == (1,) * 6


def test_a_worker_ends_with_its_parent(module: str) -> None:
    """Also in the middle of a reward that hangs, when nobody is left to stop it."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "hotload.sampling.reward.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
    )
    with worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        hanging = group("hang")
        setup = {
            "name": f"{module}:misbehave",
            "arguments": {},
            "per_group": False,
            "timeout_seconds": 600,
        }
        for call in [(0, setup), (1, (hanging.problem, hanging.trajectories_G))]:
            worker.stdin.write(pickle.dumps(call))
        worker.stdin.flush()
        assert worker.stdout.readline() == b'{"call": 0, "is_async": false}\n'
        worker.stdin.close()
        assert worker.stdout.read() == b""
        assert worker.wait() == 0


def test_a_worker_that_reads_nonsense_ends() -> None:
    worker = subprocess.Popen(
        [sys.executable, "-m", "hotload.sampling.reward.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or "." for path in sys.path)},
    )
    with worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(b"none")
        worker.stdin.flush()
        assert worker.stdout.read() == b""


async def test_a_failed_sample_is_not_scored(module: str) -> None:
    one = group("die")
    failed = replace(one.trajectories_G[0], failure="swap_timeout")
    async with open_scorer(RewardSpec(name=f"{module}:misbehave")) as scorer:
        scored = await scorer.score_group(TrajectoryGroup(one.problem, (failed,)))
    assert scored.trajectories_G == (failed,)


@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        ("nowhere", {}, "AttributeError"),
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


async def test_named_parts_are_told_beside_the_reward(module: str) -> None:
    async with open_scorer(RewardSpec(name=f"{module}:parts")) as scorer:
        scored = await scorer.score_group(group("12", "abc"))
    assert scored.rewards_G == (3, 3)
    assert scored.reward_parts_G == ({"length": 2, "format": 1}, {"length": 3, "format": 0})
    async with open_scorer(RewardSpec()) as scorer:
        assert (await scorer.score_group(group("a", answer="a"))).reward_parts_G == ()


@pytest.mark.slow
async def test_the_spec_chooses_the_advantage(module: str) -> None:
    for method, expected in {"leave_one_out": (2, -2), "mean_only": (1, -1)}.items():
        spec = RewardSpec(name=f"{module}:misbehave", advantage=method)
        async with open_scorer(spec) as scorer:
            assert (await scorer.score_group(group("3", "1"))).advantages_G == expected


@pytest.mark.parametrize(
    ("texts", "rewards", "failures"),
    [
        (("b", "a", "c"), (1, 0, 2), (None, None, None)),
        (("b", "nothing"), (0, None), (None, "reward_not_a_number")),
        (("a", "raise"), (None, None), ("reward_raised", "reward_raised")),
        (("a", "short"), (None, None), ("reward_not_a_number", "reward_not_a_number")),
    ],
)
async def test_a_reward_per_group(
    module: str,
    texts: tuple[str, ...],
    rewards: tuple[float | None, ...],
    failures: tuple[str | None, ...],
) -> None:
    asked = group(*texts)
    failed = replace(asked.trajectories_G[0], failure="timeout", text="0")
    mixed = TrajectoryGroup(asked.problem, (failed, *asked.trajectories_G))
    spec = RewardSpec(name=f"{module}:group", per_group=True, arguments={"best": 1})
    async with open_scorer(spec) as scorer:
        scored = await scorer.score_group(mixed)
    assert scored.rewards_G == (None, *rewards)
    assert [each.failure for each in scored.trajectories_G] == ["timeout", *failures]


async def test_calls_of_an_async_reward_are_under_way_together(module: str) -> None:
    """Each waits for all the others: one after the other they would never end."""
    count = 30
    spec = RewardSpec(name=f"{module}:meet", timeout_seconds=15)
    async with open_scorer(spec) as scorer:
        scored = await scorer.score_group(group(*"x" * count, answer=count))
    assert scored.rewards_G == (1,) * count


@pytest.mark.slow
async def test_whatever_an_async_reward_does_costs_one_sample(module: str) -> None:
    told = {
        "raise": "reward_raised",
        "exit": "reward_raised",
        "cancelled": "reward_raised",
        "own timeout": "reward_raised",
        "die": "reward_crashed",
        "hang": "reward_timeout",
        "hang deaf": "reward_timeout",
        "nan": "reward_not_a_number",
    }
    texts = ["1", *told, *(str(n) for n in range(2, 12))]
    spec = RewardSpec(name=f"{module}:misbehave_later", timeout_seconds=0.5)
    async with open_scorer(spec) as scorer:
        scored = await scorer.score_group(group(*texts))
    assert scored.rewards_G == (1, *[None] * len(told), *range(2, 12))
    failures = [each.failure for each in scored.trajectories_G]
    assert failures == [None, *told.values(), *[None] * 10]
    details = {each.text: each.detail for each in scored.trajectories_G}
    assert details["die"] == "its process ended with exit code 3"
    assert details["hang"] == "no reward within 0.5 s"


@pytest.mark.slow
async def test_a_pattern_without_end_costs_one_sample() -> None:
    """The regular expression lets no other thread run; the process is ended all the same."""
    spec = RewardSpec(name="regex", arguments={"pattern": "^(a+)+$"}, timeout_seconds=0.5)
    async with open_scorer(spec) as scorer:
        scored = await scorer.score_group(group("aaa", "a" * 100 + "b", "b"))
    assert scored.rewards_G == (1, None, 0)
    assert scored.trajectories_G[1].failure == "reward_timeout"


@pytest.mark.slow
async def test_mathematics_without_end_costs_one_sample() -> None:
    pytest.importorskip("math_verify")  # the extra `math`
    spec = RewardSpec(name="math_verify", timeout_seconds=5)
    texts = [r"\boxed{\frac24}", r"\boxed{9^{9^{9^9}}}", r"\boxed{\frac32}"]
    async with open_scorer(spec) as scorer:
        scored = await scorer.score_group(group(*texts, answer="1/2"))
    assert scored.rewards_G == (1, None, 0)
    assert scored.trajectories_G[1].failure == "reward_timeout"


async def test_each_problem_may_have_a_schema_of_its_own() -> None:
    async with open_scorer(RewardSpec(name="json_schema")) as scorer:
        numbers = group("1", '"a"', answer={"type": "integer"})
        broken = group("1", answer={"type": "nothing"})
        scored, other = await scorer.score_group(numbers), await scorer.score_group(broken)
    assert scored.rewards_G == (1, 0)
    assert other.trajectories_G[0].failure == "reward_raised"
    assert "the schema is none" in other.trajectories_G[0].detail


async def test_a_weighted_sum_of_what_runs_here_and_elsewhere(module: str) -> None:
    parts = [
        {"name": "exact_match", "weight": 2},
        {"name": f"{module}:parts", "weight": 0.5, "label": "form"},
        {"name": f"{module}:group", "per_group": True},
    ]
    spec = RewardSpec(name="weighted_sum", arguments={"parts": parts})
    async with open_scorer(spec) as scorer:
        scored = await scorer.score_group(group("b1", "a", answer="a"))
        failed = await scorer.score_group(group("1", "nothing", answer="a"))
    assert scored.rewards_G == (0 + 1 + 1, 2 + 0.5 + 0)
    assert scored.reward_parts_G[1] == {
        "exact_match": 1,
        "form": 1,
        "form/length": 1,
        "form/format": 0,
        "group": 0,
        "group/rank": 0,
    }
    assert failed.rewards_G == (1, None)
    assert failed.trajectories_G[1].failure == "reward_not_a_number"
    assert failed.trajectories_G[1].detail.startswith("group: ")


async def test_what_a_reward_says_is_bounded_and_readable(module: str) -> None:
    async with open_scorer(RewardSpec(name=f"{module}:speaks")) as scorer:
        scored = await scorer.score_group(group("unprintable", "long", "surrogate"))
    details = [each.detail for each in scored.trajectories_G]
    assert details[0] == "Unprintable"
    assert len(details[1]) == 200
    assert details[2] == "ValueError: ?"


async def test_a_reward_reads_no_key_it_did_not_ask_for(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = ["AWS_PROFILE", "REWARD_JUDGE_KEY", "OPENAI_API_KEY", "PLAIN"]
    withheld = [
        "FIREWORKS_API_KEY",
        "COREWEAVE_API_TOKEN",
        "HOTLOAD_DOOR_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "AZURE_CLIENT_SECRET",
        "PREFECT_API_KEY",
    ]
    for name in (*theirs, *withheld):
        monkeypatch.setenv(name, "a value of some length")
    spec = RewardSpec(name=f"{module}:speaks", environment=("AWS_PROFILE",))
    async with open_scorer(spec) as scorer:
        scored = await scorer.score_group(group(*theirs, *withheld))
    assert scored.rewards_G == (1,) * len(theirs) + (0,) * len(withheld)
    async with open_scorer(RewardSpec(name=f"{module}:tells")) as scorer:
        scored = await scorer.score_group(group("x"))
    assert scored.trajectories_G[0].detail == "ValueError: no such key: ********"


async def test_no_part_of_a_key_is_told(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("reward_judge_key", "judge-0123456789-0123456789")
    async with open_scorer(RewardSpec(name=f"{module}:tells_late")) as scorer:
        scored = await scorer.score_group(group("x"))
    assert scored.trajectories_G[0].detail.endswith("x********")


@pytest.mark.parametrize(
    "name", ["FIREWORKS_API_KEY", "COREWEAVE_API_TOKEN", "AWS_NOT_SET_ANYWHERE"]
)
async def test_a_variable_that_cannot_be_had_is_refused(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FIREWORKS_API_KEY", "secret")
    monkeypatch.setenv("COREWEAVE_API_TOKEN", "secret")
    spec = RewardSpec(name=f"{module}:speaks", environment=(name,))
    with pytest.raises(RewardError, match=name):
        async with open_scorer(spec):
            pass


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (RewardSpec(name="exact_match", per_group=True), "per_group"),
        (RewardSpec(name="regex"), "pattern"),
        (RewardSpec(name="regex", arguments={"pattern": "("}), "cannot use its arguments"),
        (RewardSpec(name="length", arguments={"target": 0}), "target: found 0"),
        (RewardSpec(name="remote"), "url"),
        (
            RewardSpec(
                name="weighted_sum",
                arguments={"parts": [{"name": "length"}, {"name": "nowhere_at_all:f"}]},
            ),
            "ModuleNotFoundError",
        ),
    ],
)
async def test_what_cannot_work_is_refused_before_anything_is_sampled(
    spec: RewardSpec, reason: str
) -> None:
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


@pytest.mark.parametrize("function", ["chatty", "chatty_later"])
async def test_what_a_reward_prints_is_bounded_by_sample_and_by_run(
    function: str,
    module: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with open_scorer(RewardSpec(name=f"{module}:{function}")) as scorer:
        for _ in range(3):  # one after the other
            scored = await scorer.score_group(group("500000"))
            assert scored.rewards_G == (1.0,)
    first = capfd.readouterr().err
    assert 0 < len(first) <= 4 * processes.PRINT_LIMIT_BYTES_PER_CALL  # and while it was imported
    assert f"{3_000_000 - len(first)} bytes that it printed are left out" in caplog.text
    monkeypatch.setattr(processes, "PRINT_LIMIT_BYTES", 100)
    async with open_scorer(RewardSpec(name=f"{module}:{function}")) as scorer:
        await scorer.score_group(group("70", "70", "70"))
    assert len(capfd.readouterr().err) == 100
    assert "320 bytes that it printed are left out" in caplog.text


async def test_a_little_that_a_reward_prints_is_passed_on(
    module: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    async with open_scorer(RewardSpec(name=f"{module}:chatty")) as scorer:
        await scorer.score_group(group("3"))
    assert sorted(capfd.readouterr().err) == [*"xxxyyy"]
    assert "left out" not in caplog.text
