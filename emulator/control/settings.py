"""What an emulator is started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agent.fleet.settings import FleetConfig


@dataclass(frozen=True, kw_only=True)
class EmulatorConfig(FleetConfig):
    """Everything an emulator needs to know; times in seconds of its own clock.

    With `clock="ticks"` that clock moves only by `POST /emulator/tick`, so that a test decides when
    a replica goes on to its next state. `chain_error`, `sync_new_requests`, `hint_status_code` and
    `reject_reset_prompt_cache` answer as one chooses what no public source settles (protocol §4,
    §6, §9). `dialect` chooses the door (protocol §22, §23); with `base_identity` the base
    weights have that name there, and no other full snapshot is taken. So many adapters as there are
    `adapter_slots` are loaded side by side (protocol §10).
    """

    base_model: Path
    replica_count: int = 3
    port: int = 0
    engine: Literal["numpy", "stub", "transformers"] = "numpy"
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
    base_identity: str | None = None

    @property
    def base(self) -> str:
        """Resource name of the base model, as the deployment shows it."""
        return self.base_model_name or f"accounts/fireworks/models/{self.base_model.resolve().name}"
