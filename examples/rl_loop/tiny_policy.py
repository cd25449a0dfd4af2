"""The policy that the examples begin with: random weights, a token per letter."""

from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer, decoders, models

from examples.rollouts.speaker import Speaker
from examples.tiny_trainer import CONFIG, TinyTrainer

LETTERS = "0123456789+-*=?.,:\n abcdefghijklmnopqrstuvwxyzAIW"
VOCABULARY = {letter: n for n, letter in enumerate(["<s>", "</s>", *LETTERS])}
SHAPE = {
    "vocab_size": len(VOCABULARY),
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
}


def save_random_policy(directory: Path, seed: int, words: Mapping[str, float]) -> None:
    """Write the checkpoint of a Llama of 0.4 million random weights.

    Args:
        words: letters that it says more often at first, with so many nats.
    """
    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    config = CONFIG | SHAPE
    if words:
        Speaker(words, seed, config, tokenizer).save(directory)
    else:
        TinyTrainer(seed, config, tokenizer).save(directory)
