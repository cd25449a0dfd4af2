"""The weighted sum: what may be declared, and how it adds up."""

from typing import Any

import pytest

from hotload.errors import RewardError
from hotload.options import RewardSpec
from hotload.reward.outcome import Score, Unscored
from hotload.reward.weighted_sum import sum_weighted, weighted_parts
from hotload.rollout.failures import Cause


def declared(*parts: Any, **fields: Any) -> RewardSpec:
    return RewardSpec(name="weighted_sum", arguments={"parts": list(parts)}, **fields)


TWO = declared(
    {"name": "numeric_answer", "weight": 2, "arguments": {"tolerance": 0.1}},
    {"name": "team.rewards:tone", "weight": -0.5, "per_group": True, "label": "tone_v2"},
    timeout_seconds=3,
    environment=("AWS_PROFILE",),
)


def test_parts_inherit_what_the_sum_says() -> None:
    first, second = weighted_parts(TWO)
    assert (first.label, first.weight, first.reward.name) == ("numeric_answer", 2, "numeric_answer")
    assert (second.label, second.weight) == ("tone_v2", -0.5)
    assert second.reward == RewardSpec(
        name="team.rewards:tone",
        per_group=True,
        timeout_seconds=3,
        environment=("AWS_PROFILE",),
    )
    assert first.reward.arguments == {"tolerance": 0.1}


def test_it_adds_up_and_tells_each_part_before_its_weight() -> None:
    outcome = sum_weighted(weighted_parts(TWO), [Score(1.0), Score(0.5, {"warm": 0.25})])
    told = {"numeric_answer": 1.0, "tone_v2": 0.5, "tone_v2/warm": 0.25}
    assert outcome == Score(1.75, told)


def test_a_part_without_a_reward_leaves_none() -> None:
    late = Unscored(Cause.REWARD_TIMEOUT, "no reward within 3 s")
    assert sum_weighted(weighted_parts(TWO), [Score(1.0), late]) == Unscored(
        Cause.REWARD_TIMEOUT, "tone_v2: no reward within 3 s"
    )


def test_a_sum_may_be_too_large() -> None:
    parts = weighted_parts(declared({"name": "length", "weight": 1e6}))
    assert isinstance(sum_weighted(parts, [Score(1e29)]), Unscored)


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        (RewardSpec(name="weighted_sum"), "parts: Field required"),
        (declared(), "parts: Tuple should have at least 1"),
        (declared({}), "parts.0.name: Field required"),
        (declared({"name": "length", "weigth": 2}), "parts.0.weigth: Extra inputs"),
        (declared({"name": "length", "weight": float("nan")}), "parts.0.weight"),
        (declared({"name": "length", "weight": 1e7}), "parts.0.weight"),
        (declared({"name": "not a name"}), "name: Value error"),
        (declared({"name": "length"}, {"name": "length"}), "give each a `label`"),
        (declared({"name": "weighted_sum"}), "a weighted sum itself"),
        (declared({"name": "length"}, per_group=True), "of its parts"),
    ],
)
def test_what_cannot_be_added_up(reward: RewardSpec, reason: str) -> None:
    with pytest.raises(RewardError, match=reason):
        weighted_parts(reward)
