"""What a user declares for a training run: the loop over cycles, and what each step is made with.

The Prefect UI shows these models as a form. What belongs to a trainer that a vendor hosts is
refused with what to set instead, so that a copied configuration cannot mislead.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from hotload.options import Problems, refuse_meaningless
from hotload.spec import CycleSpec
from hotload.trainers.refused_fields import REFUSED_TRAINING_FIELDS, REFUSED_TRAINING_PREFIXES
from hotload.trainers.trainer import TrainerFacts
from hotload.trainers.training_step import StepSettings
from hotload.training.policy_loss import PolicyLoss
from hotload.training.schedule import LearningRate
from hotload.training.settings import TrainerFunction, TrainingPart
from hotload.training.step_record import RunFacts
from hotload.training.windows import Windows

BY_THE_LOOP = "/by/the/loop"
"""Stands where the loop names the directory of each version."""
WITHOUT_RATIO = ("grpo", "reinforce")
"""Losses that are what their name says also where the policy is its anchor."""


class LoopCycle(CycleSpec):
    """The cycles of a loop, as they are declared once. What the loop sets is left out."""

    checkpoint: str = Field(BY_THE_LOOP, pattern=rf"^{BY_THE_LOOP}$")
    """Leave it out: each version is what the trainer exported."""
    policy_version: int = Field(0, ge=0, le=0)
    """Leave it out: it counts what was exported, from 0, the start weights, on."""
    line: int = Field(0, ge=0, le=0)
    """Leave it out: a run that goes on never uses a version twice."""
    problems: Problems
    """What to sample."""

    @model_validator(mode="after")
    def _leaves_the_windows_to_the_loop(self) -> Self:
        if self.cadence.weight_sync_interval != 1:
            raise ValueError(
                "cadence.weight_sync_interval counts versions, and each that is exported is "
                "published: set windows.weight_sync_interval, which counts optimizer steps"
            )
        if self.problems.prompt_groups_per_step is not None:
            raise ValueError("problems.prompt_groups_per_step: set windows.prompt_groups_per_step")
        if self.again is not None:
            raise ValueError("again: a loop samples each version once; remove it")
        return self


def with_default(data: Any, *places: str, value: Any) -> Any:
    """Fill in a field of nested parts, as they are given, where nothing is said."""
    if not isinstance(data, dict):
        return data
    place, *below = places
    if not below:
        return {place: value} | data
    return data | {place: with_default(data.get(place, {}), *below, value=value)}


class WindowCycle(LoopCycle):
    """The cycle of every window. What the loop sets is left out."""

    @model_validator(mode="before")
    @classmethod
    def _refills(cls, data: Any) -> Any:
        """Let a uniform group, which teaches nothing, be replaced unless it is said otherwise."""
        return with_default(data, "sampling", "groups", "on_uniform", value="refill")

    @model_validator(mode="after")
    def _samples_on_policy(self) -> Self:
        if self.sampling.max_head_offpolicy_versions:
            raise ValueError(
                "sampling.max_head_offpolicy_versions is above 0 only in an asynchronous loop, "
                "python -m flows.async_rl_loop; here windows.weight_sync_interval lets the trainer "
                "make several steps a version"
            )
        return self


class AheadCycle(LoopCycle):
    """The cycle of every version of an asynchronous loop. What the loop sets is left out."""

    @model_validator(mode="before")
    @classmethod
    def _is_ahead(cls, data: Any) -> Any:
        """Let the sampler be a version ahead unless it is said otherwise."""
        return with_default(data, "sampling", "max_head_offpolicy_versions", value=1)

    @model_validator(mode="after")
    def _fits_a_loop_ahead(self) -> Self:
        if not self.sampling.may_overlap:
            raise ValueError(
                "sampling.max_head_offpolicy_versions 0 samples no version beside another: set 1 "
                "or more, or run python -m flows.rl_loop"
            )
        if self.sampling.groups.on_uniform == "refill":
            raise ValueError(
                "sampling.groups.on_uniform refill has no effect: the next version's window has "
                "the groups that are missing; remove it"
            )
        return self


class TrainingSpec(TrainingPart):
    """A training run: windows of problems sampled by cycles, and optimizer steps beside them."""

    cycle: WindowCycle
    """The cycle of every window."""
    trainer: TrainerFunction
    """What is trained."""
    reference: TrainerFunction | None = None
    """Frozen weights that a KL holds the policy to. Empty is the trainer's function again, where
    `loss.kl_beta` is above 0."""
    windows: Windows = Windows()
    """How the run goes through the problems."""
    loss: PolicyLoss = PolicyLoss()
    """What the policy learns by."""
    schedule: LearningRate = LearningRate()
    """The learning rate of each step."""
    step: StepSettings = StepSettings()
    """How a step is made."""
    weight_sync_before_training: bool = True
    """Publish the start weights first. A cycle samples from weights that have a name, so it is
    always so; replicas that serve them already are adopted (`python -m flows --adopt`)."""
    dcp_save_interval: int = Field(1, ge=0, le=10**6)
    """A state every N optimizer steps, and after the last; started again, the run makes at most N-1
    steps again from their stored groups. 0 saves none, and all are made again."""
    keep_states: int | None = Field(None, ge=2, le=10**6)
    """The newest N states stay, with those that a resumption, a promoted version or a branch needs;
    older ones are removed once a newer one is recorded. Empty keeps all. docs/retention.md."""
    keep_states_every: int | None = Field(None, ge=1, le=10**6)
    """With `keep_states`: states of every M-th step stay, too."""
    init_from_checkpoint: str | None = Field(
        None, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}:[1-9][0-9]{0,8}$"
    )
    """`RUN:STEP`: begin with the state of a step of another run, its cursor left behind: a branch,
    which may be declared otherwise."""
    output_model_id: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
    """A name for the run's last version, given once; empty gives none. `python -m flows.rl_loop
    --promote` gives more."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_hosted(cls, data: Any) -> Any:
        if isinstance(data, dict):
            unknown = [name for name in data if name not in cls.model_fields]
            refuse_meaningless(unknown, REFUSED_TRAINING_FIELDS, REFUSED_TRAINING_PREFIXES)
        return data

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if not self.weight_sync_before_training:
            raise ValueError(
                "weight_sync_before_training: false would sample from weights without a name; if "
                "the replicas serve the start weights, adopt them: python -m flows --adopt"
            )
        if self.reference is not None and not self.loss.needs_reference:
            raise ValueError("reference has no effect with loss.kl_beta 0: remove it, or set it")
        size, centred = self.cycle.sampling.completions_per_prompt, self.cycle.reward.advantage
        if size < 2:
            raise ValueError(
                f"sampling.completions_per_prompt is {size}: a group's advantages are centred "
                f"({centred}), so those of one sample are 0; set 2 or more"
            )
        if self.keep_states_every is not None and self.keep_states is None:
            raise ValueError("keep_states_every has no effect without keep_states: all states stay")
        branch = self.init_from_checkpoint
        if branch is not None and branch.rpartition(":")[0] == self.cycle.run_id:
            raise ValueError("init_from_checkpoint names this run itself: choose another run_id")
        return self

    @property
    def without_effect(self) -> str | None:
        """Say what has no effect, though it may be declared; None where all acts."""
        loss, minibatches = self.loss, self.step.ppo_n_minibatches
        if loss.policy_loss in WITHOUT_RATIO or loss.anchor != "trainer" or minibatches > 1:
            return None
        return (
            f"loss.policy_loss {loss.policy_loss} has the gradient of grpo here, and nothing is "
            "clipped: with anchor trainer and step.ppo_n_minibatches 1 its ratio is 1 at every "
            "token. Set loss.anchor rollout, or more minibatches, for the ratio to act"
        )

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Groups of each chunk of a step, in order: its gradient is added when they are there."""
        return (self.windows.prompt_groups_per_step,)

    def facts(
        self, base: TrainerFacts, reference: TrainerFacts | None, dataset_sha256: str
    ) -> RunFacts:
        """State what must stay the same for the run to be the same run."""
        return RunFacts(
            base_model=base.model,
            base_sha256=base.base_sha256,
            reference=reference and (reference.base_sha256 or reference.model),
            init_from_checkpoint=self.init_from_checkpoint,
            dataset_sha256=dataset_sha256,
            group_size=self.cycle.sampling.completions_per_prompt,
            seed=self.windows.seed,
            shuffle=self.windows.shuffle,
            loss=self.loss,
        )

    @property
    def directory(self) -> Path:
        """Where the run keeps its own files on this machine."""
        return Path(self.cycle.work_dir) / "training" / self.cycle.run_id

    def checkpoint_of(self, policy_version: int) -> Path:
        """Name the directory of an exported version."""
        return self.directory / "checkpoints" / f"{policy_version:06d}"

    def problems_of(self, policy_version: int) -> Path:
        """Name the file with the problems that a version samples."""
        return self.directory / "windows" / f"{policy_version:06d}.jsonl"

    def cycle_of(self, policy_version: int, exported_version: int, **changes: Any) -> CycleSpec:
        """Declare the cycle of a version.

        Args:
            policy_version: where it is not the one that was exported last, nothing is published,
                and what is served is sampled.
            exported_version: the last one.
            changes: of `problems`.
        """
        declared = self.cycle.model_dump()
        is_new = policy_version == exported_version
        sampling = declared["sampling"]
        if "problems_per_task" not in self.cycle.sampling.model_fields_set:
            # A part is handed over when it is sampled: no step waits for the groups of the next.
            sampling = sampling | {"problems_per_task": self.windows.prompt_groups_per_step}
        own = {
            "checkpoint": str(self.checkpoint_of(exported_version)),
            "policy_version": policy_version,
            "problems": declared["problems"] | changes,
            "sampling": sampling,
            "cadence": declared["cadence"] | {"weight_sync_interval": int(is_new)},
        }
        return CycleSpec.model_validate(declared | own)


class AsyncTrainingSpec(TrainingSpec):
    """A training run in which sampler and trainer wait for each other only at the staleness bound,
    `sampling.max_head_offpolicy_versions` of the cycle."""

    cycle: AheadCycle  # type: ignore[assignment]
    """The cycle of every version."""
    loss: PolicyLoss = PolicyLoss(anchor="rollout")
    """What the policy learns by. The ratio is taken against the rollout's log-probabilities unless
    it is said otherwise, so that its clipping acts on what older weights sampled."""
    pipeline_chunks_per_step: int = Field(1, ge=1, le=1024)
    """K: a step's groups are trained on in so many chunks, each as soon as it is there; one
    optimizer step follows."""

    @model_validator(mode="before")
    @classmethod
    def _anchors_at_the_rollout(cls, data: Any) -> Any:
        return with_default(data, "loss", "anchor", value="rollout")

    @model_validator(mode="after")
    def _fits_ahead(self) -> Self:
        if self.windows.weight_sync_interval != 1:
            raise ValueError(
                "windows.weight_sync_interval: every step of an asynchronous loop publishes; "
                "remove it"
            )
        chunks, groups = self.pipeline_chunks_per_step, self.windows.prompt_groups_per_step
        if chunks > groups:
            raise ValueError(
                f"pipeline_chunks_per_step is {chunks}, and a step has {groups} groups: set at "
                f"most {groups}"
            )
        if chunks > 1 and (self.step.ppo_n_minibatches > 1 or self.loss.kl == "reward"):
            raise ValueError(
                "pipeline_chunks_per_step above 1 trains before all groups are there, which "
                "step.ppo_n_minibatches above 1 and loss.kl reward need: set it to 1"
            )
        return self

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Groups of each chunk of a step, in order."""
        count, chunks = self.windows.prompt_groups_per_step, self.pipeline_chunks_per_step
        ends = [count * number // chunks for number in range(chunks + 1)]
        return tuple(end - start for start, end in pairwise(ends))

    @property
    def groups_ahead(self) -> int:
        """Count the groups that may be live, sampled or being sampled and not trained."""
        versions = self.cycle.sampling.max_head_offpolicy_versions + 1
        return versions * self.windows.prompt_groups_per_step

    def cycle_of(self, policy_version: int, exported_version: int, **changes: Any) -> CycleSpec:
        """Declare the cycle of a version; what it samples is written by the chunk."""
        cycle = super().cycle_of(policy_version, exported_version, **changes)
        size = min(cycle.sampling.problems_per_task, max(self.chunk_sizes))
        sampling = cycle.sampling.model_copy(update={"problems_per_task": size})
        return cycle.model_copy(update={"sampling": sampling})
