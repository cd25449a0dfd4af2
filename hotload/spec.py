"""What a user declares for one cycle: its parts are in `hotload.options`.

The Prefect UI shows these models as a form; every field says its unit.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Self
from urllib.parse import unquote, urlsplit

from pydantic import Field, field_validator, model_validator

from hotload.identity import cycle_name
from hotload.options import (
    Cadence,
    Declared,
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


class CycleSpec(Declared):
    """One policy version, from checkpoint to scored groups."""

    checkpoint: str = Field(min_length=1)
    """The directory the trainer wrote, complete: absolute path or file:// URI."""
    run_id: str = Field(min_length=1, max_length=96)
    """The training run; begins every identity this run publishes."""
    policy_version: int = Field(ge=0, lt=10**9)
    """The trainer's step; grows within a run and is never used for other weights."""
    work_dir: str = Field(min_length=1)
    """A directory on this machine for the baseline and unfinished files; as large as two
    checkpoints."""
    problems: Problems
    """What to sample."""
    service: str = Field("default", min_length=1)
    """Name of the `HotLoadService` block to load the weights into."""
    store: str = Field("default", min_length=1)
    """Name of the `CheckpointStore` block to publish through."""
    rollouts: str = Field("default", min_length=1)
    """Name of the `RolloutClient` block to sample with."""
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
    prometheus_file: str | None = None
    """Absolute path of a .prom file that every cycle replaces, for the textfile collector of
    Prometheus' node exporter. Empty writes none."""
    wandb: Wandb = Wandb()
    """A run at Weights & Biases that gets every cycle's metrics."""

    @field_validator("checkpoint", "base_model", "work_dir", "prometheus_file")
    @classmethod
    def _absolute(cls, uri: str | None) -> str | None:
        return None if uri is None else str(local_path(uri))

    @field_validator("problems")
    @classmethod
    def _absolute_dataset(cls, problems: Problems) -> Problems:
        return problems.model_copy(update={"dataset": str(local_path(problems.dataset))})

    @model_validator(mode="after")
    def _named(self) -> Self:
        cycle_name(self.run_id, self.policy_version)
        return self

    @property
    def name(self) -> str:
        """`<run>-<version:06d>`: what the trainer calls this cycle."""
        return cycle_name(self.run_id, self.policy_version)
