"""The shipped rollout functions on a fleet with real weights: what they return is fit to train."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from examples.rollouts import calculator, guessing_game, single_turn
from examples.rollouts.speaker import Speaker
from examples.rollouts.stage import Show
from examples.tiny_trainer import make_tokenizer
from hotload.clients.access import Access
from hotload.clients.inference.client import InferenceClient
from hotload.clients.inference.conversation import Conversation
from hotload.options import Sampling
from hotload.rollout.trajectory import Problem, Trajectory
from tests.flows.fleet import API_KEY, NAMES, running_fleet

pytestmark = pytest.mark.server
GAMES = [single_turn, calculator, guessing_game]
SAMPLES = 6


@asynccontextmanager
async def fleet_of(root: Path, show: Show) -> AsyncIterator[str]:
    Speaker(dict(show.words)).save(root / "policy")
    with running_fleet("unsaved", root, [root / "policy"]) as fleet:
        yield fleet.url


async def play(
    url: str, show: Show, rollout: Callable[[Problem, Conversation], Awaitable[Trajectory]]
) -> list[tuple[Problem, Trajectory]]:
    row = dict(show.problems[3])
    problem = Problem(row["id"], row["prompt"], answer=row["answer"])
    client = InferenceClient(Access(base_url=url, api_key=API_KEY, **NAMES))
    sampling = Sampling(max_completion_tokens=show.max_tokens)
    async with client.session(sampling, identity="none", policy_version=1) as sampler:
        played = [rollout(problem, sampler.converse(problem, n)) for n in range(SAMPLES)]
        return [(problem, each) for each in await asyncio.gather(*played)]


@pytest.mark.parametrize("game", GAMES, ids=lambda game: game.SHOW.name)
async def test_a_shipped_rollout_can_be_trained_on(game: object, tmp_path: Path) -> None:
    show: Show = game.SHOW  # type: ignore[attr-defined]
    async with fleet_of(tmp_path, show) as url:
        played = await play(url, show, game.rollout)  # type: ignore[attr-defined]
    for problem, trajectory in played:
        assert trajectory.failure is None
        assert 1 <= trajectory.turn_count <= guessing_game.GUESSES
        for segment in trajectory.segments:
            assert len(segment.token_ids_T) == len(segment.loss_mask_T) > 0
            own = [
                logprob < 0
                for logprob, is_own in zip(
                    segment.sampling_logprobs_T, segment.loss_mask_T, strict=True
                )
                if is_own
            ]
            assert all(own)
        parts = game.reward(problem, trajectory)  # type: ignore[attr-defined]
        assert 0 <= sum(parts.values()) <= 1.7
    assert len({trajectory.segments[0].token_ids_T for _, trajectory in played}) > 1


async def test_a_whole_game_is_one_sequence(tmp_path: Path) -> None:
    show = guessing_game.SHOW
    async with fleet_of(tmp_path, show) as url:
        played = await play(url, show, guessing_game.rollout)
    longest = max((each for _, each in played), key=lambda each: each.turn_count)
    assert longest.turn_count > 1
    (segment,) = longest.segments
    said = make_tokenizer().decode(list(segment.token_ids_T))
    for answer in (m["content"] for m in longest.transcript[2:] if m["role"] == "game"):
        assert answer in said
    assert not all(segment.loss_mask_T)
    own = sum(segment.loss_mask_T)
    assert own <= longest.turn_count * show.max_tokens


@pytest.mark.parametrize(
    ("text", "value"),
    [("3+4", 7), ("so 12 * 3 = ", 36), ("5-9-1", -4), ("+4", None), ("", None), ("7 8", None)],
)
def test_the_calculator(text: str, value: int | None) -> None:
    assert calculator.calculate(text) == value


@pytest.mark.parametrize(
    ("guess", "answer"),
    [("5", "right"), ("x7", "lower"), ("2 or 5", "higher"), ("none", "a digit, please")],
)
def test_the_game_s_answers(guess: str, answer: str) -> None:
    assert guessing_game.judge(guess, 5) == answer


def test_a_token_that_pays_is_said_more_often(tmp_path: Path) -> None:
    speaker = Speaker({})
    rows = pl.DataFrame(
        {
            "token_ids": [[20, 21], [20, 22], [23, 24]],
            "loss_mask": [[True, True], [True, False], [True, True]],
            "advantage": [1.0, 1.0, -2.0],
        }
    )
    before = speaker.biases.copy()
    assert speaker.learn(rows) == 5
    moved = speaker.biases - before
    assert moved[20] > moved[21] > 0 > moved[23] == moved[24]
    assert np.count_nonzero(moved) == 4
    assert speaker.learn(rows.filter(pl.lit(False))) == 0
