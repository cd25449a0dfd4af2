"""A game of several turns: guess a hidden digit, told higher or lower. `python -m
examples.rollouts.guessing_game`

It speaks in token ids: every prompt is all that was said so far and the answer to the last guess,
so that a whole game is one sequence to train on.
"""

from dataclasses import replace
from functools import cache

from tokenizers import Tokenizer

from examples.rollouts.stage import Show, main
from examples.tiny_trainer import make_tokenizer
from hotload.clients.inference.conversation import Conversation
from hotload.rollout.trajectory import Problem, Trajectory

GUESSES = 5


async def rollout(problem: Problem, sampler: Conversation) -> Trajectory:
    """At most five guesses; what the game says is masked out of the loss."""
    hidden = int(problem.answer)
    said = f"{problem.prompt}\nguess: "
    ids: list[int] = _tokenizer().encode(said).ids
    told = [{"role": "game", "content": said}]
    for _ in range(GUESSES):
        turn = await sampler.sample(ids)
        told.append(turn.message)
        answer = judge(turn.text, hidden)
        if answer == "right":
            break
        ids = [*turn.prompt_token_ids, *turn.token_ids, *_tokenizer().encode(f"\n{answer}: ").ids]
        told.append({"role": "game", "content": answer})
    return replace(sampler.trajectory(), transcript=tuple(told))


def judge(guess: str, hidden: int) -> str:
    """What the game says to a guess."""
    digits = [int(character) for character in guess if character in "0123456789"]
    if not digits:
        return "a digit, please"
    return "right" if digits[0] == hidden else "higher" if digits[0] < hidden else "lower"


def reward(problem: Problem, trajectory: Trajectory) -> dict[str, float]:
    """1 for a first guess that is right, 0.8 for a second, …; every guess that is a digit pays a
    little.
    """
    guesses = [m["content"] for m in trajectory.transcript if m["role"] == "assistant"]
    answers = [judge(guess, int(problem.answer)) for guess in guesses]
    is_found = "right" in answers
    return {
        "found": (1.0 - 0.2 * answers.index("right")) if is_found else 0.0,
        "digits": 0.2 * sum(answer != "a digit, please" for answer in answers) / len(answers),
    }


@cache
def _tokenizer() -> Tokenizer:
    return make_tokenizer()


SHOW = Show(
    name="guessing-game",
    module="examples.rollouts.guessing_game",
    problems=[
        {"id": f"hidden-{n}", "prompt": "I think of a digit.", "answer": str(n % 10)}
        for n in range(12)
    ],
    max_tokens=2,
    words={"0123456789": 0.8},
)

if __name__ == "__main__":
    main(SHOW)
