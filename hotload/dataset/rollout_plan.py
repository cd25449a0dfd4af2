"""Scored groups as they lie in the store: part files, and a manifest that names them.

A cycle's rollouts are planned first: which problems make which part. A part is written in one file
or several, as its groups finish; each carries the digest of what was asked for, so that a cycle
that starts again knows which groups it has. The manifest is written after the files it names, again
and again while the cycle runs, and says at last that it is complete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from pydantic import AwareDatetime, Field

from hotload.dataset.sample_extracts import SampleExtract
from hotload.identity import NamedVersion, read_identity, version_text
from hotload.records import FileName, Record, Sha256
from hotload.rollout.counts import RolloutCounts, RolloutSummary
from hotload.rollout.trajectory import Problem, chunk, problems_for
from hotload.spec import CycleSpec

SCHEMA_NUMBER = 2
PART_COUNT_LIMIT = 50
PARTS = "_hotload/rollouts"
MANIFEST_FILE = "manifest.json"
# How fast samples are asked for changes nothing about them.
PACE_FIELDS = {
    "concurrency",
    "sample_timeout",
    "problems_per_task",
    "processes",
    "max_head_offpolicy_versions",
}
# Neither does where the reward runs, and how long it may.
PLACE_FIELDS = {"timeout_seconds", "environment"}


@dataclass(frozen=True, slots=True)
class PartPlan:
    """The problems of one part; `digest` says what is asked for, whatever the pace.

    `reserve` are the rows of the problem file that may take the place of dropped ones, in order and
    for this part alone.
    """

    number: int
    problems: tuple[Problem, ...]
    digest: str
    reserve: tuple[Problem, ...] = ()

    def file(self, piece: int) -> str:
        """Name one of the part's files below its rollout's directory."""
        return f"part-{self.number:05d}-{piece:02d}.parquet"

    def pieces(self, names: Iterable[str]) -> Iterator[int]:
        """Find the numbers of this part's files among `names`, in order."""
        prefix, suffix = f"part-{self.number:05d}-", ".parquet"
        stems = [
            name[len(prefix) : -len(suffix)]
            for name in names
            if name.startswith(prefix) and name.endswith(suffix)
        ]
        yield from sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit())


def share_parts(parts: Sequence[PartPlan], weights: Sequence[float]) -> list[frozenset[int]]:
    """Share parts out by weight, each to whom most of its share is missing, in order: the numbers
    of those that each gets."""
    shares: list[set[int]] = [set() for _ in weights]
    given, total = [0.0] * len(weights), 0
    for part in parts:
        total += len(part.problems)
        missing = [
            weight / sum(weights) * total - had for weight, had in zip(weights, given, strict=True)
        ]
        chosen = missing.index(max(missing))
        shares[chosen].add(part.number)
        given[chosen] += len(part.problems)
    return [frozenset(share) for share in shares]


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """Which parts one policy version's rollouts have, below `directory` in the store."""

    run_id: str
    identity: str
    policy_version: int
    directory: str
    parts: tuple[PartPlan, ...]
    digest: str
    group_size: int

    @property
    def problem_count(self) -> int:
        """Problems in all parts."""
        return sum(len(part.problems) for part in self.parts)

    def path(self, file: str) -> str:
        """Path of a file of this rollout below the bucket."""
        return f"{self.directory}/{file}"


class RolloutPart(RolloutCounts):
    """One part file and the counts of what is in it."""

    file: FileName
    size_bytes: int = Field(ge=0)
    sha256: Sha256
    digest: Sha256


class PartNotes(RolloutCounts):
    """What a part file carries beside its rows: groups that left no row, its counts, and samples to
    show. A file without counts of its samples was written by an earlier version of hotload."""

    dropped_problem_ids: tuple[str, ...] = ()
    extracts: tuple[SampleExtract, ...] = ()

    def part(self, *, file: str, size_bytes: int, sha256: str, digest: str) -> RolloutPart:
        """Make the manifest's entry of this file."""
        counts = {name: getattr(self, name) for name in RolloutCounts.model_fields}
        return RolloutPart(file=file, size_bytes=size_bytes, sha256=sha256, digest=digest, **counts)


class RolloutManifest(Record):
    """Names the part files of one rollout: all of them once `is_complete`, until then those that
    are there. What it names exists."""

    schema_number: Literal[2] = 2
    identity: str
    policy_version: int = Field(ge=0)
    digest: Sha256
    parts: tuple[RolloutPart, ...]
    summary: RolloutSummary
    is_complete: bool = True
    """Whether the cycle has ended; before, more parts may come."""
    planned_group_count: int = Field(0, ge=0)
    """Groups there will be, less those that are dropped without another in their place."""
    extracts: tuple[SampleExtract, ...] = ()
    """Samples to show, once it is complete."""
    created_at: AwareDatetime

    def render(self) -> bytes:
        """Write the manifest as JSON; `parse` reads it back."""
        return self.model_dump_json(indent=1).encode()

    @classmethod
    def parse(cls, data: bytes, *, path: str) -> RolloutManifest:
        """Parse the manifest in `data`.

        Raises:
            StoreError: it is not one.
        """
        return cls.parse_stored(data, path)


def plan_rollout(spec: CycleSpec, identity: str, problems: Sequence[Problem]) -> RolloutPlan:
    """Plan the parts of a cycle's rollouts: at most 50, of `problems_per_task` problems or more."""
    declared = spec.to_sample
    chosen = problems_for(
        problems[: declared.max_rows], spec.policy_version, declared.prompt_groups_per_step
    )
    size = max(spec.sampling.problems_per_task, -(-len(chosen) // PART_COUNT_LIMIT))
    asked = [
        SCHEMA_NUMBER,
        identity,
        spec.policy_version,
        spec.sampling.model_dump(mode="json", exclude=PACE_FIELDS),
        spec.reward.model_dump(mode="json", exclude=PLACE_FIELDS),
    ]
    chunks = chunk(chosen, size)
    reserve: tuple[Problem, ...] = ()
    if spec.sampling.groups.on_uniform == "refill":
        reserve = _after(problems[: declared.max_rows], chosen)
    parts = []
    for number, some in enumerate(chunks):
        # Rows of its own, so that no two parts take the same one, whichever drops first.
        own = reserve[number :: len(chunks)]
        facts = [*asked, [asdict(problem) for problem in (*some, *own)]]
        parts.append(PartPlan(number, some, _digest(facts), own))
    digest = _digest([part.digest for part in parts])
    size = spec.sampling.completions_per_prompt
    version = spec.policy_version
    directory = rollout_directory(identity, NamedVersion(spec.run_id, spec.line, version))
    if spec.again == "rollouts":
        directory = f"{directory}/{AGAIN}{digest[:8]}"
    return RolloutPlan(spec.run_id, identity, version, directory, tuple(parts), digest, size)


AGAIN = "again-"
"""Begins the name of a directory, below a version's own, with samples that were taken anew."""


def rollout_directory(identity: str, version: NamedVersion) -> str:
    """Say where the rollouts lie that a version samples from the weights of `identity`."""
    directory = f"{PARTS}/{identity}"
    if read_identity(identity) == version:
        return directory
    # The version was not published: it samples an earlier one, whose own rollouts lie there.
    return f"{directory}/{version_text(version.policy_version, version.line)}"


def _after(problems: Sequence[Problem], chosen: Sequence[Problem]) -> tuple[Problem, ...]:
    """The rows that were not chosen, from the one after the last chosen on."""
    taken = {problem.id for problem in chosen}
    last = next(i for i, problem in enumerate(problems) if problem.id == chosen[-1].id)
    following = (*problems[last + 1 :], *problems[:last])
    return tuple(problem for problem in following if problem.id not in taken)


def _digest(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def summarize(
    identity: str,
    parts: Iterable[RolloutPart],
    *,
    parts_uri: str,
    seconds: float,
    declaration_sha256: str = "",
    found: Iterable[RolloutPart] = (),
    window_trace: Iterable[tuple[float, int, int]] = (),
) -> RolloutSummary:
    """Add up the parts of one rollout; the mean is over the samples that have a reward.

    Args:
        found: those of them that were there before the `seconds` began.
    """
    total, earlier = RolloutCounts.total(parts), RolloutCounts.total(found)
    return RolloutSummary(
        identity=identity,
        group_count=total.group_count,
        sample_count=total.sample_count,
        failed_samples=total.failed_samples,
        samples_by_identity=total.samples_by_identity,
        mean_reward=total.reward_sum / total.reward_count if total.reward_count else None,
        completion_token_count=total.completion_token_count,
        found_sample_count=earlier.sample_count,
        found_token_count=earlier.completion_token_count,
        parts_uri=parts_uri,
        declaration_sha256=declaration_sha256,
        seconds=seconds,
        groups=total.groups,
        window_trace=tuple(window_trace),
    )
