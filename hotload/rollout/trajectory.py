"""Problems, the trajectories sampled for them, and what is known about the weights behind each.

A failed sample is a value, not an exception: it stays in its group, marked with its cause (design,
rule 8). Axis letters: P problems, G samples of one problem, T completion tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

TOKEN_ID_LIMIT = 1 << 31
LOGPROB_RANGE = (-1e6, 0.01)
"""What counts as a log-probability, for sampler and trainer alike: below it a number stands for
"impossible", as -inf does; a sum in floating point may end a little above 0."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A prompt and what scores its answers. Exactly one of `prompt` and `messages` is set."""

    id: str
    prompt: str | tuple[int, ...] | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    answer: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What else the row had; a chat is offered its `tools`."""


class Weights(StrEnum):
    """What the answer said about the weights that made a sample, against those it was sent to."""

    EXPECTED = "expected"  # every chunk named the identity confirmed at dispatch
    ASSUMED = "assumed"  # some or all tokens came without any identity
    STRADDLING = "straddling"  # more than one identity in one sample
    OTHER = "other"  # one identity, and another than expected: of this run, or the sample failed
    NONE = "none"  # the sample failed and has no tokens


@dataclass(frozen=True, slots=True)
class Provenance:
    """Which weights, replica and request made a sample (protocol §12).

    `identity` is the one confirmed when the sample was dispatched; `observed` lists the distinct
    identities its chunks named, in order; `last` is the one named last. Staleness is counted from
    `identity`. `runs` says which tokens each made: (number of the first token, identity), over the
    tokens of all segments. `failed_attempts` holds a label for every attempt that got no usable
    answer (`Failure.label`, or `cancelled`): the others, `attempts` less their number, were
    answered.
    """

    identity: str
    request_id: str
    session_id: str
    attempts: int
    observed: tuple[str, ...] = ()
    last: str | None = None
    replica: str | None = None
    response_id: str | None = None
    runs: tuple[tuple[int, str], ...] = ()
    failed_attempts: tuple[str, ...] = ()

    @property
    def first(self) -> str | None:
        """The identity named first; `None` where no chunk named one."""
        return self.observed[0] if self.observed else None

    @property
    def weights(self) -> Weights:
        """How the observed identities compare with the dispatched one."""
        if len(self.observed) > 1:
            return Weights.STRADDLING
        if self.observed and self.observed[0] != self.identity:
            return Weights.OTHER
        is_told = self.observed and not self._has_untold_tokens
        return Weights.EXPECTED if is_told else Weights.ASSUMED

    @property
    def _has_untold_tokens(self) -> bool:
        runs = self.runs
        return bool(runs) and (runs[0][0] > 0 or any(not identity for _, identity in runs))


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens that follow one prompt: what a trainer takes as one sequence. Arrays have length T.

    Tokens the policy did not sample (a tool's result, a message between turns) have a loss mask of
    False and a log-probability of 0. `routes` are the experts of prompt and completion as
    hotload.rollout.routing lays them out, where the service was asked and told them.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids_T: tuple[int, ...]
    sampling_logprobs_T: tuple[float, ...]
    loss_mask_T: tuple[bool, ...]
    routes: bytes | None = None


EMPTY_SEGMENT = Segment((), (), (), ())


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One sampled answer, of one turn or several.

    Log-probabilities are natural, under the distribution really sampled. `failure` is the cause of
    a failed sample, with `detail` for a reader; a failed sample may have kept its tokens. Latency
    in seconds runs from the first attempt to the end, waits included.

    Turns whose prompt repeats the tokens so far are one segment; where one does not (a chat
    template rewrote what was said), a new segment begins. There is at least one; a sample without
    an answer has an empty one.
    `prompt_token_count` counts the prompts of all turns, each as it was sent, and
    `completion_token_count` the tokens that were sampled.
    """

    problem_id: str
    sample_number: int
    seed: int
    provenance: Provenance
    latency_seconds: float
    segments: tuple[Segment, ...] = (EMPTY_SEGMENT,)
    text: str = ""
    finish_reason: str | None = None
    prompt_token_count: int = 0
    cached_prompt_token_count: int = 0
    completion_token_count: int = 0
    failure: str | None = None
    detail: str = ""
    turn_count: int = 1
    transcript: tuple[Mapping[str, Any], ...] = ()
    is_hedge: bool = False

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError("a trajectory has at least one segment")

    @property
    def weights(self) -> Weights:
        """What is known about the weights that made the tokens."""
        has_answer = self.failure is None or any(segment.token_ids_T for segment in self.segments)
        return self.provenance.weights if has_answer else Weights.NONE


@dataclass(frozen=True, slots=True)
class TrajectoryGroup:
    """The G answers to one problem, failed ones included, in sample order."""

    problem: Problem
    trajectories_G: tuple[Trajectory, ...]


@dataclass(frozen=True, slots=True)
class ScoredGroup:
    """A group with a reward and an advantage per sample, `None` for a failed one.

    `reward_parts_G` are the named parts of each reward, where the reward function names any.
    `mark` says what became of a group that is not simply complete, `None` for one that is.
    """

    problem: Problem
    trajectories_G: tuple[Trajectory, ...]
    rewards_G: tuple[float | None, ...]
    advantages_G: tuple[float | None, ...]
    reward_parts_G: tuple[Mapping[str, float], ...] = ()
    mark: str | None = None


def problems_for(
    problems: Sequence[Problem], policy_version: int, prompt_groups_per_step: int | None
) -> tuple[Problem, ...]:
    """Choose the P problems of one policy version: the next P rows, beginning again at the end.

    `None`, or more than there are, is every problem once.
    """
    total = len(problems)
    if prompt_groups_per_step is None or prompt_groups_per_step >= total:
        return tuple(problems)
    start = policy_version * prompt_groups_per_step % total
    return tuple(problems[(start + i) % total] for i in range(prompt_groups_per_step))


def chunk(problems: Sequence[Problem], size: int) -> tuple[tuple[Problem, ...], ...]:
    """Cut the problems into runs of `size`, the last one shorter."""
    return tuple(tuple(problems[i : i + size]) for i in range(0, len(problems), size))


def sample_seed(run_seed: int, problem_id: str, policy_version: int, sample_number: int) -> int:
    """Compute the seed of one sample, in [0, 2**31): the same on every machine and after every
    restart.
    """
    facts = json.dumps([run_seed, problem_id, policy_version, sample_number])
    return int.from_bytes(hashlib.sha256(facts.encode()).digest()[:4], "big") & 0x7FFF_FFFF
