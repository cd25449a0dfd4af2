"""What a user declares, for one cycle and for retention: the parts are in `hotload.options`.

The Prefect UI shows these models as a form; every field says its unit.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self
from urllib.parse import unquote, urlsplit

from pydantic import Field, field_validator, model_validator

from hotload.errors import InvalidProblemsError
from hotload.identity import LINES_LIMIT, NamedVersion, cycle_name
from hotload.options import (
    Cadence,
    Declared,
    Prices,
    Problems,
    ReadinessPolicy,
    RewardSpec,
    Sampling,
    SnapshotOptions,
    Wandb,
)


def local_path(uri: str) -> PurePosixPath:
    """Return the absolute path named by a path or file:// URI.

    A worker's working directory is a temporary clone, so relative paths are refused.

    Raises:
        ValueError: relative, or another scheme.
    """
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        uri = unquote(parts.path)
    elif "://" in uri:
        raise ValueError(f"expected an absolute path or a file:// URI, not {parts.scheme}://")
    if not uri.startswith("/") or "\0" in uri:
        raise ValueError("expected an absolute path, not a relative one")
    return PurePosixPath(uri)


def dataset_location(uri: str) -> str:
    """Return where a dataset or a checkpoint lies: a local path, or the URL as it is.

    Raises:
        ValueError: a relative path, several URLs in one, or one with a password or a query.
    """
    if "://" not in uri or uri.startswith("file://"):
        return str(local_path(uri))
    parts = urlsplit(uri)
    if "::" in uri or not parts.netloc or not uri.isprintable():
        raise ValueError("expected an absolute path or one URL, such as s3://bucket/file")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "expected a URL without credentials, query or fragment: everybody who may look at the"
            " server sees it; credentials belong in the worker's environment"
        )
    return uri


RANKS = "ranks"
"""In the place of a checkpoint: what the ranks of the trainer have committed."""
BlockName = Annotated[str, Field(min_length=1)]
NODE_NAME = r"^[A-Za-z0-9][\w-]{0,63}$"
NodeName = Annotated[str, Field(pattern=NODE_NAME)]
FilePattern = Annotated[str, Field(min_length=1, max_length=255)]
Weight = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
RequiredServices = Literal["all", "any", "quorum"]


class CycleSpec(Declared):
    """One policy version, from checkpoint to scored groups."""

    checkpoint: str = Field(min_length=1)
    """The directory the trainer wrote, complete: absolute path, or URL of a file system of fsspec
    that lists sizes, such as s3://bucket/run/000012. Or `ranks`: what the trainer's ranks have put
    into the store and committed for this version."""
    checkpoint_store: BlockName | None = None
    """Name of a `CheckpointStore` block whose options open a checkpoint that is a URL. Empty takes
    those of `store` where it is in the same bucket, else what the worker's environment says."""
    run_id: str = Field(min_length=1, max_length=96)
    """The training run; begins every identity this run publishes."""
    policy_version: int = Field(ge=0, lt=10**9)
    """The trainer's step; grows within a line and is never used there for other weights."""
    work_dir: str = Field(min_length=1)
    """A directory on this machine for the baseline and unfinished files; best as large as two
    checkpoints, at least as one, its largest shard and a delta; and as one more for each snapshot
    that only some of the services serve."""
    problems: Problems | None = None
    """What to sample. A cycle without problems can only be published."""
    line: int = Field(0, ge=0, lt=LINES_LIMIT)
    """Which line of the run: raise it by one when the trainer resumes from an earlier version than
    it has published. From its first version on, a line supersedes those before it."""
    service: str = Field("default", min_length=1)
    """Name of the `HotLoadService` block to load the weights into."""
    other_services: tuple[BlockName, ...] = Field((), max_length=63)
    """Names of further `HotLoadService` blocks that load the same weights from the same store, each
    with a chain and a fallback of its own."""
    required: RequiredServices = "all"
    """How many of the services have to serve the weights, and with them those that are sampled; one
    that fails does not hold the others."""
    store: str = Field("default", min_length=1)
    """Name of the `CheckpointStore` block to publish through."""
    rollouts: str = Field("default", min_length=1)
    """Name of the `RolloutClient` block to sample with."""
    rollout_weights: dict[BlockName, Weight] = Field({}, max_length=64)
    """Names of `RolloutClient` blocks to sample with, each with its share of the problems, in parts
    of `problems_per_task`. Empty: all with `rollouts`."""
    again: Literal["rollouts"] | None = None
    """What to do anew although the cycle has ended: sample, beside the samples that it has. Asked
    for twice with the same problems, sampling and reward, it is done once."""
    placement: dict[NodeName, tuple[FilePattern, ...]] = Field({}, max_length=1024)
    """Names of the nodes that read, encode and upload the shards, each with patterns of the files
    it has, such as `*-0000[1-4]-of-*`. Files that no pattern names are dealt in turn to the nodes
    without one, or to all. Empty does it where the cycle runs."""
    base_model: str | None = None
    """Directory of the base model the service was started on. When given, config, tensor names and
    shapes are compared with it before anything is uploaded."""
    cadence: Cadence = Cadence()
    """When to publish, and when a full snapshot is due."""
    snapshot: SnapshotOptions = SnapshotOptions()
    """How snapshots are checked, and what is tried when they fail."""
    readiness: ReadinessPolicy = ReadinessPolicy()
    """When a snapshot counts as served."""
    sampling: Sampling = Sampling()
    """How every problem is sampled."""
    reward: RewardSpec = RewardSpec()
    """What scores a sample."""
    prices: Prices = Prices()
    """What publishing costs: decides between a full and a delta, and shows money."""
    prometheus_file: str | None = None
    """Absolute path of a .prom file that every cycle replaces, for the textfile collector of
    Prometheus' node exporter. Empty writes none."""
    wandb: Wandb = Wandb()
    """A run at Weights & Biases that gets every cycle's metrics."""

    @field_validator("checkpoint")
    @classmethod
    def _located(cls, uri: str) -> str:
        return uri if uri == RANKS else dataset_location(uri).rstrip("/") or "/"

    @field_validator("base_model", "work_dir", "prometheus_file")
    @classmethod
    def _absolute(cls, uri: str | None) -> str | None:
        return None if uri is None else str(local_path(uri))

    @field_validator("run_id")
    @classmethod
    def _begins_names(cls, run_id: str) -> str:
        cycle_name(run_id, 0)
        return run_id

    @field_validator("problems")
    @classmethod
    def _dataset(cls, problems: Problems | None) -> Problems | None:
        return problems and problems.model_copy(
            update={"dataset": dataset_location(problems.dataset)}
        )

    @model_validator(mode="after")
    def _no_service_twice(self) -> Self:
        twice = [name for name, count in Counter(self.services).items() if count > 1]
        if twice:
            raise ValueError(f"the service {twice[0]!r} is named twice; name each once")
        return self

    @model_validator(mode="after")
    def _placed_by_ranks(self) -> Self:
        if self.placement and self.is_of_ranks:
            raise ValueError("placement: expected none, since the ranks have put their shards")
        return self

    @property
    def to_sample(self) -> Problems:
        """What a cycle that samples does sample.

        Raises:
            InvalidProblemsError: it declares nothing.
        """
        if self.problems is None:
            reason = "found none; declare them, or only publish (`--publish-only`)"
            raise InvalidProblemsError("`problems` of the cycle", 0, reason)
        return self.problems

    def shares_of(self, files: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Deal shards out to the nodes of the placement; a node with none is left out."""
        shares: dict[str, list[str]] = {node: [] for node in self.placement}
        dealt = [node for node, patterns in self.placement.items() if not patterns]
        rest = []
        for file in sorted(files):
            for node, patterns in self.placement.items():
                if any(fnmatchcase(file, pattern) for pattern in patterns):
                    shares[node].append(file)
                    break
            else:
                rest.append(file)
        for number, file in enumerate(rest):
            shares[(dealt or [*shares])[number % len(dealt or shares)]].append(file)
        return {node: tuple(share) for node, share in shares.items() if share}

    @property
    def is_of_ranks(self) -> bool:
        """Whether the ranks of the trainer put this version into the store, and there is no
        directory of it."""
        return self.checkpoint == RANKS

    @property
    def services(self) -> tuple[str, ...]:
        """Name the blocks of all services."""
        return (self.service, *self.other_services)

    @property
    def sampled_with(self) -> dict[str, float]:
        """Name the `RolloutClient` blocks to sample with, each with its weight."""
        return self.rollout_weights or {self.rollouts: 1.0}

    def at(self, service: str) -> CycleSpec:
        """Return what this cycle is for one of its services alone."""
        return self.model_copy(update={"service": service, "other_services": ()})

    def going_back(self, checkpoint: str, run_id: str, policy_version: int, line: int) -> CycleSpec:
        """Return the same cycle for an earlier version, restored in the directory `checkpoint`."""
        earlier = {
            "checkpoint": checkpoint,
            "run_id": run_id,
            "policy_version": policy_version,
            "line": line,
            "placement": {},  # that directory is on this machine alone
            # Its trainer's digests are not beside it.
            "snapshot": self.snapshot.model_copy(update={"trust_digests": False}),
        }
        return self.model_copy(update=earlier)

    @property
    def version(self) -> NamedVersion:
        """The run, line and policy version of this cycle."""
        return NamedVersion(self.run_id, self.line, self.policy_version)

    @property
    def name(self) -> str:
        """What the trainer calls this cycle, as `cycle_name` makes it."""
        return cycle_name(self.run_id, self.policy_version, self.line)


class WatchSpec(Declared):
    """Where new checkpoints appear, and the cycle that each of them gets."""

    cycle: CycleSpec
    """The cycle of any version; its checkpoint and its version are those of what appears."""
    parent: str | None = None
    """Absolute path or URL of the directory in which the trainer makes one for each version. Empty
    is the parent of the cycle's checkpoint."""
    name: str = Field(r"(?:.*\D)?(?P<version>\d{1,9})", min_length=1, max_length=256)
    """Regular expression for the whole name of such a directory; its group `version` is the policy
    version. Others are ignored."""
    marker: str | None = Field(None, min_length=1, max_length=255, pattern=r"^[^/]+$")
    """A file that the trainer writes last. Empty waits until every shard is whole and nothing has
    been written for `still_seconds`."""
    still_seconds: float = Field(5, ge=0, le=3600, allow_inf_nan=False)
    """Seconds without a write after which a checkpoint without a marker counts as complete."""
    after_version: int | None = Field(None, ge=0, lt=10**9)
    """Leave alone all versions up to this one, such as those of an earlier line of the run."""
    newest_only: bool = False
    """Leave out versions that a newer complete one has overtaken."""
    deployment: str | None = Field(None, pattern=r"^[^/]+/[^/]+$")
    """`<flow>/<name>` of the deployment that runs the cycles. Empty runs them one after the other,
    in the same process."""

    @field_validator("parent")
    @classmethod
    def _located(cls, uri: str | None) -> str | None:
        return None if uri is None else dataset_location(uri).rstrip("/") or "/"

    @field_validator("name")
    @classmethod
    def _names_a_version(cls, name: str) -> str:
        try:
            pattern = re.compile(name)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        if "version" not in pattern.groupindex:
            raise ValueError(r"expected a group for the policy version, like (?P<version>\d+)")
        return name

    @model_validator(mode="after")
    def _has_a_directory(self) -> Self:
        if self.parent is None and self.cycle.is_of_ranks:
            raise ValueError(
                "parent: expected a directory, since the cycle's checkpoint is `ranks`"
            )
        return self

    @property
    def directory(self) -> str:
        """Where new checkpoints appear."""
        return self.parent or self.cycle.checkpoint.rpartition("/")[0] or "/"

    def cycle_of(self, checkpoint: str, policy_version: int) -> CycleSpec:
        """Declare the cycle of one version."""
        changes = {"checkpoint": checkpoint, "policy_version": policy_version}
        return CycleSpec.model_validate(self.cycle.model_dump() | changes)


class RetentionSpec(Declared):
    """What a store keeps, and what is removed from it."""

    services: tuple[str, ...] = Field(("default",), min_length=1)
    """Names of the `HotLoadService` blocks of every service that loads from the store; what one of
    them serves is kept. Of a service that is not named nothing is known."""
    store: str = Field("default", min_length=1)
    """Name of the `CheckpointStore` block."""
    keep_versions: int = Field(20, ge=1, le=10**9)
    """Newest policy versions of every run that stay, along its newest line, with all that their
    chains need."""
    keep_reports: int | None = Field(None, ge=1, le=10**9)
    """Newest ended cycles of every run whose reports, metrics and rollouts stay. Empty keeps
    all."""
    grace_hours: float = Field(24.0, ge=1, le=10_000, allow_inf_nan=False)
    """Hours since the last write after which an upload without a manifest counts as given up."""
    price_per_gb_month: float | None = Field(None, ge=0, allow_inf_nan=False)
    """What 10^9 stored bytes cost a month, in any currency. Empty shows no money."""
    delete: bool = False
    """Whether to remove; otherwise it is only said what would be removed."""
