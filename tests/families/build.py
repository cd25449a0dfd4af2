"""Miniatures of model families: two steps of each, as its trainer leaves them, from random weights.

Run with transformers: `python -m tests.families.build OUT`. What transformers has a class for comes
from its config and `save_pretrained`; the others, as published with code of their own, by name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging

Tensors = dict[str, torch.Tensor]

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
EXPERTS = {
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "depth": 3,
    "num_heads": 4,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
    "image_size": 16,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# Family, model type of transformers, what its miniature needs beside SMALL.
FROM_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, untied": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-moe": ("qwen3_moe", EXPERTS),
    "qwen3-next": ("qwen3_next", {**EXPERTS, "num_hidden_layers": 4}),
    "qwen3-vl": ("qwen3_vl", {"vision_config": VISION}),
    "qwen2.5-vl": ("qwen2_5_vl", {"vision_config": VISION}),
    "glm4": ("glm4", {}),
    "glm4-moe": ("glm4_moe", EXPERTS),
    "glm-5": ("glm_moe_dsa", {**EXPERTS, **LATENT, "index_head_dim": 16, "index_n_heads": 2}),
    "deepseek-v3": ("deepseek_v3", {**EXPERTS, **LATENT}),
    "deepseek-v4": ("deepseek_v4", {**EXPERTS, "q_lora_rank": 16}),
    "gemma3": ("gemma3_text", {}),
    "gpt-oss": ("gpt_oss", EXPERTS),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", EXPERTS),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "minimax-m2": ("minimax_m2", EXPERTS),
    "gpt2": ("gpt2", {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}),
    "gpt-neox": ("gpt_neox", {}),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 2}),
    "falcon": ("falcon", {}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mamba": ("mamba", {"state_size": 4}),
    "mamba2": ("mamba2", {"state_size": 4, "num_heads": 8, "n_groups": 2}),
    "rwkv": ("rwkv", {"attention_hidden_size": 32}),
    "t5": ("t5", {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3}),
    "bert": ("bert", {}),
}


def main(out: Path) -> int:
    """Write every family; 1 if one cannot be built by this version of the library."""
    failed = 0
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for number, (family, (kind, more)) in enumerate(FROM_CONFIGS.items()):
        torch.manual_seed(number)
        try:
            _save_steps(out / family, _model(kind, more))
        except Exception as error:  # noqa: BLE001 - it depends on the version
            failed = 1
            print(f"{family}: not built: {type(error).__name__}: {str(error)[:150]}", flush=True)
    for number, (family, build) in enumerate(BY_NAME.items()):
        torch.manual_seed(1000 + number)
        _write_steps(out / family, *build())
    return failed


def _model(kind: str, more: dict[str, Any]) -> Any:
    config = AutoConfig.for_model(kind)
    nested = more.get("vision_config", {})
    text = getattr(config, "text_config", None)
    for key, value in {**SMALL, **TOKENS, **more}.items():
        if key == "vision_config":
            continue
        for part in (config, text):
            if part is not None and (hasattr(part, key) or key in part.attribute_map):
                with suppress(AttributeError):  # a property that follows from others
                    setattr(part, key, value)
    for key, value in nested.items():
        if hasattr(config.vision_config, key):
            setattr(config.vision_config, key, value)
    config = type(config).from_dict(_settled(config.to_dict()))
    return _class_for(config).from_config(config).to(torch.bfloat16)


def _settled(config: dict[str, Any]) -> dict[str, Any]:
    """Drop what the defaults derived from the large model's number of layers."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            for key in ("layer_types", "mlp_layer_types", "mlp_only_layers", "indexer_types"):
                part.pop(key, None)
    return config


def _class_for(config: Any) -> Any:
    for one in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in one._model_mapping:
            return one
    return AutoModel


def _save_steps(directory: Path, model: Any) -> None:
    for step in (1, 2):
        model.save_pretrained(directory / f"step-{step}", max_shard_size="20KB")
        _leave_behind(directory / f"step-{step}", step)
        with torch.no_grad():
            for weight in model.parameters():
                weight.view(-1)[::50] *= 1.01


def _write_steps(directory: Path, tensors: Tensors, config: dict[str, Any]) -> None:
    for step in (1, 2):
        (directory / f"step-{step}").mkdir(parents=True)
        save_file(tensors, directory / f"step-{step}" / "model.safetensors", {"format": "pt"})
        (directory / f"step-{step}" / "config.json").write_text(json.dumps(config))
        _leave_behind(directory / f"step-{step}", step)
        for name, weight in tensors.items():
            if weight.dtype == torch.bfloat16:
                tensors[name] = weight.clone()
                tensors[name].view(-1)[::50] *= 1.01


def _leave_behind(directory: Path, step: int) -> None:
    """What accelerate, DeepSpeed and the Trainer write beside every step."""
    names = ("latest", "random_states_0.pkl", "trainer_log.jsonl", "events.out.tfevents.1.host")
    for name in names:
        (directory / name).write_text(f"{name} of step {step}")


def _bf16(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.bfloat16)


def _kimi_k25() -> tuple[Tensors, dict[str, Any]]:
    """Experts in int4 of compressed-tensors, the setting under text_config, a vision tower."""
    stem = "language_model.model"
    tensors = {
        f"{stem}.embed_tokens.weight": _bf16(96, 32),
        f"{stem}.norm.weight": _bf16(32),
        "language_model.lm_head.weight": _bf16(96, 32),
        "mm_projector.pre_norm.weight": _bf16(32),
        "mm_projector.proj.0.weight": _bf16(32, 32),
        "mm_projector.proj.2.weight": _bf16(32, 32),
        "vision_tower.patch_embed.proj.weight": _bf16(32, 3, 4, 4),
    }
    for block in range(3):
        tensors[f"vision_tower.encoder.blocks.{block}.wqkv.weight"] = _bf16(96, 32)
    for layer in range(2):
        tensors[f"{stem}.layers.{layer}.self_attn.o_proj.weight"] = _bf16(32, 32)
    for expert in range(2):
        name = f"{stem}.layers.1.mlp.experts.{expert}.up_proj.weight"
        tensors[f"{name}_packed"] = torch.randint(0, 1 << 30, (16, 4), dtype=torch.int32)
        tensors[f"{name}_scale"] = _bf16(16, 1)
        tensors[f"{name}_shape"] = torch.tensor([16, 32], dtype=torch.int32)
    text = {"vocab_size": 96, "num_hidden_layers": 2, "first_k_dense_replace": 1}
    text["quantization_config"] = {"quant_method": "compressed-tensors"}  # type: ignore[assignment]
    config = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25"}
    return tensors, {**config, "tie_word_embeddings": False, "text_config": text}


def _deepseek_fp8() -> tuple[Tensors, dict[str, Any]]:
    """FP8 in blocks with inverse scales, and the layer of the next-token predictor."""
    tensors = {
        "model.embed_tokens.weight": _bf16(96, 32),
        "model.norm.weight": _bf16(32),
        "lm_head.weight": _bf16(96, 32),
        "model.layers.2.embed_tokens.weight": _bf16(96, 32),
        "model.layers.2.shared_head.head.weight": _bf16(96, 32),
        "model.layers.2.eh_proj.weight": _bf16(32, 64),
    }
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        tensors[name] = torch.randn(32, 32).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand(1, 1)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = _bf16(32)
    config = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    config |= {"vocab_size": 96, "num_hidden_layers": 2, "num_nextn_predict_layers": 1}  # type: ignore[dict-item]
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return tensors, {**config, "tie_word_embeddings": False, "quantization_config": quantization}


def _deepseek_v4() -> tuple[Tensors, dict[str, Any]]:
    """As published: short names, scales as `scale`, layers of the predictor under `mtp`."""
    tensors = {
        "embed.weight": _bf16(96, 32),
        "norm.weight": _bf16(32),
        "head.weight": _bf16(96, 32),
        "hc_head_base": torch.rand(4),
    }
    for stem in ("layers.0", "layers.1", "mtp.0"):
        tensors[f"{stem}.attn.wo_a.weight"] = torch.randn(32, 32).to(torch.float8_e4m3fn)
        tensors[f"{stem}.attn.wo_a.scale"] = torch.rand(1, 1)
        tensors[f"{stem}.attn_norm.weight"] = _bf16(32)
    config = {"architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4"}
    config |= {"vocab_size": 96, "num_hidden_layers": 2}  # type: ignore[dict-item]
    return tensors, {
        **config, "tie_word_embeddings": False, "quantization_config": {"quant_method": "fp8"},
    }  # fmt: skip


def _gpt_oss() -> tuple[Tensors, dict[str, Any]]:
    """MXFP4: blocks and scales of all experts in one tensor each."""
    tensors = {
        "model.embed_tokens.weight": _bf16(96, 32),
        "model.norm.weight": _bf16(32),
        "lm_head.weight": _bf16(96, 32),
    }
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp"
        tensors[f"{stem}.router.weight"] = _bf16(4, 32)
        blocks = torch.randint(0, 256, (4, 32, 1, 16), dtype=torch.uint8)
        tensors[f"{stem}.experts.gate_up_proj_blocks"] = blocks
        tensors[f"{stem}.experts.gate_up_proj_scales"] = blocks[..., 0].clone()
        tensors[f"{stem}.experts.gate_up_proj_bias"] = _bf16(4, 32)
    config = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
    config |= {"vocab_size": 96, "num_hidden_layers": 2}  # type: ignore[dict-item]
    quantization = {"quant_method": "mxfp4"}
    return tensors, {**config, "tie_word_embeddings": False, "quantization_config": quantization}


def _internlm2() -> tuple[Tensors, dict[str, Any]]:
    """Embeddings and head under names of their own."""
    tensors = {
        "model.tok_embeddings.weight": _bf16(96, 32),
        "model.norm.weight": _bf16(32),
        "output.weight": _bf16(96, 32),
    }
    for layer in range(2):
        tensors[f"model.layers.{layer}.attention.wqkv.weight"] = _bf16(64, 32)
    config = {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2"}
    config |= {"vocab_size": 96, "num_hidden_layers": 2}  # type: ignore[dict-item]
    return tensors, {**config, "tie_word_embeddings": False}


BY_NAME: dict[str, Callable[[], tuple[Tensors, dict[str, Any]]]] = {
    "kimi-k2.5, int4": _kimi_k25,
    "deepseek-v3, fp8": _deepseek_fp8,
    "deepseek-v4, fp8": _deepseek_v4,
    "gpt-oss, mxfp4": _gpt_oss,
    "internlm2": _internlm2,
}


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
