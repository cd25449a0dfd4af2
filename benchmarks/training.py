"""A really trained small model, one policy-gradient step apart. Needs torch.

    python -m benchmarks.training DIRECTORY [--seed 0]

A GPT of 15 million parameters learns text in which each token mostly decides the next, then is
trained by GRPO-like steps: at every position a group of tokens is sampled from the model, right
ones are rewarded, advantages are normalised in the group, Adam takes the step. Masters stay in
fp32; before and after the last step they are rounded to bf16 and written to DIRECTORY/<rate>/old
and /new, once for each learning rate. About a minute and a half on one core; done once per seed.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.checkpoints import Change, bfloat16, write_shard

RATES = (1e-6, 2e-6)
VOCABULARY, WIDTH, HEADS, LAYERS, CONTEXT = 512, 768, 12, 2, 128
BATCH, GROUP = 2, 8
PRETRAINING_STEPS, PRETRAINING_RATE = 160, 1e-3
STEPS = 30  # of reinforcement learning, the last of which counts
FILE = "model.safetensors"


class Block(nn.Module):
    """Attention and a feed-forward layer, each added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, HEADS, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(x.shape))
        return x + self.down(functional.gelu(self.up(self.feed_norm(x))))


class Gpt(nn.Module):
    """Tokens in, logits of the next token out; the head is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        for weights in self.parameters():
            if weights.dim() > 1:
                nn.init.normal_(weights, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        return self.norm(self.blocks(x)) @ self.tokens.weight.T


class Text:
    """Sequences over a fixed random successor table, with one token in ten of no reason."""

    def __init__(self, random: torch.Generator) -> None:
        self._random = random
        self.successor = torch.randperm(VOCABULARY, generator=random)

    def batch(self) -> Tensor:
        tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT), generator=self._random)
        is_random = torch.rand((BATCH, CONTEXT), generator=self._random) < 0.1
        for at in range(1, CONTEXT):
            after = self.successor[tokens[:, at - 1]]
            tokens[:, at] = torch.where(is_random[:, at], tokens[:, at], after)
        return tokens


def pretrain(model: Gpt, text: Text) -> float:
    """Plain next-token training; the last loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_RATE, weight_decay=0.01)
    for _ in range(PRETRAINING_STEPS):
        tokens = text.batch()
        logits = model(tokens[:, :-1])
        loss = functional.cross_entropy(logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))
        step(model, optimizer, loss)
    return float(loss.detach())


def reinforce(model: Gpt, text: Text, rate: float) -> Iterator[float]:
    """Steps of GRPO over answers of one token; the share of right answers before each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(STEPS):
        tokens = text.batch()
        scores = model(tokens).log_softmax(-1)
        chances = scores.detach().exp().view(-1, VOCABULARY)
        answers = torch.multinomial(chances, GROUP, replacement=True).view(BATCH, CONTEXT, GROUP)
        rewards = (answers == text.successor[tokens].unsqueeze(-1)).float()
        centred = rewards - rewards.mean(-1, keepdim=True)
        advantages = centred / (rewards.std(-1, keepdim=True) + 1e-4)
        loss = -(advantages * scores.gather(-1, answers)).mean()
        yield float(rewards.mean())
        step(model, optimizer, loss)


def step(model: Gpt, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def masters(model: Gpt) -> dict[str, Tensor]:
    return {name: weights.detach().clone() for name, weights in model.named_parameters()}


def train(directory: Path, seed: int) -> None:
    """Write the pairs of all rates."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    text = Text(torch.Generator().manual_seed(seed))
    model = Gpt()
    began = time.perf_counter()
    print(f"loss {pretrain(model, text):.2f} after {PRETRAINING_STEPS} steps", flush=True)
    pretrained = masters(model)
    for rate in RATES:
        model.load_state_dict(pretrained)
        rights = []
        for right in reinforce(model, text, rate):
            rights.append(right)
            before = masters(model)
        after = masters(model)
        changes = [
            Change(name, "BF16", bfloat16(before[name].numpy()), bfloat16(after[name].numpy()))
            for name in before
        ]
        write_shard(directory / f"{rate:.0e}", FILE, changes)
        print(f"lr {rate:g}: {100 * rights[-1]:.0f} % right before the last step", flush=True)
    print(f"{time.perf_counter() - began:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.directory.exists():
        return  # trained before
    partial = options.directory.with_name(f".{options.directory.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    train(partial, options.seed)
    partial.rename(options.directory)


if __name__ == "__main__":
    main()
