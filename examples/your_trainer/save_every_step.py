"""A plain transformers loop that saves a checkpoint after every step, and nothing more.

    python save_every_step.py DIR [STEPS]

It learns one line of text. Needs torch and transformers; there is no word of hotload in it.
"""

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

out, steps = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5

letters = {letter: number for number, letter in enumerate(["</s>", *map(chr, range(32, 127))])}
backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
backend.decoder = decoders.Fuse()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(letters),
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=0,
)
model = LlamaForCausalLM(config).to(torch.bfloat16)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
text = tokenizer("the quick brown fox jumps over the lazy dog", return_tensors="pt").input_ids

for step in range(steps + 1):
    model.save_pretrained(out / f"step-{step}")
    tokenizer.save_pretrained(out / f"step-{step}")
    model(text, labels=text).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
