"""A loop with a tool: the model writes a sum, the calculator answers, the model says the result.
`python -m examples.rollouts.calculator`

The tool is the user's code, here ten lines; what it says goes back as a message and is never
trained on.
"""

import re
from typing import Any

from examples.rollouts.stage import Show, main
from hotload.clients.inference.conversation import Conversation
from hotload.rollout.trajectory import Problem, Trajectory

SUM = re.compile(r"(\d{1,6})\s*([+*-])\s*(\d{1,6})")


async def rollout(problem: Problem, sampler: Conversation, turns: int = 3) -> Trajectory:
    """At most `turns` calls of the calculator; the first turn without one is the answer."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": str(problem.prompt)}]
    for _ in range(turns):
        turn = await sampler.sample(messages)
        result = calculate(turn.text)
        if result is None:
            break
        messages += [turn.message, {"role": "tool", "content": f"= {result}"}]
    return sampler.trajectory()


def calculate(text: str) -> int | None:
    """The value of the first sum in `text`; `None` without one."""
    found = SUM.search(text)
    if found is None:
        return None
    left, right = int(found[1]), int(found[3])
    return {"+": left + right, "-": left - right, "*": left * right}[found[2]]


def reward(problem: Problem, trajectory: Trajectory) -> dict[str, float]:
    """A used tool pays, a short answer pays, the right one pays most."""
    calls = sum(message["role"] == "tool" for message in trajectory.transcript)
    said = re.findall(r"\d+", trajectory.text)
    return {
        "used_tool": 0.5 * min(calls, 2) / 2,
        "digits": 0.2 * bool(said),
        "right": float(bool(said) and said[-1] == str(problem.answer)),
    }


SHOW = Show(
    name="calculator",
    module="examples.rollouts.calculator",
    problems=[
        {"id": f"sum-{n}", "prompt": f"What is {n} + {n + 3}?", "answer": str(2 * n + 3)}
        for n in range(12)
    ],
    max_tokens=5,
    words={"0123456789": 1.0, "+*-": 1.1},
)

if __name__ == "__main__":
    main(SHOW)
