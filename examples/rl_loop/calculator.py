"""A loop with a tool in the training loop: `make learn LESSON=calculator`

The rollout, its reward and its problems are those of examples/rollouts/calculator.py: a sum that
the calculator can read pays, as does a digit, and the right answer pays most. The policy learns to
use the tool, and seldom to say what came back: the mean reward goes from 0.35 to 0.77. A sample
that calls has more tokens, and its advantage weighs by them: with twice the learning rate, or half
the samples, the first steps lose more than the later ones win. Eight minutes beside other work.
"""

from examples.rl_loop.stage import Lesson, main
from examples.rollouts.calculator import SHOW

LESSON = Lesson(
    name="calculator",
    problems=SHOW.problems,
    epochs=30,
    learning_rate=1e-3,
    groups_per_step=12,
    group_size=16,
    max_tokens=SHOW.max_tokens,
    reward=f"{SHOW.module}:reward",
    rollout=f"{SHOW.module}:rollout",
    words=SHOW.words,
)

if __name__ == "__main__":
    main(LESSON)
