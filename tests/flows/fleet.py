"""A fleet of emulated replicas with a bucket, checkpoints, problems and saved blocks of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prefect.blocks.core import Block

from blocks.account import InferenceAccount
from blocks.checkpoint_store import CheckpointStore
from blocks.hot_load_service import HotLoadService
from blocks.rollout_client import RolloutClient
from emulator.control.settings import EmulatorConfig
from hotload.report.cycle_report import CycleReport
from hotload.spec import CycleSpec
from tests.servers import serve
from tests.waiting import PATIENCE_SECONDS

API_KEY = "key-that-must-not-be-shown"
NAMES = {"account_id": "local", "model_id": "policy", "deployment_id": "rollouts"}
SERVICE = "local/rollouts"
REPLICAS = 2


@dataclass(frozen=True)
class Fleet:
    """One running service; `name` is the name of its three saved blocks."""

    name: str
    url: str
    root: Path
    checkpoints: list[Path]
    names: Mapping[str, str] = field(default_factory=lambda: NAMES)

    @property
    def bucket(self) -> Path:
        """The store as a local directory."""
        return self.root / "bucket"

    def declared(self, version: int, **changes: Any) -> dict[str, Any]:
        """A cycle as JSON: policy `version` of run `run`; `changes` replace its fields."""
        return {
            "checkpoint": str(self.checkpoints[version]),
            "run_id": "run",
            "policy_version": version,
            "service": self.name,
            "store": self.name,
            "rollouts": self.name,
            "work_dir": str(self.root / "work"),
            "problems": {"dataset": str(self.root / "problems.jsonl")},
            "readiness": {"poll_interval_seconds": 0.05, "warmup_after_hotload": False},
            "sampling": {"completions_per_prompt": 2, "max_completion_tokens": 4},
            "reward": {"name": "examples.rewards:letters"},
            **changes,
        }

    def spec(self, version: int, **changes: Any) -> CycleSpec:
        """The same, checked."""
        return CycleSpec.model_validate(self.declared(version, **changes))

    def blocks(self) -> list[Block]:
        """The three blocks, not yet saved."""
        account = InferenceAccount(base_url=self.url, api_key=API_KEY, **self.names)
        return [
            HotLoadService(account=account),
            CheckpointStore(url=self.bucket.as_uri()),
            RolloutClient(account=account),
        ]

    def served(self) -> set[str | None]:
        """The identities that the replicas serve now, as the service says."""
        return {replica["current_snapshot_identity"] for replica in self.replicas()}

    def replicas(self) -> list[dict[str, Any]]:
        """The service's status, replica by replica, in the vendor's form."""
        headers = {
            "Authorization": f"Bearer {API_KEY}",
            "fireworks-model": "accounts/local/models/policy",
            "fireworks-deployment": f"accounts/local/deployments/{self.names['deployment_id']}",
        }
        found = httpx.get(
            f"{self.url}/hot_load/v1/models/hot_load", headers=headers, timeout=PATIENCE_SECONDS
        )
        return found.raise_for_status().json()["replicas"]

    def log(self) -> dict[str, Any]:
        """What the emulator saw: requests, signals, hints, client_bugs, applications by replica."""
        return (
            httpx.get(f"{self.url}/emulator/log", timeout=PATIENCE_SECONDS)
            .raise_for_status()
            .json()
        )

    def samples_asked(self) -> list[dict[str, Any]]:
        """The records of requests for samples: the others, as the preflight's, have no session."""
        return [each for each in self.log()["requests"] if each["session"]]

    def fault(self, **order: Any) -> None:
        """Order a fault of protocol §21."""
        httpx.post(
            f"{self.url}/emulator/faults", json=order, timeout=PATIENCE_SECONDS
        ).raise_for_status()

    def clear_faults(self) -> None:
        """Take back every fault that was ordered."""
        httpx.delete(f"{self.url}/emulator/faults", timeout=PATIENCE_SECONDS).raise_for_status()

    def change_replicas(self, **order: Any) -> None:
        """Add, remove or restart a replica."""
        httpx.post(
            f"{self.url}/emulator/replicas", json=order, timeout=PATIENCE_SECONDS
        ).raise_for_status()

    def tick(self, seconds: float) -> None:
        """Let time pass for an emulator with `clock="ticks"`."""
        httpx.post(
            f"{self.url}/emulator/tick", json={"seconds": seconds}, timeout=PATIENCE_SECONDS
        ).raise_for_status()

    def orders(self) -> list[dict[str, Any]]:
        """The faults that are still to strike."""
        faults = (
            httpx.get(f"{self.url}/emulator/faults", timeout=PATIENCE_SECONDS)
            .raise_for_status()
            .json()["faults"]
        )
        return [fault for fault in faults if fault["left"] != 0]

    def reports(self) -> list[CycleReport]:
        """What the ended cycles left in the store, by name."""
        found = sorted((self.bucket / "_hotload" / "reports").glob("*.json"))
        return [CycleReport.model_validate_json(path.read_bytes()) for path in found]

    def leases(self) -> list[dict[str, Any]]:
        """The publisher's leases that lie in the store, given back or not."""
        found = sorted((self.bucket / "_hotload" / "leases").rglob("*.json"))
        return [json.loads(path.read_bytes()) for path in found]


@contextmanager
def running_fleet(
    name: str, root: Path, checkpoints: list[Path], **settings: Any
) -> Iterator[Fleet]:
    """A fleet in `root`, its emulator in a thread; `settings` are fields of EmulatorConfig."""
    (root / "bucket").mkdir()
    problems = ({"id": f"sum-{n}", "prompt": f"{n} + 1 = ", "answer": str(n + 1)} for n in range(4))
    (root / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    config = EmulatorConfig(
        **{
            "bucket": (root / "bucket").as_uri(),
            "base_model": checkpoints[0],
            "replica_count": REPLICAS,
            "api_key": API_KEY,
            **NAMES,
            **settings,
        }
    )
    with serve(config) as emulator:
        yield Fleet(name, emulator.url, root, checkpoints)


async def save_blocks(fleet: Fleet) -> None:
    """Save the fleet's blocks on the Prefect server, under the fleet's name."""
    for block in fleet.blocks():
        await block.save(fleet.name, overwrite=True)
