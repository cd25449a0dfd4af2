"""A tiny Qwen3 of random weights, then versions that change 2 % of the elements: `train.py DIR N`

Changed so much that each version answers with other text. Run with transformers.
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

out, versions = Path(sys.argv[1]), int(sys.argv[2])
letters = {letter: number for number, letter in enumerate(["</s>", *map(chr, range(32, 127))])}
backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
backend.decoder = decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")

torch.manual_seed(0)
config = Qwen3Config(
    vocab_size=len(letters),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=0,
)
model = Qwen3ForCausalLM(config).to(torch.bfloat16)
for version in range(versions + 1):
    model.save_pretrained(out / f"step-{version}")
    tokenizer.save_pretrained(out / f"step-{version}")
    with torch.no_grad():
        for weights in model.parameters():
            weights += (torch.rand_like(weights) < 0.02) * torch.randn_like(weights) * 0.1
