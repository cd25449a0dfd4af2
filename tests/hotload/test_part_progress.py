"""What of a part is settled, over any order of groups, writes, losses and restarts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hotload.dataset.part_progress import PartProgress
from hotload.dataset.rollout_plan import PartPlan
from hotload.rollout.trajectory import Problem

PROBLEMS = tuple(Problem(f"p{number}", "x") for number in range(5))
RESERVE = tuple(Problem(f"r{number}", "x") for number in range(4))
PART = PartPlan(0, PROBLEMS, "0" * 64, RESERVE)
RESERVE_IDS = [problem.id for problem in RESERVE]

Steps = list[tuple[str, int]]
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["keep", "keep", "drop", "drop", "leave out", "write", "restart"]),
        st.integers(0, 9),
    ),
    max_size=40,
)


class Run:
    """A run of the cycle: its progress, and the groups that are in no file yet."""

    def __init__(self, files: list[dict[str, bool]], order: int = 0) -> None:
        self.progress = PartProgress(PART)
        self.found: dict[str, bool] = {}
        self.unwritten: dict[str, bool] = {}
        turned = order % (len(files) or 1)
        for file in (*files[turned:], *files[:turned]):
            dropped = {name for name, is_dropped in file.items() if is_dropped}
            if self.progress.find(file.keys() - dropped, dropped):
                assert not file.keys() & self.found.keys()
                self.found |= file

    def settle(self, number: int, *, is_dropped: bool) -> None:
        """Sample one of the problems that are to be done."""
        if to_do := self.progress.to_do():
            problem = to_do[number % len(to_do)]
            assert problem.id not in self.found | self.unwritten
            assert self.progress.is_refill(problem) is (problem in RESERVE)
            instead = self.progress.settle(problem, is_dropped=is_dropped)
            assert instead is None or instead not in to_do
            assert self.progress.to_do() == [
                each for each in (*to_do, instead) if each not in (None, problem)
            ]
            self.unwritten[problem.id] = is_dropped

    def leave_out(self, number: int) -> None:
        if to_do := self.progress.to_do():
            self.progress.leave_out(to_do[number % len(to_do)])
            assert len(self.progress.to_do()) == len(to_do) - 1

    def finish(self) -> dict[str, bool]:
        """Settle what is left; all that counts in the end."""
        while self.progress.to_do():
            self.settle(0, is_dropped=False)
        return self.found | self.unwritten


def follow(steps: Steps, runs: list[Run], files: list[dict[str, bool]]) -> None:
    """Each step is one run's."""
    for step, number in steps:
        run = runs[number % len(runs)]
        match step:
            case "keep" | "drop":
                run.settle(number, is_dropped=step == "drop")
            case "leave out":
                run.leave_out(number)
            case "write" if run.unwritten:
                files.append(run.unwritten)
                run.found, run.unwritten = run.found | run.unwritten, {}
            case "restart":
                runs[number % len(runs)] = Run(files, number)


@given(STEPS)
def test_every_problem_is_settled_once_and_one_more_for_each_that_was_dropped(
    steps: Steps,
) -> None:
    files: list[dict[str, bool]] = []
    runs = [Run(files)]
    follow(steps, runs, files)
    # All it wrote counts, in whatever order it is found.
    in_the_end = Run(files, len(steps)).finish()
    assert all(in_the_end[name] is dropped for file in files for name, dropped in file.items())
    assert in_the_end.keys() >= {problem.id for problem in PROBLEMS}
    refills = sorted(in_the_end.keys() & set(RESERVE_IDS))
    assert refills == RESERVE_IDS[: sum(in_the_end.values())]


@given(STEPS)
def test_two_runs_at_once_settle_no_problem_twice(steps: Steps) -> None:
    files: list[dict[str, bool]] = []
    runs = [Run(files), Run(files)]
    follow(steps, runs, files)
    in_the_end = Run(files, len(steps)).finish()
    assert in_the_end.keys() >= {problem.id for problem in PROBLEMS}


def test_a_row_of_the_reserve_is_sampled_once() -> None:
    """It was found, and the file that told which problem it stood in for was lost."""
    progress = PartProgress(PART)
    assert progress.find({RESERVE[0].id}, set())
    assert progress.settle(PROBLEMS[0], is_dropped=True) is None
    assert progress.settle(PROBLEMS[1], is_dropped=True) == RESERVE[1]
    assert progress.to_do() == [*PROBLEMS[2:], RESERVE[1]]
