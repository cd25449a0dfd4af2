"""Rewards of a user's own, named in a cycle as `examples.rewards:letters`."""

from hotload.rollout.trajectory import Problem, Trajectory


def letters(problem: Problem, trajectory: Trajectory) -> float:
    """Share of the answer's characters that are letters, 0 to 1: a reward any model can move."""
    text = trajectory.text
    return sum(character.isalpha() for character in text) / len(text) if text else 0.0
