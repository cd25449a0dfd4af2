"""A policy that learns from its rollouts: the tiny trainer's model, with one number per token to
learn.

Its hidden states share a constant direction, so one column of `lm_head` is a bias on every token.
That column is moved by REINFORCE on the rows that a cycle handed back: too little to understand a
question, enough to find out which words pay.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import polars as pl
from tokenizers import Tokenizer

from examples.tiny_trainer import CONFIG, VOCABULARY, TinyTrainer

CONSTANT = 4.0
STEP = 0.6
LONGEST_MOVE = 0.4
RARE = 10.0


class Speaker(TinyTrainer):
    """The tiny trainer's model with a first guess at which texts are worth saying."""

    def __init__(
        self,
        texts: Mapping[str, float],
        seed: int = 7,
        config: dict[str, Any] = CONFIG,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(seed, config, tokenizer)
        self._masters["model.embed_tokens.weight"][:, 0] = CONSTANT
        self.biases = self._masters["lm_head.weight"][:, 0]
        self.biases[:] = 0.0
        for text, bias in texts.items():
            for token in self._tokenizer.encode(text).ids:
                self.biases[token] = bias

    def learn(self, rows: pl.DataFrame) -> int:
        """Take one step on the rows of a cycle (`hotload.dataset.table.Rollouts`); count the tokens
        that took part.
        """
        gradient = np.zeros(VOCABULARY)
        seen = np.zeros(VOCABULARY)
        trained = rows.filter(pl.col("advantage").is_not_null())
        columns = trained.select("token_ids", "loss_mask", "advantage").iter_rows()
        counted = []
        for tokens, mask, advantage in columns:
            counts = np.bincount(
                [token for token, is_own in zip(tokens, mask, strict=True) if is_own],
                minlength=VOCABULARY,
            )
            counted.append((counts, advantage))
            seen += counts
        if not seen.any():
            return 0
        # The gradient of a token's log-probability by the biases: itself less what was expected.
        expected = seen / seen.sum()
        for counts, advantage in counted:
            gradient += advantage * (counts - counts.sum() * expected)
        move = STEP * gradient / (seen + RARE)  # what was hardly said hardly moves
        self.biases += np.clip(move, -LONGEST_MOVE, LONGEST_MOVE).astype(np.float32)
        return int(seen.sum())
