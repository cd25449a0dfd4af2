"""Samples to show to a person: the best, the worst, and some where something happened, with texts
cut to what a page has room for.

A file of groups has at most one for each reason, and so has a rollout.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from hotload.records import Record
from hotload.rollout.counts import weights_name
from hotload.rollout.trajectory import Problem, ScoredGroup, Trajectory, Weights

TEXT_LIMIT_CHARACTERS = 2400
MESSAGE_LIMIT = 12


class ExtractReason(StrEnum):
    """Why a sample is shown, the most telling reason first."""

    HIGHEST_REWARD = "highest reward"
    LOWEST_REWARD = "lowest reward"
    TWO_VERSIONS = "two versions of the weights"
    FAILED = "failed"
    MOST_TURNS = "most turns"
    MEDIAN_REWARD = "median reward of its part"


class ShownMessage(NamedTuple):
    """Something that was said, by whom or as what."""

    role: str
    text: str


class SampleExtract(Record):
    """One sample to show. Texts end in a note of how many characters were left out."""

    reason: ExtractReason
    problem_id: str
    sample_number: int
    messages: tuple[ShownMessage, ...]
    """The prompt and the answer or, of several turns, all messages; those in the middle may be left
    out."""
    expected: str | None
    """The problem's own answer."""
    detail: str
    reward: float | None
    reward_parts: dict[str, float]
    advantage: float | None
    mark: str | None
    failure: str | None
    weights: str | None
    """The name of the weights that made it."""
    attempts: int
    latency_seconds: float
    turn_count: int
    completion_token_count: int
    finish_reason: str | None


class _Scored(NamedTuple):
    group: ScoredGroup
    number: int

    @property
    def sample(self) -> Trajectory:
        return self.group.trajectories_G[self.number]

    @property
    def reward(self) -> float | None:
        return self.group.rewards_G[self.number]


def choose_extracts(groups: Iterable[ScoredGroup]) -> tuple[SampleExtract, ...]:
    """Choose the samples of one file to show."""
    every = [_Scored(group, n) for group in groups for n in range(len(group.trajectories_G))]
    chosen: dict[ExtractReason, _Scored] = {}
    by_reward = sorted(
        (one for one in every if one.reward is not None),
        key=lambda one: (one.reward or 0.0, one.sample.completion_token_count),
    )
    if by_reward:
        chosen[ExtractReason.HIGHEST_REWARD] = by_reward[-1]
        chosen[ExtractReason.LOWEST_REWARD] = by_reward[0]
        chosen[ExtractReason.MEDIAN_REWARD] = by_reward[len(by_reward) // 2]
    for one in every:
        if one.sample.failure is not None:
            chosen.setdefault(ExtractReason.FAILED, one)
        if one.sample.weights is Weights.STRADDLING:
            chosen.setdefault(ExtractReason.TWO_VERSIONS, one)
    longest = max(every, key=lambda one: one.sample.turn_count, default=None)
    if longest is not None and longest.sample.turn_count > 1:
        chosen[ExtractReason.MOST_TURNS] = longest
    return tuple(_extract(reason, *chosen[reason]) for reason in ExtractReason if reason in chosen)


def merge_extracts(extracts: Iterable[SampleExtract]) -> tuple[SampleExtract, ...]:
    """Keep one of those with the same reason: the best, the worst, or else the first."""
    kept: dict[ExtractReason, SampleExtract] = {}
    for extract in extracts:
        known = kept.setdefault(extract.reason, extract)
        if known.reward is None or extract.reward is None:
            continue
        is_higher = extract.reward > known.reward
        is_lower = extract.reward < known.reward
        if (extract.reason is ExtractReason.HIGHEST_REWARD and is_higher) or (
            extract.reason is ExtractReason.LOWEST_REWARD and is_lower
        ):
            kept[extract.reason] = extract
    return tuple(kept[reason] for reason in ExtractReason if reason in kept)


def _extract(reason: ExtractReason, group: ScoredGroup, number: int) -> SampleExtract:
    problem, sample = group.problem, group.trajectories_G[number]
    weights = weights_name(sample)
    return SampleExtract(
        reason=reason,
        problem_id=sample.problem_id,
        sample_number=sample.sample_number,
        messages=_shorten_chat(_messages(problem, sample)),
        expected=None if problem.answer is None else _cut(_text(problem.answer)),
        detail=_cut(sample.detail),
        reward=group.rewards_G[number],
        reward_parts=dict(group.reward_parts_G[number]) if group.reward_parts_G else {},
        advantage=group.advantages_G[number],
        mark=group.mark,
        failure=sample.failure,
        weights=None if weights is None else _cut(weights),
        attempts=sample.provenance.attempts,
        latency_seconds=sample.latency_seconds,
        turn_count=sample.turn_count,
        completion_token_count=sample.completion_token_count,
        finish_reason=None if sample.finish_reason is None else _cut(sample.finish_reason),
    )


def _messages(problem: Problem, sample: Trajectory) -> list[Mapping[str, Any]]:
    if sample.transcript:
        return [*sample.transcript]
    answer = {"role": "answer of the model", "content": sample.text}
    if problem.messages is not None:
        return [*problem.messages, answer]
    if isinstance(problem.prompt, str):
        return [{"role": "prompt", "content": problem.prompt}, answer]
    return [answer]


def _shorten_chat(messages: Sequence[Mapping[str, Any]]) -> tuple[ShownMessage, ...]:
    # The beginning sets the scene and the end decides; the middle is what may be missed.
    left_out = len(messages) - MESSAGE_LIMIT
    if left_out <= 0:
        return tuple(map(_shorten, messages))
    head, tail = messages[: MESSAGE_LIMIT // 2], messages[-MESSAGE_LIMIT // 2 :]
    gap = ShownMessage("", f"… {left_out:,} message{'s' * (left_out > 1)} left out")
    return (*map(_shorten, head), gap, *map(_shorten, tail))


def _shorten(message: Mapping[str, Any]) -> ShownMessage:
    content = message.get("content")
    text = _text(content)
    rest = {name: value for name, value in message.items() if name not in ("role", "content")}
    if rest:
        text = f"{text if content else ''}\n{_text(rest)}".strip()
    return ShownMessage(_cut(str(message.get("role", "message"))), _cut(text))


def _text(value: object) -> str:
    """A text as it is, anything else as JSON."""

    def plain(other: object) -> object:
        return dict(other) if isinstance(other, Mapping) else str(other)

    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=plain)


def _cut(text: str) -> str:
    left_out = len(text) - TEXT_LIMIT_CHARACTERS
    if left_out <= 0:
        return text
    return f"{text[:TEXT_LIMIT_CHARACTERS]}\n… {left_out:,} more characters"
