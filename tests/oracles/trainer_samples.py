"""Rollouts of every shape, a tiny model, and its loss over them written out by hand: one sequence
at a time, nothing padded and nothing of `hotload.dataset.trainer_batch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count

import numpy as np
import polars as pl
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hotload.dataset.table import rollouts_frame
from hotload.rollout.straddling import settle_weights
from hotload.rollout.trajectory import Problem, Provenance, ScoredGroup, Segment, Trajectory

VOCABULARY = 512
TEMPERATURE = 0.7
CLIP = 0.2

Loss = Callable[[pl.DataFrame, LlamaForCausalLM], Tensor]

CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    # Wide enough that tokens differ by several nats.
    initializer_range=0.3,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=1,
)


def tiny_model() -> LlamaForCausalLM:
    """The same random weights each time, in fp32."""
    torch.manual_seed(20)
    return LlamaForCausalLM(CONFIG)


def logprobs(model: LlamaForCausalLM, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """Log-probabilities [T] of `tokens` after `prompt`, at the temperature of the sampling."""
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    ours = (logits / TEMPERATURE).log_softmax(-1)
    return ours.gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def frame() -> pl.DataFrame:
    """Rows of three groups; eight of eleven are to be trained on, of 2 to 9 tokens after prompts of
    3 to 12. The sampler is the tiny model and up to 0.4 nats off, so that some ratios are clipped.
    """
    random, model, numbers = np.random.default_rng(7), tiny_model(), count()

    def ids(length: int) -> tuple[int, ...]:
        return tuple(random.integers(2, VOCABULARY, length).tolist())

    def segment(prompt: tuple[int, ...], turns: Sequence[int]) -> Segment:
        """Turns of these many tokens; a negative one is what a tool said."""
        tokens = ids(sum(abs(length) for length in turns))
        mask = tuple(length > 0 for length in turns for _ in range(abs(length)))
        with torch.no_grad():
            exact = logprobs(model, prompt, tokens).numpy()
        sampled = exact + random.uniform(-0.4, 0.4, len(tokens))
        kept = np.where(mask, np.minimum(sampled, 0.0), 0.0)
        return Segment(prompt, tokens, tuple(kept.tolist()), mask)

    def sample(problem_id: str, *segments: Segment, change: int | None = None) -> Trajectory:
        """An answer; `change` is the token from which on newer weights made it."""
        number = next(numbers)
        runs = ((0, "old"),) if change is None else ((0, "old"), (change, "new"))
        observed = tuple(identity for _, identity in runs)
        told = Provenance("old", f"r{number}", "s", 1, observed, observed[-1], runs=runs)
        return settle_weights(
            Trajectory(
                problem_id=problem_id,
                sample_number=number,
                seed=number,
                provenance=told,
                latency_seconds=0.1,
                segments=segments,
                finish_reason="length" if number % 2 else "stop",
            ),
            "mask_from_change",
        )

    def failed(problem_id: str) -> Trajectory:
        return replace(sample(problem_id, Segment((), (), (), ())), failure="timeout")

    short, long = ids(3), ids(7)
    of_p = (
        sample("p", segment(short, [3])),
        sample("p", segment(short, [6])),
        sample("p", segment(short, [4, -3, 2])),
        sample("p", segment(short, [4, -1, 2]), segment(ids(12), [5])),
        failed("p"),
    )
    of_q = (
        sample("q", segment(long, [6]), change=3),
        sample("q", segment(long, [2])),
        # The change comes before the second sequence: none of its tokens is left in the loss.
        sample("q", segment(long, [4]), segment(ids(9), [3]), change=4),
    )
    of_r = (sample("r", segment(short, [5])),)
    return rollouts_frame(
        [
            ScoredGroup(
                Problem("p", short),
                of_p,
                (1.0, 0.0, 0.5, 0.25, None),
                (1.5, -1.25, 0.5, -0.75, None),
            ),
            ScoredGroup(Problem("q", long), of_q, (0.0, 1.0, 1.0), (-1.0, 0.75, 1.0)),
            ScoredGroup(Problem("r", short), of_r, (1.0,), (None,), mark="incomplete"),
        ],
        run_id="run",
        policy_version=3,
    )


def tokens_in_the_loss(
    rows: pl.DataFrame, model: LlamaForCausalLM
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """For each row to train on: the log-probabilities of its tokens in the loss under `model` and
    under the sampler, and its advantage.
    """
    for row in rows.iter_rows(named=True):
        mask = torch.tensor(row["loss_mask"], dtype=torch.bool)
        if row["advantage"] is None or not mask.any():
            continue
        now = logprobs(model, row["prompt_token_ids"], row["token_ids"])
        yield now[mask], torch.tensor(row["sampling_logprobs"])[mask], row["advantage"]


def clipped_losses(rows: pl.DataFrame, model: LlamaForCausalLM) -> list[Tensor]:
    """The clipped loss of each token, row by row."""
    losses = []
    for now, sampled, advantage in tokens_in_the_loss(rows, model):
        ratio = (now - sampled).exp()
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        losses.append(-torch.minimum(ratio * advantage, clipped * advantage))
    return losses


def mean_over_tokens(rows: pl.DataFrame, model: LlamaForCausalLM) -> Tensor:
    """Every token weighs the same: TRL's `dapo`, verl's `token-mean`."""
    return torch.cat(clipped_losses(rows, model)).mean()


def mean_over_rows(rows: pl.DataFrame, model: LlamaForCausalLM) -> Tensor:
    """Every row weighs the same: TRL's `grpo`, verl's `seq-mean-token-mean`."""
    return torch.stack([losses.mean() for losses in clipped_losses(rows, model)]).mean()


def by_hand(loss: Loss, *parts: pl.DataFrame) -> tuple[float, dict[str, Tensor]]:
    """The sum of the losses of `parts`, and its gradients by the model's parameters."""
    model = tiny_model()
    total = torch.stack([loss(part, model) for part in parts]).sum()
    total.backward()
    return total.item(), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }
