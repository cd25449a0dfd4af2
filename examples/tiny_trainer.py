"""A trainer small enough for a laptop: real checkpoints, seeded updates, no deep-learning
framework.

It keeps fp32 master weights, moves them by Adam-sized steps whose signs are partly correlated in
time, and writes them rounded to bf16, so that a step changes about as many elements as a step of
reinforcement learning does. It does not learn: the demo is about the journey of the weights.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import TensorSpec, serialize_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hotload.checkpoint.index_and_spec import build_index, build_spec
from hotload.checkpoint.names import CONFIG_FILE, INDEX_FILE, SPEC_FILE
from hotload.directory.shards import read_checkpoint

VOCABULARY = 512
LEARNING_RATE = 3e-6
MOMENTUM = 0.9

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class TinyTrainer:
    """fp32 master weights of a Llama-shaped model (about 1.4 million), and checkpoints of them.

    Args:
        config: the model's `config.json`.
        tokenizer: goes with every checkpoint; without it, the one of `make_tokenizer`.
    """

    def __init__(
        self, seed: int = 7, config: dict[str, Any] = CONFIG, tokenizer: Tokenizer | None = None
    ) -> None:
        self._random = np.random.default_rng(seed)
        self._config, self._tokenizer = config, tokenizer or make_tokenizer()
        self._masters = {n: self._first(n, shape) for n, shape in _shapes(config).items()}
        self._moments = {name: np.zeros_like(w) for name, w in self._masters.items()}

    def step(self) -> None:
        """One update of Adam's size: each weight moves by about the learning rate."""
        for name, weights in self._masters.items():
            moment = self._moments[name]
            moment *= MOMENTUM
            moment += (1 - MOMENTUM) * self._random.standard_normal(weights.shape, np.float32)
            scale = float(np.sqrt(np.mean(moment**2)))
            weights -= np.float32(LEARNING_RATE / scale) * moment

    def save(self, directory: Path) -> None:
        """Write a checkpoint in HuggingFace layout, one layer a file, complete when this
        returns."""
        directory.mkdir(parents=True)
        files = {name: self._file_of(name) for name in self._masters}
        for file in sorted(set(files.values())):
            # numpy has no bf16: the library is told the type of arrays that hold its bits.
            rounded = {n: bf16(w) for n, w in self._masters.items() if files[n] == file}
            specs = {
                name: TensorSpec(
                    dtype="bfloat16",
                    shape=list(bits.shape),
                    data_ptr=bits.ctypes.data,
                    data_len=bits.nbytes,
                )
                for name, bits in rounded.items()
            }
            serialize_file(specs, str(directory / file), {"format": "pt"})
        shards = read_checkpoint(directory).shards
        (directory / INDEX_FILE).write_bytes(build_index(shards))
        (directory / SPEC_FILE).write_bytes(build_spec(shards))
        (directory / CONFIG_FILE).write_text(json.dumps(self._config, indent=1))
        self._tokenizer.save(str(directory / "tokenizer.json"))
        settings = {"chat_template": CHAT_TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))

    def _first(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("norm.weight"):
            return np.ones(shape, np.float32)
        return np.float32(0.05) * self._random.standard_normal(shape, np.float32)

    def _file_of(self, name: str) -> str:
        layers = [f"layers.{layer}" for layer in range(self._config["num_hidden_layers"])]
        files = ["embed_tokens", *layers, "norm", "lm_head"]
        number = next(n for n, part in enumerate(files, start=1) if f"{part}." in f"{name}.")
        return f"model-{number:05d}-of-{len(files):05d}.safetensors"


def bf16(weights: np.ndarray) -> np.ndarray:
    """The bits of fp32 values rounded to bf16, nearest even, as little-endian u16 of that shape."""
    bits = np.ascontiguousarray(weights, np.float32).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2")


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"] * config["head_dim"]
    pairs = config["num_key_value_heads"] * config["head_dim"]
    words = (config["vocab_size"], hidden)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": words}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_proj.weight": (heads, hidden),
            f"{prefix}.self_attn.k_proj.weight": (pairs, hidden),
            f"{prefix}.self_attn.v_proj.weight": (pairs, hidden),
            f"{prefix}.self_attn.o_proj.weight": (hidden, heads),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.mlp.gate_proj.weight": (mlp, hidden),
            f"{prefix}.mlp.up_proj.weight": (mlp, hidden),
            f"{prefix}.mlp.down_proj.weight": (hidden, mlp),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": words}


def make_tokenizer() -> Tokenizer:
    """The tokenizer of every checkpoint: bytes and pieces of sums, the same each time."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sums = [f"What is {a} + {b}? The answer is {a + b}." for a in range(40) for b in range(40)]
    tokenizer.train_from_iterator(sums, trainer)
    return tokenizer
