"""The parts of what a user declares for one cycle. The Prefect UI shows these models as a form.

Names and defaults of what is offered are those of protocol §20; every field says its unit. Fields
that mean something to a vendor-side trainer and nothing here are refused with the reason, so that a
copied configuration cannot mislead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    field_validator,
    model_validator,
)

TRAINER_OWNED = "your trainer owns its own training; remove the field"
VENDOR_TRAINER = "it belongs to the vendor's own trainer, which does not run here; remove the field"
REFUSED_FIELDS = {
    "training_shape": VENDOR_TRAINER,
    "training_shape_id": VENDOR_TRAINER,
    "reference_trainer": VENDOR_TRAINER,
    "ref_training_shape_id": VENDOR_TRAINER,
    "job_id": VENDOR_TRAINER,
    "policy_job_id": VENDOR_TRAINER,
    "hot_load_trainer_job": "the bucket is yours: set the store's url instead",
    "weight_sync_scope": "choose services by name: `service`, and `other_services` beside it",
    "reattach_settle_timeout_s": VENDOR_TRAINER,
    "helm_args": "the service exists beforehand; hotload never creates one",
    "extra_args": "the service exists beforehand; hotload never creates one",
    "infra": "the service exists beforehand; hotload never creates one",
    "compression_format": "deltas are always arc_v2; remove the field",
    "checksum_format": "deltas always carry Adler-32; remove the field",
    "weight_sync": "its settings are fields of `cadence` and `readiness` here",
    "epochs": "one cycle samples one version; `prompt_groups_per_step` walks through the file",
    "learning_rate": TRAINER_OWNED,
    "optimizer": TRAINER_OWNED,
    "loss": TRAINER_OWNED,
    "kl_beta": TRAINER_OWNED,
    "eps_clip": TRAINER_OWNED,
}
REFUSED_PREFIXES = {"dcp_": VENDOR_TRAINER}

WINDOW_LIMIT = 4096
NODE_NAME = r"^[A-Za-z0-9][\w-]{0,63}$"
NodeName = Annotated[str, Field(pattern=NODE_NAME)]


def one_line_descriptions(schema: dict[str, Any]) -> None:
    """Fold the descriptions of a form: the UI makes a paragraph of every line break in one."""
    for field in schema.get("properties", {}).values():
        if "description" in field:
            field["description"] = " ".join(field["description"].split())


def refuse_meaningless(
    names: Iterable[object], fields: Mapping[str, str], prefixes: Mapping[str, str]
) -> None:
    """Refuse what means something elsewhere and nothing here, by its name or what that begins with.

    Raises:
        ValueError: with the reason, as the mappings have it.
    """
    for name in map(str, names):
        by_prefix = (why for prefix, why in prefixes.items() if name.startswith(prefix))
        if reason := fields.get(name) or next(by_prefix, None):
            raise ValueError(f"{name} has no meaning here: {reason}")


class Declared(BaseModel):
    """A frozen part of a cycle's declaration; unknown fields are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        json_schema_extra=one_line_descriptions,
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_meaningless(cls, data: Any) -> Any:
        if isinstance(data, dict):
            refuse_meaningless(data, REFUSED_FIELDS, REFUSED_PREFIXES)
        return data


class Cadence(Declared):
    """When to publish, and when a full snapshot is due."""

    weight_sync_interval: int = Field(1, ge=0)
    """Publish every N-th policy version; 0 publishes never. The first snapshot is always
    published."""
    full_every: int = Field(20, ge=1, le=128)
    """A full snapshot at least every N publications. The vendor advises 20 to 30."""
    force_full: bool = False
    """Publish a full snapshot this time, whatever the chain allows."""


class LedgerReset(StrEnum):
    """Whether the last rung of the fallback ladder may reset the service's ledger."""

    NEVER = "never"
    ON_FAILURE = "on_failure"


class SnapshotOptions(Declared):
    """How snapshots are checked, and what is tried when they fail."""

    spec_dtype_style: Literal["torch", "safetensors"] = "torch"
    """Spelling of dtypes in model.weight.spec.json: `bfloat16` or `BF16`."""
    ledger_reset: LedgerReset = LedgerReset.NEVER
    """Reset the service's ledger when two full snapshots have failed, then try one more."""
    trust_digests: bool = False
    """Take the SHA-256 of shards from SHA256SUMS beside them, instead of reading them for it. The
    trainer vouches for it: a wrong one is not found before the next full snapshot."""
    link_baseline: bool = False
    """Keep the trainer's files as the baseline by hard link. The trainer promises never to write
    into a file of a published checkpoint again; removing them is fine."""


class ReadinessPolicy(Declared):
    """When a snapshot counts as served."""

    weight_sync_timeout: float = Field(600, gt=0, le=86_400)
    """Seconds from the signal until every replica must serve the snapshot."""
    poll_interval_seconds: float = Field(5, gt=0, le=300)
    """Seconds between two looks at the service's status."""
    scale_up_timeout_seconds: float = Field(300, ge=0, le=86_400)
    """Seconds to wait for a first replica before the first signal."""
    min_ready_fraction: float = Field(1.0, gt=0, le=1)
    """Share of the replicas that must serve the snapshot before rollouts begin. Below 1 is
    off-policy."""
    replica_count: int | None = Field(None, ge=1, le=10_000)
    """Replicas expected; empty asks the service's description."""
    probe_sessions: int = Field(0, ge=0, le=256)
    """After a load, sessions at most in which fixed tokens' log-probabilities are asked for, until
    every replica has answered; a replica that differs has not loaded. 0 asks none."""
    probe_tolerance: float = Field(0.05, gt=0, le=10)
    """Nats a token by which replicas, and the trainer's probe.json, may differ on average."""
    warmup_after_hotload: bool = True
    """Send small requests after a load, since the first ones may be slow. Never fatal."""
    warmup_max_retries: int = Field(10, ge=0, le=100)
    """Warm-up requests at most."""


class Concurrency(Declared):
    """How many samples are in flight."""

    mode: Literal["adaptive", "fixed"] = "adaptive"
    """Adaptive grows and shrinks the window by the service's load; fixed keeps `initial_window`."""
    initial_window: int | None = Field(None, ge=1, le=WINDOW_LIMIT)
    """Samples in flight at first; empty is 8 per replica."""
    min_window: int = Field(1, ge=1, le=WINDOW_LIMIT)
    """The adaptive window never shrinks below this."""
    max_window: int = Field(256, ge=1, le=WINDOW_LIMIT)
    """The adaptive window never grows beyond this."""
    prefill_queue_target: float = Field(0.5, gt=0, le=60)
    """Seconds a request should wait in the service's prefill queue."""
    rollout_adjustment_interval: int = Field(32, ge=1, le=10_000)
    """Completed attempts between two adjustments of the window."""

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, data: Any) -> Any:
        if isinstance(data, dict) and "max_concurrency" in data:
            rest = {name: value for name, value in data.items() if name != "max_concurrency"}
            if rest:
                raise ValueError(
                    "max_concurrency stands alone: it means mode=fixed with that window"
                )
            return {"mode": "fixed", "initial_window": data["max_concurrency"]}
        return data

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min_window > self.max_window:
            raise ValueError("min_window is above max_window")
        return self


def _function_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        raise ValueError("expected `package.module:function`")
    return name


FunctionName = Annotated[str, Field(min_length=3, max_length=256), AfterValidator(_function_name)]


class RolloutFunction(Declared):
    """A rollout of more than one turn, in the user's own code."""

    name: FunctionName
    """`package.module:function`: `async def rollout(problem, sampler)`, returning a Trajectory, a
    list of Segments, or None to skip the sample."""
    arguments: dict[str, JsonValue] = {}
    """Keyword arguments for the function. Everybody who may look at the server sees them."""
    turn_timeout_seconds: float = Field(600, gt=0, le=86_400)
    """Seconds one turn may take from when it is first sent, retries included; the wait for a slot
    of our own window before that does not count."""
    trajectory_timeout_seconds: float = Field(3600, gt=0, le=86_400)
    """Seconds a whole trajectory may take, waits for a slot included; beyond, the sample is
    marked."""


class Groups(Declared):
    """When a group of samples counts, and what becomes of one that does not (protocol §16)."""

    min_group_size: int = Field(1, ge=1, le=1024)
    """Scored samples a group needs at least."""
    on_incomplete: Literal["fail_group", "refill", "accept_partial"] = "refill"
    """What becomes of a group with fewer samples than asked for: marked and not used; sampled again
    up to `max_incomplete_group_retries` times, then marked; or used as it is if it has
    `min_group_size`."""
    max_incomplete_group_retries: int = Field(0, ge=0, le=16)
    """Times the missing samples of a group are asked for again."""
    on_uniform: Literal["keep", "drop", "refill"] = "keep"
    """What becomes of a group whose rewards are all equal, so that it teaches nothing: kept and
    marked; dropped and counted; or dropped and the next row of the file sampled instead."""
    on_straddling: Literal["accept", "drop", "mask_from_change"] = "accept"
    """What becomes of a sample made by two versions of the weights: kept and marked; dropped; or
    its tokens from the change on are masked out of the loss."""
    hedge_after_seconds: float | None = Field(None, gt=0, le=86_400)
    """Ask a second time for the one sample a group still waits for after so many seconds; the first
    answer counts. Empty never does."""
    deadline_seconds: float | None = Field(None, gt=0, le=86_400)
    """Seconds a group may take once it is begun, waits for a slot included; what is missing then is
    marked. Empty is no limit."""


class Sampling(Declared):
    """How every problem is sampled."""

    completions_per_prompt: int = Field(4, ge=1, le=1024)
    """G: samples per problem."""
    max_completion_tokens: int = Field(1024, ge=1, le=1_000_000)
    """Tokens a sample may have at most."""
    max_seq_len: int | None = Field(None, ge=2)
    """Tokens of prompt and completion together at most; longer samples are dropped and counted."""
    temperature: float = Field(1.0, ge=0, le=2)
    """Sampling temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus share; 1 leaves the policy's distribution whole."""
    top_k: int = Field(0, ge=0, le=100)
    """Highest-ranked tokens to choose from; 0 is all."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Run seed; every sample's own seed is made from it, the problem, the policy version and its
    number."""
    stop: tuple[str, ...] = Field((), max_length=4)
    """Texts that end a sample; they are not returned."""
    sample_timeout: float = Field(600, gt=0, le=86_400)
    """Seconds to wait for the next bytes of a sample."""
    concurrency: Concurrency = Concurrency()
    """How many samples are in flight."""
    problems_per_task: int = Field(64, ge=1, le=10_000)
    """Problems one task samples; at least so many that a cycle has no more than 50 such tasks."""
    processes: int = Field(1, ge=1, le=64)
    """Processes that share the tasks, each with an event loop and a share of the window; 1 samples
    in the cycle's own process. Worth it where one core is busy with thousands of samples."""
    nodes: tuple[NodeName, ...] = Field((), max_length=64)
    """Names of nodes that share the tasks, each with `processes` of its own and a share of the
    window; empty samples where the cycle runs."""
    rollout: RolloutFunction | None = None
    """A rollout function of yours for more than one turn; empty samples each problem once."""
    groups: Groups = Groups()
    """When a group of samples counts."""
    max_head_offpolicy_versions: int = Field(0, ge=0, le=1000)
    """O: how many versions the service may be ahead of the one a group was asked for. Above 0, the
    next cycle may publish while this one still samples."""
    include_routing_matrix: bool = False
    """Ask for the experts each token was sent to, for a trainer with router replay
    (mixture-of-experts models)."""

    @property
    def may_overlap(self) -> bool:
        """Whether the next cycle may publish while this one samples."""
        return self.max_head_offpolicy_versions > 0

    @model_validator(mode="after")
    def _has_room_for_its_quorum(self) -> Self:
        if self.groups.min_group_size > self.completions_per_prompt:
            problem = f"{self.groups.min_group_size} is above completions_per_prompt"
            raise ValueError(f"groups.min_group_size {problem} {self.completions_per_prompt}")
        return self

    @model_validator(mode="after")
    def _names_no_node_twice(self) -> Self:
        if len(set(self.nodes)) < len(self.nodes):
            raise ValueError(f"nodes: {', '.join(self.nodes)}: name each once")
        return self


class Problems(Declared):
    """Where the problems come from."""

    dataset: str = Field(min_length=1)
    """Absolute path or URL (file://, s3://, gs://, hf://, …) of a file, of files (`train-*`), or of
    a directory of shards: JSON lines, a JSON array, Parquet or Arrow, plain, .gz or .zst."""
    prompt_field: str | None = Field(None, min_length=1, max_length=128)
    """Field with the prompt: text, token ids or messages. Empty is `prompt` or `messages`."""
    answer_field: str = Field("answer", min_length=1, max_length=128)
    """Field with the answer; `reward_model.ground_truth` is a field within a field."""
    max_rows: int | None = Field(None, ge=1)
    """Use the first N rows only."""
    prompt_groups_per_step: int | None = Field(None, ge=1)
    """P: problems per cycle. Each policy version takes the next P rows and begins again at the end;
    empty is all rows every time."""


class RewardSpec(Declared):
    """What scores a sample."""

    name: str = Field("exact_match", min_length=1, max_length=256)
    """A built-in reward; `weighted_sum` of several; `remote` for a service over HTTP; or
    `package.module:function` of yours, plain or async, called with (problem, trajectory), returning
    a number or a mapping of named parts."""
    arguments: dict[str, JsonValue] = {}
    """Keyword arguments for the reward. Everybody who may look at the server sees them: a key of a
    judge belongs in the worker's environment."""
    environment: tuple[str, ...] = Field((), max_length=32)
    """Variables of a cloud that your reward may read (AWS_…, GOOGLE_…, AZURE_…); without being
    named they are withheld from it."""
    timeout_seconds: float = Field(10, gt=0, le=3600)
    """Seconds one call may take; beyond, the sample is marked and its worker ended."""
    per_group: bool = False
    """Call it once a group, with (problem, trajectories), for a list of what it returns for each.
    Samples that failed are not among them."""
    advantage: Literal["grpo", "leave_one_out", "mean_only"] = "grpo"
    """Reward to advantage within a group: centred and divided by the standard deviation; centred on
    the mean of the others; or centred alone."""

    @field_validator("name")
    @classmethod
    def _form(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z_][\w.]*(:[A-Za-z_]\w*)?", name):
            raise ValueError("expected a built-in name or `package.module:function`")
        return name


class Prices(Declared):
    """What publishing costs, in any currency. Without a price, money is neither shown nor compared;
    with one, those that are left out are 0."""

    per_gb_egress: float | None = Field(None, ge=0, le=1e6, allow_inf_nan=False)
    """Of 10^9 bytes that a replica fetches from the store."""
    per_gb_month: float | None = Field(None, ge=0, le=1e6, allow_inf_nan=False)
    """Of 10^9 bytes stored for a month."""
    per_hour_waited: float | None = Field(None, ge=0, le=1e6, allow_inf_nan=False)
    """Of an hour from the first encoded byte until every replica serves: trainer and replicas that
    wait."""


class Wandb(Declared):
    """A run at Weights & Biases that gets every cycle's metrics, and in a loop one beside it with
    the figures of every step; off unless `entity` is given. Its package and WANDB_API_KEY belong in
    the worker's environment."""

    entity: str | None = Field(None, min_length=1, max_length=128)
    """User or team the run belongs to."""
    project: str = Field("hotload", min_length=1, max_length=128)
    """Project the run belongs to."""
    run_name: str | None = Field(None, min_length=1, max_length=128)
    """Name of the run; empty is the run id."""
