"""Values that tests build: every default is good, and a keyword replaces it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hotload.checkpoint.safetensors import DTYPE_BITS, SHARD_SUFFIX, ShardHeader, TensorInfo
from hotload.dataset.rollout_plan import RolloutManifest, RolloutPart, summarize
from hotload.directory.files import sha256_file
from hotload.identity import SnapshotKind, version_of
from hotload.publish.snapshot import Shard, SnapshotManifest, content_sha256
from hotload.records import FileDigest
from hotload.reward.advantages import advantages
from hotload.rollout.trajectory import Problem, Provenance, ScoredGroup, Segment, Trajectory
from hotload.spec import CycleSpec
from hotload.training.policy_loss import PolicyLoss
from hotload.training.settings import StateRef
from hotload.training.step_record import (
    ExportedCheckpoint,
    RunFacts,
    StepRecord,
    TrainedGroups,
)
from hotload.training.windows import Cursor

IDENTITY = "run-000003-0badf00d"
SHA = "0" * 64
CREATED_AT = datetime(2026, 1, 1, tzinfo=UTC)


def provenance(*observed: str, identity: str | None = None, **fields: Any) -> Provenance:
    """Say who made a sample: `identity` was asked (by default the first that answered)."""
    origin: dict[str, Any] = {
        "identity": identity or (observed[0] if observed else IDENTITY),
        "request_id": "request",
        "session_id": "session",
        "attempts": 1,
        "observed": observed,
        "last": observed[-1] if observed else None,
    }
    return Provenance(**origin | fields)


def segment(
    tokens: Sequence[int] = (5, 6),
    *,
    prompt: Sequence[int] = (1,),
    logprobs: Sequence[float] | None = None,
    mask: Sequence[bool] | None = None,
) -> Segment:
    """Build a sequence of sampled tokens after a prompt, log-probabilities -0.5."""
    count = len(tokens)
    return Segment(
        tuple(prompt),
        tuple(tokens),
        (-0.5,) * count if logprobs is None else tuple(logprobs),
        (True,) * count if mask is None else tuple(mask),
    )


def trajectory(*segments: Segment, number: int = 0, **fields: Any) -> Trajectory:
    """Build sample `number` of problem `p`; without segments it has one, of two tokens."""
    segments = segments or (segment(),)
    made: dict[str, Any] = {
        "problem_id": "p",
        "sample_number": number,
        "seed": number,
        "provenance": provenance(IDENTITY, request_id=f"r{number}"),
        "latency_seconds": 0.5,
        "segments": segments,
        "text": "ab",
        "finish_reason": "stop",
        "completion_token_count": sum(sum(each.loss_mask_T) for each in segments),
    }
    return Trajectory(**made | fields)


def scored_group(
    *samples: Trajectory, rewards: Sequence[float | None] | None = None, **fields: Any
) -> ScoredGroup:
    """Score samples of one problem: by their numbers where no rewards are given, failed ones
    not."""
    if rewards is None:
        rewards = [None if each.failure else float(each.sample_number) for each in samples]
    made: dict[str, Any] = {
        "problem": Problem(samples[0].problem_id, "x"),
        "trajectories_G": samples,
        "rewards_G": tuple(rewards),
        "advantages_G": advantages(tuple(rewards)),
    }
    return ScoredGroup(**made | fields)


def snapshot_manifest(
    identity: str, *, previous: str | None = None, **fields: Any
) -> SnapshotManifest:
    """Describe a snapshot without shards: a delta if it follows another, otherwise a full one."""
    made: dict[str, Any] = {
        "identity": identity,
        "run_id": "run",
        "policy_version": version_of(identity, "run") or 0,
        "kind": SnapshotKind.DELTA if previous else SnapshotKind.FULL,
        "previous": previous,
        "anchor": previous or identity,
        "chain_length": 1 if previous else 0,
        "attempt": 0,
        "reason": "test",
        "content_sha256": SHA,
        "codec": "arc_v2" if previous else "none",
        "checksum": "adler32" if previous else "none",
        "shards": (),
        "side_files": (),
        "created_at": CREATED_AT,
    }
    return SnapshotManifest(**made | fields)


def recorded_manifest(
    stored: Path, checkpoint: Path, previous: str | None = None, spoilt: str = ""
) -> SnapshotManifest:
    """Record the snapshot that lies in a directory of its name, and the checkpoint it stands for;
    `spoilt` is a file with another digest."""

    def digests_in(directory: Path) -> dict[str, FileDigest]:
        return {
            path.name: FileDigest(
                file=path.name,
                size_bytes=path.stat().st_size,
                sha256=SHA if path.name == spoilt else sha256_file(path),
            )
            for path in sorted(directory.iterdir())
        }

    files, whole = digests_in(stored), digests_in(checkpoint)
    shards = [name for name in whole if name.endswith(SHARD_SUFFIX)]
    return snapshot_manifest(
        stored.name,
        previous=previous,
        content_sha256=content_sha256({name: one.sha256 for name, one in whole.items()}),
        shards=tuple(
            Shard(
                **files[name].model_dump(),
                content_size_bytes=whole[name].size_bytes,
                content_sha256=whole[name].sha256,
            )
            for name in shards
        ),
        side_files=tuple(one for name, one in whole.items() if name not in shards),
    )


def rollout_manifest(identity: str, parts: Sequence[RolloutPart], **fields: Any) -> RolloutManifest:
    """Describe the parts of a rollout of policy version 3."""
    made: dict[str, Any] = {
        "identity": identity,
        "policy_version": 3,
        "digest": SHA,
        "parts": tuple(parts),
        "summary": summarize(identity, parts, parts_uri="", seconds=1.0),
        "created_at": CREATED_AT,
    }
    return RolloutManifest(**made | fields)


def cycle_spec(**changes: Any) -> CycleSpec:
    """Declare policy version 3 of run `run`, its paths nowhere; `changes` replace fields."""
    declared: dict[str, Any] = {
        "checkpoint": "/checkpoint",
        "work_dir": "/work",
        "run_id": "run",
        "policy_version": 3,
        "problems": {"dataset": "/problems.jsonl"},
    }
    return CycleSpec.model_validate(declared | changes)


def shard_header(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    file: str = "model.safetensors",
    **metadata: str,
) -> ShardHeader:
    """Lay out tensors, (dtype, shape) by name, one after the other in a shard."""
    entries, end = [], 0
    for name, (dtype, shape) in tensors.items():
        start, bits = end, DTYPE_BITS[dtype]
        for size in shape:
            bits *= size
        end = start + bits // 8
        entries.append(TensorInfo(name, dtype, shape, start, end))
    return ShardHeader(file, tuple(entries), metadata, 512, 512 + end)


def run_facts(**changes: Any) -> RunFacts:
    """Build what must stay the same for a training run."""
    facts: dict[str, Any] = {
        "base_model": "tiny",
        "base_sha256": SHA,
        "reference": None,
        "init_from_checkpoint": None,
        "dataset_sha256": SHA,
        "group_size": 4,
        "seed": 0,
        "shuffle": True,
        "loss": PolicyLoss(kl_beta=0),
    }
    return RunFacts(**facts | changes)


def step_record(parent: StepRecord | None = None, **changes: Any) -> StepRecord:
    """Build the record of the step after `parent`: of one problem, saved, and exported."""
    step = 1 if parent is None else parent.step + 1
    made: dict[str, Any] = {
        "run_id": "run",
        "step": step,
        "parent_sha256": parent and parent.sha256,
        "facts": run_facts(),
        "state": StateRef(path=f"state-{step}", sha256=SHA),
        "checkpoint": ExportedCheckpoint(policy_version=step, content_sha256=SHA),
        "sampled_version": step - 1,
        "window_began": Cursor(done_before=step - 1),
        "window_size": 1,
        "groups": (TrainedGroups(part_sha256=SHA, problem_ids=("a",)),),
        "cursor": Cursor(done_before=step),
        "learning_rate": 1e-5,
        "figures": {"train/grad_norm": 0.1},
    }
    return StepRecord(**made | changes)
