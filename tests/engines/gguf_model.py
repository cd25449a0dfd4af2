"""A tiny random Llama: by its names in a checkpoint, and as the GGUF that llama.cpp serves."""

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType

SPECIAL = [("<unk>", TokenType.UNKNOWN), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL)]
LETTERS = [(chr(code), TokenType.NORMAL) for code in range(ord("A"), ord("z") + 1)]
BYTES = [(f"<0x{number:02X}>", TokenType.BYTE) for number in range(256)]
CONTEXT = 256


def config_of(vocabulary: list[tuple[str, TokenType]]) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": len(vocabulary),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": CONTEXT,
    }


def weights_of(config: dict[str, Any]) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(7)
    width, hidden, vocabulary = (
        config[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    head = config["head_dim"]
    queries, keys = (config[name] * head for name in ("num_attention_heads", "num_key_value_heads"))

    def matrix(rows: int, columns: int, scale: float) -> np.ndarray:
        return (draw.standard_normal((rows, columns)) * scale).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": matrix(vocabulary, width, 1.0),
        "lm_head.weight": matrix(vocabulary, width, 0.3),
        "model.norm.weight": np.ones(width, np.float32),
    }
    for number in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{number}."
        weights |= {
            f"{prefix}self_attn.q_proj.weight": matrix(queries, width, 0.3),
            f"{prefix}self_attn.k_proj.weight": matrix(keys, width, 0.3),
            f"{prefix}self_attn.v_proj.weight": matrix(keys, width, 0.3),
            f"{prefix}self_attn.o_proj.weight": matrix(width, queries, 0.3),
            f"{prefix}mlp.gate_proj.weight": matrix(hidden, width, 0.2),
            f"{prefix}mlp.up_proj.weight": matrix(hidden, width, 0.2),
            f"{prefix}mlp.down_proj.weight": matrix(width, hidden, 0.2),
            f"{prefix}input_layernorm.weight": np.ones(width, np.float32),
            f"{prefix}post_attention_layernorm.weight": np.ones(width, np.float32),
        }
    return weights


PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "lm_head.weight": "output.weight",
    "model.norm.weight": "output_norm.weight",
}


def write_gguf(
    path: Path,
    vocabulary: list[tuple[str, TokenType]],
    config: dict[str, Any],
    weights: dict[str, np.ndarray],
) -> None:
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text.encode() for text, _ in vocabulary])
    writer.add_token_scores([0.0] * len(vocabulary))
    writer.add_token_types([kind for _, kind in vocabulary])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in weights.items():
        if name in OUTSIDE:
            writer.add_tensor(OUTSIDE[name], value)
            continue
        number, _, part = name.removeprefix("model.layers.").partition(".")
        part = part.removesuffix(".weight")
        if part in ("self_attn.q_proj", "self_attn.k_proj"):  # it turns neighbours, not halves
            value = value.reshape(-1, 2, config["head_dim"] // 2, value.shape[1])
            value = value.swapaxes(1, 2).reshape(-1, value.shape[-1])
        writer.add_tensor(f"blk.{number}.{PARTS[part]}.weight", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
