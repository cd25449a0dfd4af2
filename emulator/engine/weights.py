"""Tensors of a checkpoint directory as float32 arrays, a LoRA adapter added if there is one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from agent.loading.checkpoint_files import UnsupportedModelError, read_json, shard_names
from emulator.engine.feed_forward import FloatArray
from emulator.engine.llama import LlamaWeights
from emulator.engine.quantized import apply_scales, e4m3, e5m2, e8m0
from hotload.checkpoint.names import ADAPTER_CONFIG_FILE, CONFIG_FILE
from hotload.checkpoint.quantization import declared_block, quantized_tensors
from hotload.checkpoint.safetensors import TensorInfo
from hotload.directory.shards import OpenShard, open_shard


def load_llama(directory: Path, adapter: Path | None = None) -> LlamaWeights:
    """Load the numpy engine's weights from `directory`, with `adapter` (a PEFT directory) added to
    them.

    Raises:
        UnsupportedModelError: not a model of this engine.
        InvalidCheckpointError: a shard is not readable.
        OSError: a file is missing.
    """
    tensors = read_tensors(directory)
    if adapter is not None:
        add_adapter(tensors, adapter)
    return LlamaWeights(read_json(directory / CONFIG_FILE), tensors)


def read_tensors(directory: Path) -> dict[str, FloatArray]:
    """Read every tensor of the checkpoint by name, widened to float32; those in FP8 multiplied by
    their scales.
    """
    config = read_json(directory / CONFIG_FILE) if (directory / CONFIG_FILE).exists() else {}
    with ExitStack() as stack:
        paths = [directory / name for name in shard_names(directory)]
        shards = [stack.enter_context(open_shard(path)) for path in paths]
        placed = [(one.header.file, tensor) for one in shards for tensor in one.header.tensors]
        found = [one for one in quantized_tensors(placed, config) if one.weight.dtype in FP8]
        scales = {one.scale.name for one in found if one.scale}
        tensors = {
            tensor.name: _read(shard, tensor, is_scale=tensor.name in scales)
            for shard in shards
            for tensor in shard.header.tensors
        }
    apply_scales(tensors, found, declared_block(config))
    return tensors


def _read(shard: OpenShard, tensor: TensorInfo, *, is_scale: bool) -> FloatArray:
    # Powers of two as they were written before torch had a name for them.
    dtype = "F8_E8M0" if is_scale and tensor.dtype == "U8" else tensor.dtype
    widen = WIDEN.get(dtype)
    if widen is None:
        raise UnsupportedModelError(f"tensor {tensor.name!r} has dtype {dtype}")
    raw = bytearray(tensor.size_bytes)
    shard.read_into(shard.header.data_start + tensor.start, memoryview(raw))
    return widen(raw).reshape(tensor.shape)


def add_adapter(tensors: dict[str, FloatArray], adapter: Path) -> None:
    """Add a LoRA adapter to `tensors` in place: `W + scale * B @ A` for every pair it holds.

    Raises:
        UnsupportedModelError: rank, names or shapes do not fit the model.
    """
    scale = adapter_scale(read_json(adapter / ADAPTER_CONFIG_FILE))
    pairs = adapter_pairs(read_tensors(adapter))
    for name, (down, up) in pairs.items():
        weight = tensors.get(name)
        if weight is None or weight.shape != (up.shape[0], down.shape[1]):
            raise UnsupportedModelError(f"adapter tensor for {name!r} does not fit the model")
        tensors[name] = weight + np.float32(scale) * (up @ down)


def adapter_scale(config: Mapping[str, Any]) -> float:
    """Compute `lora_alpha / r`, or `/ sqrt(r)` for rsLoRA."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise UnsupportedModelError(f"{ADAPTER_CONFIG_FILE}: r and lora_alpha are not numbers")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def adapter_pairs(tensors: Mapping[str, FloatArray]) -> dict[str, tuple[FloatArray, FloatArray]]:
    """Pair the (A, B) matrices of an adapter by the name of the weight they change."""
    pairs: dict[str, dict[str, FloatArray]] = {}
    for name, tensor in tensors.items():
        stem = name.removeprefix("base_model.model.")
        for part in ("lora_A", "lora_B"):
            if f".{part}." in stem:
                pairs.setdefault(stem.replace(f".{part}.", ".").replace("default.", ""), {})[
                    part
                ] = tensor
                break
        else:
            raise UnsupportedModelError(f"adapter tensor {name!r} is not LoRA")
    complete = {}
    for target, parts in pairs.items():
        if len(parts) != 2 or any(part.ndim != 2 for part in parts.values()):
            raise UnsupportedModelError(f"adapter for {target!r} is not a pair of matrices")
        if parts["lora_A"].shape[0] != parts["lora_B"].shape[1]:
            raise UnsupportedModelError(f"adapter ranks for {target!r} differ")
        complete[target] = (parts["lora_A"], parts["lora_B"])
    return complete


def _bfloat16(raw: bytearray) -> FloatArray:
    # bf16 is the upper half of a float32.
    return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")


WIDEN: Mapping[str, Callable[[bytearray], FloatArray]] = {
    "BF16": _bfloat16,
    "F16": lambda raw: np.frombuffer(raw, "<f2").astype(np.float32),
    "F32": lambda raw: np.frombuffer(raw, "<f4").copy(),
    "F8_E4M3": e4m3,
    "F8_E5M2": e5m2,
    "F8_E8M0": e8m0,
}
FP8 = ("F8_E4M3", "F8_E5M2")
