"""What an emulator is started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hotload.publish.api_dialect import API_DIALECTS, ApiDialect, ApiDialectName
from hotload.publish.fireworks_names import deployment_name, model_name


@dataclass(frozen=True)
class EmulatorConfig:
    """Everything an emulator needs to know; times in seconds of its own clock.

    With `clock="ticks"` that clock moves only by `POST /emulator/tick`, so that a test decides when
    a replica goes on to its next state. `chain_error`, `sync_new_requests`, `hint_status_code` and
    `reject_reset_prompt_cache` answer as one chooses what no public source settles (protocol §4,
    §6, §9). `dialect` chooses the door (protocol §22); with `base_identity` the base weights have
    that name there, and no other full snapshot is taken. So many adapters as there are
    `adapter_slots` are loaded side by side (protocol §10).
    """

    bucket: str
    base_model: Path
    bucket_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    bucket_type: str = "S3"
    base_model_name: str | None = None
    replica_count: int = 3
    port: int = 0
    engine: Literal["numpy", "stub", "transformers"] = "numpy"
    api_key: str | None = field(default=None, repr=False)
    account_id: str = "local"
    model_id: str = "policy"
    deployment_id: str = "rollouts"
    transition: Literal["ASYNC", "SYNC"] = "ASYNC"
    faults: tuple[Mapping[str, Any], ...] = ()
    work_dir: Path | None = None
    clock: Literal["real", "ticks"] = "real"
    seconds_per_state: float = 0.0
    seconds_per_token: float = 0.0
    latency_seconds: float = 0.0
    startup_seconds: float = 0.0
    chain_error: Literal["400", "409", "load_error"] = "400"
    sync_new_requests: Literal["reject", "queue"] = "reject"
    hint_status_code: Literal[200, 400, 404, 500] = 200
    reject_reset_prompt_cache: bool = False
    adapter_slots: int = 1
    dialect: ApiDialectName = "fireworks"
    base_identity: str | None = None

    @property
    def api(self) -> ApiDialect:
        """How the door spells headers, names, paths and formats."""
        return API_DIALECTS[self.dialect]

    @property
    def model(self) -> str:
        """Name of the model at this door."""
        if not self.api.names_are_resources:
            return self.model_id
        return model_name(self.account_id, self.model_id)

    @property
    def deployment(self) -> str:
        """Name of the service at this door."""
        if not self.api.names_are_resources:
            return self.deployment_id
        return deployment_name(self.account_id, self.deployment_id)

    @property
    def base(self) -> str:
        """Resource name of the base model, as the deployment shows it."""
        return self.base_model_name or f"accounts/fireworks/models/{self.base_model.resolve().name}"
