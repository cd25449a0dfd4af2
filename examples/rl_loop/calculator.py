"""A loop with a tool in the training loop: `make learn LESSON=calculator`

The rollout, its reward and its problems are those of examples/rollouts/calculator.py: a sum that
the calculator can read pays, as does a digit, and the right answer pays most. Its reward has not
been seen to rise yet: 20 steps with these settings left it at 0.34.
"""

from examples.rl_loop.stage import Lesson, main
from examples.rollouts.calculator import SHOW

LESSON = Lesson(
    name="calculator",
    problems=SHOW.problems,
    epochs=10,
    learning_rate=2e-3,
    groups_per_step=4,
    group_size=8,
    max_tokens=SHOW.max_tokens,
    reward=f"{SHOW.module}:reward",
    rollout=f"{SHOW.module}:rollout",
    words=SHOW.words,
)

if __name__ == "__main__":
    main(LESSON)
