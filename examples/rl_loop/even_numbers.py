"""Three letters that are an even number: learnt from random weights. `make learn`

Digits pay, and a number that is even pays more; the reward is a rollout example's.
"""

from examples.rl_loop.stage import Lesson, main

LESSON = Lesson(
    name="even_numbers",
    problems=[{"id": f"even-{n}", "prompt": f"An even number above {n}: "} for n in range(10, 74)],
    epochs=3,
    learning_rate=1e-3,
    groups_per_step=8,
    group_size=16,
    max_tokens=3,
    reward="examples.rollouts.single_turn:reward",
)

if __name__ == "__main__":
    main(LESSON)
