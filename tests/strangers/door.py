"""The services here as a client of others finds them, and the snapshots they are given."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np

from tests.servers import ROOT

KEY = "right"
NAME = "rollouts"
RANK = 2


class Door:
    """A running emulator, its bucket, and the names a client needs."""

    def __init__(self, url: str, bucket: Path, transition: str) -> None:
        self.url, self.bucket, self.transition = url, bucket, transition
        self.model = "accounts/local/models/policy"
        self.deployment = "accounts/local/deployments/rollouts"

    def fault(self, name: str, **parameters: Any) -> None:
        self._ask("POST", "/emulator/faults", {"fault": name, **parameters})

    def tick(self, seconds: float = 0) -> None:
        self._ask("POST", "/emulator/tick", {"seconds": seconds})

    def log(self) -> dict[str, Any]:
        return self._ask("GET", "/emulator/log")

    def served(self) -> list[str | None]:
        """What the replicas serve, asked as the SDK does not: of all, with a mark where one is not
        ready."""
        names = {"fireworks-model": self.model, "fireworks-deployment": self.deployment}
        replicas = self._ask("GET", "/hot_load/v1/models/hot_load", **names)["replicas"]
        return [
            replica["current_snapshot_identity"] if replica["readiness"] else "not ready"
            for replica in replicas
        ]

    def ledger(self, method: str) -> dict[str, Any]:
        """Operations D and E, which the SDK has no method for."""
        return self._ask(method, f"/v1/{self.deployment}/ledger")

    def _ask(self, method: str, path: str, body: object = None, **headers: str) -> Any:
        """The standard library's client: what we ask is not counted with what the others do."""
        headers |= {"Authorization": f"Bearer {KEY}"}
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, headers, method=method)
        with build_opener(ProxyHandler({})).open(request, timeout=60) as answer:
            return json.load(answer)


class AgentsDoor(Door):
    """A running door over agents, and the addresses of the engines beside those."""

    def __init__(self, url: str, bucket: Path, transition: str, engines: list[str]) -> None:
        super().__init__(url, bucket, transition)
        self._engines = engines

    def sampled(self) -> list[dict[str, str]]:
        """The digest of every shard that each engine samples from."""
        found = []
        for url in self._engines:
            with build_opener(ProxyHandler({})).open(f"{url}/sample", timeout=60) as answer:
                found.append(json.load(answer)["serves"])
        return found


def digests(checkpoint: Path) -> dict[str, str]:
    """The same of a checkpoint."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in checkpoint.glob("*.safetensors")
    }


class SnapshotTrainer:
    """Stands for the vendor's training client: its steps are our checkpoints, its deltas ours."""

    def __init__(self, ours: str, checkpoints: list[Path], bucket: Path) -> None:
        self._ours, self._checkpoints, self._bucket = ours, checkpoints, bucket
        self._version = 0

    def save_weights_for_sampler_ext(self, name: str, checkpoint_type: str) -> SimpleNamespace:
        """Write the next version into the bucket, whole or as a delta to the one before."""
        self._version += 1
        before, now = self._checkpoints[self._version - 1 : self._version + 1]
        identity = f"{name}-{self._version:08x}"
        if checkpoint_type == "base":
            shutil.copytree(now, self._bucket / identity)
        else:
            command = [self._ours, "-m", "hotload", "encode", before, now, self._bucket / identity]
            subprocess.run([*command, "--dialect", "fireworks"], cwd=ROOT, check=True)
        return SimpleNamespace(snapshot_name=identity)


class AdapterTrainer:
    """The same for LoRA: each save is an adapter of the first layer's query projection."""

    def __init__(self, base: Path, bucket: Path) -> None:
        self._base, self._bucket = base, bucket
        self._random = np.random.default_rng(3)

    def save_weights_for_sampler_ext(self, name: str, checkpoint_type: str) -> SimpleNamespace:
        """Write an adapter into the bucket; `checkpoint_type` is always "base"."""
        assert checkpoint_type == "base"
        config = json.loads((self._base / "config.json").read_text())
        hidden, directory = config["hidden_size"], self._bucket / name
        stem = "base_model.model.model.layers.0.self_attn.q_proj"
        shapes = {f"{stem}.lora_A.weight": (RANK, hidden), f"{stem}.lora_B.weight": (hidden, RANK)}
        directory.mkdir(parents=True)
        header, data = {}, b""
        for tensor, shape in shapes.items():
            values = self._random.normal(0, 1, shape).astype("<f4").tobytes()
            at = [len(data), len(data) + len(values)]
            header[tensor] = {"dtype": "F32", "shape": shape, "data_offsets": at}
            data += values
        text = json.dumps(header).encode()
        file = len(text).to_bytes(8, "little") + text + data
        (directory / "adapter_model.safetensors").write_bytes(file)
        adapter = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK}
        adapter |= {"base_model_name_or_path": self._base.name}
        (directory / "adapter_config.json").write_text(json.dumps(adapter))
        return SimpleNamespace(snapshot_name=name)


def delta_after(previous: str) -> dict[str, str]:
    return {
        "previous_snapshot_identity": previous,
        "compression_format": "arc_v2",
        "checksum_format": "alder32",
    }


def load_chain(manager: Any, model: str, load: Callable[..., str]) -> list[str]:
    """Load a full and three deltas by all that the SDK's callers may say; returns their names."""
    full = load("base", path="s3://elsewhere/", cmek_resource="c")  # headers it may ignore
    manager.hotload(NAME, model, full)  # again, as after a lost answer
    assert manager.wait_for_hotload(NAME, model, full)
    first = load("delta", full)
    second = load("delta", first, reset_prompt_cache=False)
    third = load("delta", second, reset_prompt_cache="new_session")
    status = manager.hotload_check_status(NAME, model)
    assert [replica["readiness"] for replica in status["replicas"]] == [True] * 2
    return [full, first, second, third]
