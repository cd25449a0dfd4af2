"""What one optimizer step used and made. Written after everything it names, only if absent, and
never changed: a reader may rely on it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, Field, JsonValue, model_validator

from hotload.dataset.logprob_drift import Finite
from hotload.errors import StoreError
from hotload.identity import cycle_name
from hotload.records import Record, Sha256, schema_number_of
from hotload.training.policy_loss import PolicyLoss
from hotload.training.settings import Label, StateRef
from hotload.training.windows import Cursor, OpenWindow

STEP_RECORD_LIMIT_BYTES = 16 << 20
STEP_SCHEMA = 1
WAY_ON = (
    "whoever keeps the store acts: bring the record back as it was written, or branch off a step "
    "whose record is whole, by init_from_checkpoint under another run_id"
)


class ExportedCheckpoint(Record):
    """Names the weights that a step exported, as policy version of its run."""

    policy_version: int = Field(ge=0, lt=10**9)
    content_sha256: Sha256


class TrainedGroups(Record):
    """Groups of one part of a rollout, in the order they were trained in."""

    part_sha256: Sha256
    problem_ids: tuple[Annotated[str, Field(max_length=256)], ...] = Field(min_length=1)
    sampled_version: int | None = Field(None, ge=0, lt=10**9)
    """The policy version whose cycle sampled them, where a step has groups of several; else that of
    the record."""


class RunFacts(Record):
    """What must stay the same for a run to be the same run."""

    base_model: Label
    """Its name, which counts where there is no digest: a path may end in any."""
    base_sha256: Sha256 | None
    """Of its weights, as the trainer says; None where a service keeps them."""
    reference: Label | None
    """The weights that a KL holds the policy to: their digest, else their name."""
    init_from_checkpoint: Label | None
    dataset_sha256: Sha256
    group_size: int = Field(ge=1, le=1024)
    seed: int = Field(ge=0, lt=2**31)
    shuffle: bool
    loss: PolicyLoss
    """With every value in force."""


class StepRecord(Record):
    """One optimizer step of a run."""

    schema_number: Literal[1] = 1
    run_id: Annotated[str, Field(min_length=1, max_length=96)]
    step: int = Field(ge=1, lt=10**9)
    """Counts from 1."""
    parent_sha256: Sha256 | None
    """Digest of the record of the step before; none for the first."""
    facts: RunFacts
    state: StateRef | None
    """None where none was saved after this step."""
    checkpoint: ExportedCheckpoint | None
    """None within a window."""
    sampled_version: int = Field(ge=0, lt=10**9)
    """The policy version whose cycle sampled the groups; the oldest, of several."""
    window_began: Cursor
    """When the window began that the groups are of; the oldest, of several."""
    window_size: int = Field(ge=1)
    """The problems of that window."""
    groups: tuple[TrainedGroups, ...]
    """None in a record that closes a run: it saves and exports what the steps before it made."""
    cursor: Cursor
    """After the step; in an asynchronous loop, where the next window begins."""
    open_windows: tuple[OpenWindow, ...] = Field((), max_length=2048)
    """In an asynchronous loop: those of which groups may still come or are to be acknowledged, and
    last the one that is sampled from the exported version."""
    learning_rate: float = Field(ge=0, allow_inf_nan=False)
    """0 where nothing was trained on."""
    trainer: Mapping[str, JsonValue] = Field({}, max_length=256)
    """What the trainer says of itself."""
    figures: Mapping[str, Finite] = Field({}, max_length=1024)
    trained_at: AwareDatetime | None = None
    """When the weights had changed."""

    @model_validator(mode="after")
    def _follows(self) -> Self:
        cycle_name(self.run_id, 0)
        if (self.parent_sha256 is None) != (self.step == 1):
            raise ValueError("the first step, and only the first, has no parent")
        return self

    def render(self) -> bytes:
        """Write it as JSON, stable field order; `parse` reads it back."""
        return self.model_dump_json(indent=1).encode()

    def trained_from(self, policy_version: int) -> set[str]:
        """Name the problems of its groups that the cycle of a version sampled."""
        return {
            problem
            for part in self.groups
            for problem in part.problem_ids
            if policy_version
            == (self.sampled_version if part.sampled_version is None else part.sampled_version)
        }

    @property
    def sha256(self) -> str:
        """Digest of the record as written: what the next step names as its parent."""
        return hashlib.sha256(self.render()).hexdigest()

    @classmethod
    def parse(cls, data: bytes, *, path: str) -> StepRecord:
        """Read the record in `data`, which was stored at `path`.

        Raises:
            StoreError: too large, no step record, or one of a newer version of this program.
        """
        if len(data) > STEP_RECORD_LIMIT_BYTES:
            found = f"{len(data)} bytes, expected at most {STEP_RECORD_LIMIT_BYTES}"
            raise StoreError(path, f"not a step record: {found}; {WAY_ON}")
        if (number := schema_number_of(data)) > STEP_SCHEMA:
            raise StoreError(
                path,
                f"step record with schema number {number}, this program reads {STEP_SCHEMA}: "
                "resume with the newer version that wrote it",
            )
        try:
            return cls.parse_stored(data, path)
        except StoreError as error:
            raise StoreError(path, f"{error.reason}; {WAY_ON}") from None


class Promotion(Record):
    """Names a published version of a run as its result, for good."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")
    run_id: str
    step: int = Field(ge=1)
    policy_version: int = Field(ge=0)
    identity: str
    """What was published of it."""
    content_sha256: Sha256
