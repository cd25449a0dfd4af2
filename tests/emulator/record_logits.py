"""Records what `transformers` computes for tiny seeded models: the fixtures of test_llama.py.

Run where torch and transformers are installed: `python tests/emulator/record_logits.py`, perhaps
with names of models. It writes one directory per model below fixtures/: config.json, bf16 weights,
and logits computed in float32 from them, with the experts of every token.
"""

import json
import sys
from pathlib import Path

import torch
import transformers

COMMON = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "use_cache": True,
}
MODELS = {
    "llama": transformers.LlamaConfig(
        **COMMON,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "llama_tied": transformers.LlamaConfig(
        **COMMON,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    ),
    "qwen2": transformers.Qwen2Config(**COMMON, num_key_value_heads=1, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(
        **COMMON, num_key_value_heads=2, head_dim=6, tie_word_embeddings=False
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **COMMON | {"num_hidden_layers": 3},
        num_key_value_heads=2,
        head_dim=6,
        tie_word_embeddings=False,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
}
IDS = [3, 61, 0, 17, 17, 42, 5, 9, 63, 28, 1, 33]


def build(name: str) -> transformers.PreTrainedModel:
    """A seeded model whose weights are bf16 values held in float32, norms and biases not at their
    neutral.
    """
    torch.manual_seed(list(MODELS).index(name))
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name], dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("norm.weight", "bias")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            parameter.copy_(parameter.to(torch.bfloat16).float())
    return model.eval()


def logits(model: transformers.PreTrainedModel, ids: list[int]) -> list[list[float]]:
    """`[T, vocab]`."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].tolist()


def experts(model: transformers.PreTrainedModel, ids: list[int]) -> list[list[list[int]]]:
    """`[T, layers with experts, active experts]`, the likeliest first."""
    with torch.no_grad():
        scores = model(torch.tensor([ids]), output_router_logits=True).router_logits
    chosen = [each.topk(model.config.num_experts_per_tok, dim=-1).indices for each in scores]
    return torch.stack(chosen, dim=1).tolist()


def main(target: Path, *names: str) -> None:
    for name in names or MODELS:
        model = build(name)
        # Before the cast to bf16, which would round the rotary frequencies too.
        rows = [[round(value, 7) for value in row] for row in logits(model, IDS)]
        expected = {"ids": IDS, "logits": rows}
        if name == "qwen3_moe":
            expected["experts"] = experts(model, IDS)
        model.to(torch.bfloat16).save_pretrained(target / name)
        (target / name / "generation_config.json").unlink(missing_ok=True)
        (target / name / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    main(Path(__file__).parent / "fixtures", *sys.argv[1:])
