"""One question, one answer: the least a rollout function does. `python -m
examples.rollouts.single_turn`

Without a rollout function every problem is sampled once just the same; this is where to begin one.
"""

from examples.rollouts.stage import Show, main
from hotload.clients.inference.conversation import Conversation
from hotload.rollout.trajectory import Problem, Trajectory


async def rollout(problem: Problem, sampler: Conversation) -> Trajectory:
    """The answer to the problem's prompt."""
    await sampler.sample(str(problem.prompt))
    return sampler.trajectory()


def reward(problem: Problem, trajectory: Trajectory) -> dict[str, float]:
    """Digits pay, and a number that is even pays more."""
    text = trajectory.text.strip()
    digits = sum(character.isdigit() for character in text) / max(1, len(text))
    is_even = text.isdigit() and int(text) % 2 == 0
    return {"digits": 0.5 * digits, "even": 0.5 * is_even}


SHOW = Show(
    name="single-turn",
    module="examples.rollouts.single_turn",
    problems=[
        {"id": f"even-{n}", "prompt": f"An even number above {n}: ", "answer": ""}
        for n in range(10, 34, 2)
    ],
    max_tokens=3,
    words={"0123456789": 0.7},
)

if __name__ == "__main__":
    main(SHOW)
