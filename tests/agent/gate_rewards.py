"""Rewards of the gates that are tested, imported where they run."""

from hotload.rollout.trajectory import Problem, Trajectory


def near(problem: Problem, trajectory: Trajectory) -> float:
    """Share of the tokens that are where the problem's answer has them."""
    answer, told = problem.answer[trajectory.sample_number], trajectory.segments[0].token_ids_T
    same = sum(a == b for a, b in zip(answer, told, strict=False))
    return same / max(1, len(answer), len(told))


def one(problem: Problem, trajectory: Trajectory) -> float:
    """1, whatever was said."""
    return 1.0


def raises(problem: Problem, trajectory: Trajectory) -> float:
    """Raise."""
    raise RuntimeError("no reward today")


def raises_where_far(problem: Problem, trajectory: Trajectory) -> float:
    """Raise where little is where the answer has it."""
    if near(problem, trajectory) < 0.5:
        raise RuntimeError("far off")
    return 1.0
