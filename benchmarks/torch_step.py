"""The torch trainer's step over the same step by hand: one model, the same micro-batches, AdamW.

    .trainers-venv/bin/python -m benchmarks.torch_step     # in the environment of `make test-train`

By hand is what a team would write: pad, log_softmax, gather, backward, clip, step. The two take
turns; the ratio is of medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers

from hotload.trainers.torch_trainer import open_torch_trainer
from hotload.training.schedule import AdamSettings

BY_HAND_OVER_OURS = 0.95
STEPS = 10
MICRO_BATCHES, SAMPLES = 2, 4
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

Batch = tuple[list[list[int]], list[np.ndarray]]


def main() -> None:
    """Run both, and print the ratio."""
    random = np.random.default_rng(0)
    batches = [_batch(random) for _ in range(MICRO_BATCHES)]
    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory) / "base"
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).save_pretrained(base)
        work = {"ours": _ours(base, Path(directory), batches), "by hand": _by_hand(base, batches)}
        took: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(STEPS):
            for name, step in work.items():
                began = time.perf_counter()
                step()
                took[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(seconds[1:]) for name, seconds in took.items()}
    tokens = sum(len(one) for sequences, _ in batches for one in sequences)
    threads = torch.get_num_threads()
    print(f"a step of {MICRO_BATCHES} micro-batches, {tokens:,} tokens, {threads} threads")
    for name, seconds in medians.items():
        print(f"{seconds * 1e3:8.0f} ms  {name}")
    print(
        f"{medians['by hand'] / medians['ours']:8.2f}  by hand over ours (bar {BY_HAND_OVER_OURS})"
    )


def _batch(random: np.random.Generator) -> Batch:
    lengths = random.integers(128, 257, SAMPLES)
    sequences = [random.integers(0, SHAPE["vocab_size"], length).tolist() for length in lengths]
    return sequences, [random.normal(size=length - 1) for length in lengths]


def _ours(base: Path, states: Path, batches: Sequence[Batch]) -> Callable[[], object]:
    trainer = open_torch_trainer(str(base), str(states))
    adam = AdamSettings(grad_clip_norm=1.0)

    def step() -> object:
        for sequences, coefficients in batches:
            trainer.logprobs(sequences, is_before_backward=True)
            trainer.backward(sequences, coefficients)
        return trainer.step(adam, learning_rate=1e-5, divisor=1.0)

    return step


def _by_hand(base: Path, batches: Sequence[Batch]) -> Callable[[], object]:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)

    def step() -> object:
        for sequences, coefficients in batches:
            tensors = [torch.tensor(one) for one in sequences]
            ids = torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in tensors], True)
            weights = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(one, dtype=torch.float32) for one in coefficients], True
            )
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            logprobs = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            (logprobs * weights).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return None

    return step


if __name__ == "__main__":
    main()
