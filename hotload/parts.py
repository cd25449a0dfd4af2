"""Scored groups as they lie in the store: parts, and a manifest written after all of them.

A cycle's rollouts are planned first: which problems make which part. A part carries the digest of
what was asked for, so a cycle that starts again knows which parts it has.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Literal

from pydantic import Field

from hotload.report import RolloutSummary
from hotload.snapshot import FileName, Record, Sha256
from hotload.spec import CycleSpec
from hotload.trajectories import Problem, chunk, problems_for

SCHEMA_NUMBER = 1
PART_COUNT_LIMIT = 50
PARTS = "_hotload/rollouts"
MANIFEST_FILE = "manifest.json"
# How fast samples are asked for changes nothing about them.
PACE_FIELDS = {"concurrency", "sample_timeout", "problems_per_task"}


@dataclass(frozen=True, slots=True)
class PartPlan:
    """The problems of one part; `digest` says what is asked for, whatever the pace."""

    number: int
    problems: tuple[Problem, ...]
    digest: str

    @property
    def file(self) -> str:
        """Name of the part below its rollout's directory."""
        return f"part-{self.number:05d}.parquet"


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """Which parts one policy version's rollouts have, below `directory` in the store."""

    identity: str
    policy_version: int
    directory: str
    parts: tuple[PartPlan, ...]
    digest: str

    @property
    def problem_count(self) -> int:
        """Problems in all parts."""
        return sum(len(part.problems) for part in self.parts)

    def path(self, file: str) -> str:
        """Path of a file of this rollout below the bucket."""
        return f"{self.directory}/{file}"


class RolloutPart(Record):
    """One part file and what is in it."""

    file: FileName
    size_bytes: int = Field(ge=0)
    sha256: Sha256
    digest: Sha256
    group_count: int = Field(ge=0)
    sample_count: int = Field(ge=0)
    failed_samples: dict[str, int]
    samples_by_identity: dict[str, int]
    reward_count: int = Field(ge=0)
    reward_sum: float
    completion_token_count: int = Field(ge=0)


class RolloutManifest(Record):
    """Names every part of one rollout. Written last: what it names exists."""

    schema_number: Literal[1] = 1
    identity: str
    policy_version: int = Field(ge=0)
    digest: Sha256
    parts: tuple[RolloutPart, ...]
    summary: RolloutSummary
    created_at: datetime

    def render(self) -> bytes:
        """The manifest as JSON; `parse` reads it back."""
        return self.model_dump_json(indent=1).encode()

    @classmethod
    def parse(cls, data: bytes, *, path: str) -> RolloutManifest:
        """The manifest in `data`.

        Raises:
            StoreError: it is not one.
        """
        return cls.parse_stored(data, path)


def plan_rollout(spec: CycleSpec, identity: str, problems: Sequence[Problem]) -> RolloutPlan:
    """The parts of a cycle's rollouts: at most 50, `problems_per_task` problems each or more."""
    chosen = problems_for(
        problems[: spec.problems.max_rows],
        spec.policy_version,
        spec.problems.prompt_groups_per_step,
    )
    size = max(spec.sampling.problems_per_task, -(-len(chosen) // PART_COUNT_LIMIT))
    asked = [
        SCHEMA_NUMBER,
        identity,
        spec.policy_version,
        spec.sampling.model_dump(mode="json", exclude=PACE_FIELDS),
        spec.reward.model_dump(mode="json"),
    ]
    parts = tuple(
        PartPlan(number, some, _digest([*asked, [asdict(problem) for problem in some]]))
        for number, some in enumerate(chunk(chosen, size))
    )
    directory = f"{PARTS}/{identity}"
    if not identity.startswith(f"{spec.name}-"):
        # This version was not published: it samples an earlier one, whose rollouts lie there.
        directory += f"/{spec.policy_version:06d}"
    digest = _digest([part.digest for part in parts])
    return RolloutPlan(identity, spec.policy_version, directory, parts, digest)


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def summarize(
    identity: str, parts: Iterable[RolloutPart], *, parts_uri: str, seconds: float
) -> RolloutSummary:
    """What all parts of one rollout came to; the mean is over the samples that have a reward."""
    parts = tuple(parts)
    rewarded = sum(part.reward_count for part in parts)
    return RolloutSummary(
        identity=identity,
        group_count=sum(part.group_count for part in parts),
        sample_count=sum(part.sample_count for part in parts),
        failed_samples=_added(part.failed_samples for part in parts),
        samples_by_identity=_added(part.samples_by_identity for part in parts),
        mean_reward=sum(part.reward_sum for part in parts) / rewarded if rewarded else None,
        completion_token_count=sum(part.completion_token_count for part in parts),
        parts_uri=parts_uri,
        seconds=seconds,
    )


def _added(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total.most_common())
