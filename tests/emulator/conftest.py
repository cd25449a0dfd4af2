"""A tiny model, a publisher of its snapshots, and emulators that are stopped when a test ends."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from emulator.control.settings import EmulatorConfig
from emulator.server import RunningEmulator
from hotload.checkpoint.safetensors import TensorInfo, render_header
from hotload.directory.operations import encode_directory
from tests.waiting import PATIENCE_SECONDS

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 258,
}
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
Tensors = dict[str, np.ndarray]
Emulators = Callable[[EmulatorConfig], RunningEmulator]


def shapes() -> dict[str, tuple[str, tuple[int, ...]]]:
    """File and shape of every tensor, one layer per file."""
    hidden, inner, vocab = 32, 48, 261
    found: dict[str, tuple[str, tuple[int, ...]]] = {
        "model.embed_tokens.weight": ("embed.safetensors", (vocab, hidden)),
        "model.norm.weight": ("norm.safetensors", (hidden,)),
        "lm_head.weight": ("head.safetensors", (vocab, hidden)),
    }
    for layer in range(2):
        parts = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden // 2, hidden),
            "self_attn.v_proj": (hidden // 2, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        for name, shape in parts.items():
            found[f"model.layers.{layer}.{name}.weight"] = (f"layer-{layer}.safetensors", shape)
    return found


def tensors(seed: int) -> Tensors:
    """Weights as bf16 bit patterns (`uint16`)."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.normal(1.0 if len(shape) == 1 else 0.0, 0.3, shape).astype("<f4").view("<u4") >> 16
        ).astype("<u2")
        for name, (_, shape) in shapes().items()
    }


def step(weights: Tensors, seed: int) -> Tensors:
    """The weights after one optimizer step: a few elements moved by one ulp or more."""
    rng = np.random.default_rng(seed)
    moved = {}
    for name, bits in weights.items():
        change = rng.random(bits.shape) < 0.05
        moved[name] = (bits ^ np.where(change, rng.integers(1, 64, bits.shape), 0)).astype("<u2")
    return moved


def write_shard(path: Path, entries: dict[str, np.ndarray], dtype: str) -> None:
    infos, start = [], 0
    for name, array in entries.items():
        infos.append(TensorInfo(name, dtype, array.shape, start, start + array.nbytes))
        start += array.nbytes
    data = b"".join(array.tobytes() for array in entries.values())
    path.write_bytes(render_header(infos, {"format": "pt"}) + data)


def write_checkpoint(directory: Path, weights: Tensors, config: dict[str, Any] = CONFIG) -> None:
    """An HF directory: shards, index, spec, config, tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    layout = shapes()
    for file in {file for file, _ in layout.values()}:
        names = [name for name, (place, _) in layout.items() if place == file]
        write_shard(directory / file, {name: weights[name] for name in names}, "BF16")
    index = {"metadata": {}, "weight_map": {name: file for name, (file, _) in layout.items()}}
    spec = {n: {"shape": list(s), "dtype": "bfloat16"} for n, (_, s) in layout.items()}
    write_json(directory / "model.safetensors.index.json", index)
    write_json(directory / "model.weight.spec.json", {"tensor_map": spec})
    write_json(directory / "config.json", config)
    tokenizer().save(str(directory / "tokenizer.json"))
    template = {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"}
    write_json(directory / "tokenizer_config.json", template)


def tokenizer() -> Tokenizer:
    """Every byte is a token; 256 and up are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<pad>", "<s>", "</s>", "<a>", "<b>"])
    return made


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


class Publisher:
    """Writes snapshots below a bucket directory, and keeps the checkpoints they stand for."""

    def __init__(self, root: Path) -> None:
        self.bucket, self._kept = root / "bucket", root / "checkpoints"
        self.bucket.mkdir()
        self.base = root / "base-model"
        self.weights: dict[str | None, Tensors] = {None: tensors(0)}
        write_checkpoint(self.base, self.weights[None])

    def checkpoint(self, identity: str | None) -> Path:
        """The full checkpoint an identity stands for."""
        return self.base if identity is None else self._kept / identity

    def full(self, identity: str, seed: int = 1, weights: Tensors | None = None) -> Path:
        """A full snapshot in the bucket, of these weights or drawn ones; returns its directory
        there."""
        self._keep(identity, tensors(seed) if weights is None else weights)
        shutil.copytree(self.checkpoint(identity), self.bucket / identity)
        return self.bucket / identity

    def delta(self, identity: str, previous: str, seed: int = 2) -> Path:
        """A delta snapshot in the bucket; returns its directory there."""
        self._keep(identity, step(self.weights[previous], seed))
        target, base = self.checkpoint(identity), self.checkpoint(previous)
        out = self.bucket / identity
        encode_directory(base, target, out)
        return out

    def lora(self, identity: str, seed: int = 3, named: str = "base-model") -> Path:
        """A LoRA snapshot on the query projections; returns its directory in the bucket."""
        rng, out = np.random.default_rng(seed), self.bucket / identity
        out.mkdir()
        pairs: dict[str, np.ndarray] = {}
        for layer in range(2):
            stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            pairs[f"{stem}.lora_A.weight"] = rng.normal(0, 1, (2, 32)).astype("<f4")
            pairs[f"{stem}.lora_B.weight"] = rng.normal(0, 1, (32, 2)).astype("<f4")
        write_shard(out / "adapter_model.safetensors", pairs, "F32")
        config = {"r": 2, "lora_alpha": 4, "base_model_name_or_path": named, "peft_type": "LORA"}
        write_json(out / "adapter_config.json", config)
        return out

    def _keep(self, identity: str, weights: Tensors) -> None:
        self.weights[identity] = weights
        write_checkpoint(self._kept / identity, weights)


class Caller:
    """A client of one emulator, with its key and names."""

    def __init__(self, running: RunningEmulator, config: EmulatorConfig) -> None:
        self.running, self.config = running, config
        key = config.api_key or "a-key"
        names = {"fireworks-model": config.model, "fireworks-deployment": config.deployment}
        self.http = httpx.Client(
            base_url=running.url,
            headers={"authorization": f"Bearer {key}", **names},
            timeout=PATIENCE_SECONDS,
        )

    def signal(self, identity: str, previous: str | None = None, **fields: Any) -> httpx.Response:
        body: dict[str, Any] = {"identity": identity, **fields}
        if previous is not None:
            body["incremental_snapshot_metadata"] = {
                "previous_snapshot_identity": previous,
                "compression_format": "arc_v2",
                "checksum_format": "alder32",
            }
        return self.http.post("/hot_load/v1/models/hot_load", json=body)

    def load(self, identity: str, previous: str | None = None, **fields: Any) -> None:
        """Signal, and wait until nothing moves any more."""
        answer = self.signal(identity, previous, **fields)
        assert answer.status_code == 200, answer.text
        self.tick()

    def tick(self, seconds: float = 0) -> float:
        answer = self.http.post("/emulator/tick", json={"seconds": seconds})
        assert answer.status_code == 200, answer.text
        return answer.json()["now_seconds"]

    def replicas(self) -> list[dict[str, Any]]:
        answer = self.http.get("/hot_load/v1/models/hot_load")
        assert answer.status_code == 200, answer.text
        return answer.json()["replicas"]

    def served(self) -> list[str | None]:
        """Current identity per replica, with a mark where it is not ready."""
        return [
            each["current_snapshot_identity"] if each["readiness"] else "not ready"
            for each in self.replicas()
        ]

    def stages(self) -> list[str]:
        return [each["loading_state"]["stage"] for each in self.replicas()]

    def complete(self, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        body = {"model": self.config.model, "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 1}
        path = "/inference/v1/completions"
        return self.http.post(path, json={**body, **fields}, headers=headers)

    def chat(self, **fields: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "hi"}]
        body = {"model": self.config.model, "messages": messages, "max_tokens": 4}
        return self.http.post("/inference/v1/chat/completions", json={**body, **fields})

    def fault(self, name: str, **parameters: Any) -> int:
        answer = self.http.post("/emulator/faults", json={"fault": name, **parameters})
        assert answer.status_code == 200, answer.text
        return answer.json()["numbers"][0]

    def clear_faults(self) -> None:
        self.http.delete("/emulator/faults")

    def log(self) -> dict[str, Any]:
        return self.http.get("/emulator/log").json()

    def applied(self) -> dict[str, list[tuple[str, str]]]:
        """(identity, result) per replica."""
        return {
            name: [(entry["identity"], entry["result"]) for entry in entries]
            for name, entries in self.log()["snapshots"].items()
        }


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a whole stream, without its [DONE]."""
    found = []
    for line in answer.text.splitlines():
        if line.startswith("data: ") and line != "data: [DONE]":
            found.append(json.loads(line[6:]))
    return found


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    return Publisher(tmp_path)


@pytest.fixture
def start(
    publisher: Publisher, tmp_path: Path, emulators: Emulators
) -> Iterator[Callable[..., Caller]]:
    """Starts emulators of the publisher's bucket and base model."""
    with ExitStack() as stack:

        def begin(**settings: Any) -> Caller:
            config = EmulatorConfig(
                **{
                    "bucket": str(publisher.bucket),
                    "base_model": publisher.base,
                    "replica_count": 2,
                    "work_dir": tmp_path / "work",
                    **settings,
                }
            )
            caller = Caller(stack.enter_context(emulators(config)), config)
            stack.callback(caller.http.close)
            return caller

        yield begin


@pytest.fixture
def read_events() -> Callable[[httpx.Response], list[dict[str, Any]]]:
    return events


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory, emulators: Emulators) -> Iterator[Caller]:
    """One emulator for the tests of a module that leave it as it was."""
    yield from _one(emulators, tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, emulators: Emulators) -> Iterator[Caller]:
    """The same, with a key of its own."""
    yield from _one(emulators, tmp_path_factory.mktemp("keyed"), api_key="right")


def _one(emulators: Emulators, root: Path, **settings: Any) -> Iterator[Caller]:
    publisher = Publisher(root)
    config = EmulatorConfig(
        bucket=str(publisher.bucket), base_model=publisher.base, replica_count=1, **settings
    )
    with emulators(config) as running:
        shared = Caller(running, config)
        yield shared
        shared.http.close()
