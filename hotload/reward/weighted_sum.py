"""The weighted sum of several named rewards: what is declared for it, and how its parts add up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field, JsonValue, ValidationError

from hotload.errors import RewardError
from hotload.options import Declared, RewardSpec
from hotload.reward.outcome import (
    PART_COUNT_LIMIT,
    WEIGHTED_SUM,
    RewardOutcome,
    Score,
    Unscored,
    as_number,
)
from hotload.rollout.failures import Cause


class WeightedPart(Declared):
    """One reward of the sum."""

    name: str
    """A reward, as in the spec; not another sum."""
    weight: float = Field(1.0, ge=-1e6, le=1e6)
    """What its reward is multiplied with."""
    arguments: dict[str, JsonValue] = Field({})
    """Keyword arguments for it."""
    per_group: bool = False
    """Call it once a group."""
    label: str | None = Field(None, pattern=r"^\w{1,32}$")
    """Its name in the data, where two parts have one name; else the last word of `name`."""


class WeightedSumArguments(Declared):
    """The `arguments` of a weighted sum."""

    parts: tuple[WeightedPart, ...] = Field(min_length=1, max_length=PART_COUNT_LIMIT)
    """The rewards to add up."""


@dataclass(frozen=True, slots=True)
class WeightedReward:
    """One part as it is scored: under which label, how it counts, and what it is."""

    label: str
    weight: float
    reward: RewardSpec


def weighted_parts(reward: RewardSpec) -> tuple[WeightedReward, ...]:
    """Return the parts of a declared weighted sum; time limit and environment are the sum's.

    Raises:
        RewardError: naming what does not fit.
    """
    if reward.per_group:
        raise RewardError(reward.name, "say `per_group` of its parts")
    try:
        parts = WeightedSumArguments.model_validate(reward.arguments).parts
        found = tuple(
            WeightedReward(
                each.label or each.name.rpartition(":")[2][:32],
                each.weight,
                reward.model_copy(update=_checked(each)),
            )
            for each in parts
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(step) for step in first["loc"])
        raise RewardError(reward.name, f"{place or 'arguments'}: {first['msg']}") from None
    labels = [each.label for each in found]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise RewardError(reward.name, f"two parts are {sorted(twice)}: give each a `label`")
    if any(each.reward.name == WEIGHTED_SUM for each in found):
        raise RewardError(reward.name, "a part is a weighted sum itself: name its parts here")
    return found


def _checked(part: WeightedPart) -> dict[str, object]:
    changes = part.model_dump(include={"name", "arguments", "per_group"})
    return RewardSpec.model_validate(changes).model_dump(include=set(changes))


def sum_weighted(
    parts: Sequence[WeightedReward], outcomes: Sequence[RewardOutcome]
) -> RewardOutcome:
    """Add up the outcomes of one trajectory, with each part's own reward before its weight; the
    parts of a part are `label/name`.

    A part without a reward leaves the sample without one: half a sum is another reward.
    """
    values: dict[str, float] = {}
    for part, outcome in zip(parts, outcomes, strict=True):
        if isinstance(outcome, Unscored):
            return Unscored(outcome.cause, f"{part.label}: {outcome.detail}")
        values[part.label] = outcome.reward
        values.update({f"{part.label}/{name}": value for name, value in outcome.parts.items()})
    total = math.fsum(part.weight * values[part.label] for part in parts)
    if as_number(total) is None:
        return Unscored(Cause.REWARD_NOT_A_NUMBER, "the weighted sum is too large")
    return Score(total, values)
