"""Quantized tensors: which scale belongs to which weight, of which shape, and their names.

wire-format §6. Only names, dtypes and shapes are looked at: findings only; nothing is read here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hotload.checkpoint.names import CONFIG_FILE, SPEC_FILE
from hotload.checkpoint.safetensors import TensorInfo
from hotload.checkpoint.sub_configs import QUANTIZATION, quantization_settings
from hotload.errors import Finding, shorten
from hotload.quantities import plural

_FP8 = {"F8_E4M3": "e4m3", "F8_E5M2": "e5m2", "F8_E4M3FNUZ": "e4m3", "F8_E5M2FNUZ": "e5m2"}
_LOW_PRECISION = {*_FP8, "F4", "F6_E2M3", "F6_E3M2"}
# 8-bit containers: quantized where they are matrices; two values of 4 bits share a U8.
_BYTES = {"U8", "I8"}
_FULL_PRECISION = {"F64", "F32", "F16", "BF16"}
# What the OCP formats scale by: a power of two. torch has a dtype for it, and many write U8.
_POWERS_OF_TWO = {"F8_E8M0", "U8"}
_PACKED = re.compile(r"(?:weight_packed|qweight|_blocks)$")
# Tensors that only serve to dequantize another one.
_COMPANION = re.compile(
    r"(?:_scale|_scale_inv|_scale_2|_scale_global|_scales|\.scales|_zero_point|\.qzeros|_g_idx"
    r"|\.g_idx|\.weight_shape)$"
)
_SCALES = ("_scale_inv", "_scale", "_scales")
# One per weight above the scales of its groups, as NVFP4 has it.
_SECOND_SCALES = ("_scale_2", "_global_scale", "_scale_global")
_OF_A_WEIGHT = re.compile(
    r"(?P<stem>.*\bweight)"
    r"_(?:scale|scale_inv|scale_2|global_scale|scale_global|zero_point|shape|g_idx)"
)
NVFP4_GROUP, MX_GROUP = 16, 32
# quant_method, and the kinds of numbers it stands for.
_METHODS = {"fp8": {"fp8", "mxfp8"}, "nvfp4": {"nvfp4"}, "mxfp4": {"mxfp4"}}
_KINDS = {"fp8", "mxfp8", "nvfp4", "mxfp4"}

Block = tuple[int, int]
Tensors = Sequence[tuple[str, TensorInfo]]  # with the file of each


class QuantizedTensor(NamedTuple):
    """A weight that is stored in fewer bits, and the scale beside it, if there is one."""

    file: str
    weight: TensorInfo
    scale: TensorInfo | None


def check_quantization(tensors: Tensors, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Check that quantized tensors have `quantization_config` and scales of the right shape, and
    scales their weights.

    The spec names exactly the tensors of the shards (another check), so a scale in a shard is a
    scale in the spec.
    """
    every_setting = quantization_settings(config)
    found = quantized_tensors(tensors, config)
    yield from _check_settings(every_setting, found)
    names = {tensor.name: tensor for _, tensor in tensors}
    block = declared_block(config)
    for one in found:
        if one.scale is None:
            candidates = ", ".join(_scale_names(one.weight.name))
            expected = f"its scale in {one.file} and {SPEC_FILE}: one of {candidates}"
            told = f"{one.weight.dtype} alone"
            yield Finding("missing_scale", one.file, one.weight.name, told, expected)
            continue
        if fitting := _expected_shape(one.weight, one.scale, block):
            shape = shorten(list(one.scale.shape))
            yield Finding("scale_shape", one.file, one.scale.name, shape, fitting)
        second = [f"{_stem(one.weight.name)}{suffix}" for suffix in _SECOND_SCALES]
        if _is_nvfp4(one.weight, one.scale) and names.keys().isdisjoint(second):
            told, expected = "nvfp4 with one scale", f"its second scale: one of {', '.join(second)}"
            yield Finding("missing_scale", one.file, one.weight.name, told, expected)
    yield from _check_owners(tensors, names)


def quantized_tensors(tensors: Tensors, config: Mapping[str, Any]) -> list[QuantizedTensor]:
    """Find the quantized weights of a checkpoint, each with its scale."""
    names = {tensor.name: tensor for _, tensor in tensors}
    is_declared, found = bool(quantization_settings(config)), []
    for file, tensor in tensors:
        if is_companion(tensor.name, names):
            continue
        scale = next((names[name] for name in _scale_names(tensor.name) if name in names), None)
        is_matrix_of_bytes = tensor.dtype in _BYTES and tensor.name.endswith(".weight")
        is_matrix_of_bytes = is_matrix_of_bytes and len(tensor.shape) > 1
        if (
            tensor.dtype in _LOW_PRECISION
            or is_packed(tensor.name)
            or (is_matrix_of_bytes and (is_declared or scale))
        ):
            found.append(QuantizedTensor(file, tensor, scale))
    return found


def describe_quantization(tensors: Tensors, config: Mapping[str, Any]) -> str:
    """Say how the weights are quantized, and how many so; empty where none is."""
    block = declared_block(config)
    found = Counter(
        _scheme(one.weight, one.scale, block)
        for one in quantized_tensors(tensors, config)
        if one.scale
    )
    return ", ".join(f"{plural(count, 'tensor')} in {name}" for name, count in found.most_common())


def declared_block(config: Mapping[str, Any]) -> Block | None:
    """Read how many rows and columns share a scale, as the config says; None where it does not, or
    says several.
    """
    found: set[Block] = set()
    for settings in quantization_settings(config):
        if not isinstance(settings, dict):
            continue
        groups = settings.get("config_groups")
        parts = [*groups.values()] if isinstance(groups, dict) else []
        weights = [part.get("weights") for part in parts if isinstance(part, dict)]
        found |= {
            (block[0], block[1])
            for block in (
                settings.get("weight_block_size"),
                *(one.get("block_structure") for one in weights if isinstance(one, dict)),
            )
            if isinstance(block, list)
            and len(block) == 2
            and all(type(size) is int and size > 0 for size in block)
        }
    return found.pop() if len(found) == 1 else None


def block_of(one: QuantizedTensor, declared: Block | None) -> Block | None:
    """Tell how many rows and columns of a matrix share a number of its scale, be it one of a block,
    a row or all of it; None where its scale is missing or does not fit.

    Blocks that nothing declares are powers of two: of those, one size at most gives so many.
    """
    weight, scale = one.weight, one.scale
    if scale is None or _expected_shape(weight, scale, declared) is not None:
        return None
    shape = _values_shape(weight, scale)
    rows, columns = (1, 1, *shape)[-2:]
    if scale.shape in _plain_scales((*shape[:-2], 1, 1)):
        return rows, columns
    if len(shape) < 2:
        return None
    if block := _block(weight, scale, declared):
        return block
    if scale.shape in _plain_scales(shape):
        return 1, columns
    counts = zip((rows, columns), scale.shape[-2:], strict=True)
    high, wide = (1 << (-(-size // count) - 1).bit_length() for size, count in counts)
    return (high, wide) if _grid(shape, (high, wide)) == scale.shape else None


def is_companion(name: str, names: Container[str]) -> bool:
    """Tell whether a tensor serves to dequantize another one: `x.scale` beside `x.weight`, too."""
    if name.endswith(".scale"):
        return f"{name.removesuffix('scale')}weight" in names
    return _COMPANION.search(name) is not None


def is_packed(name: str) -> bool:
    """Tell whether a name says that several values share an element."""
    return _PACKED.search(name) is not None


def plain_name(name: str) -> str:
    """Tell the name the tensor has where it is not packed."""
    if name.endswith(".qweight"):
        return f"{name.removesuffix('qweight')}weight"
    return name.removesuffix("_packed").removesuffix("_blocks")


def plain_shape(tensor: TensorInfo) -> tuple[int, ...]:
    """Tell the shape of the values where two of 4 bits lie in each byte."""
    if tensor.dtype in _BYTES and tensor.shape:
        return (*tensor.shape[:-1], 2 * tensor.shape[-1])
    return tensor.shape


def _check_settings(
    every_setting: Sequence[Any], found: Sequence[QuantizedTensor]
) -> Iterator[Finding]:
    """Check that `quantization_config` is there where it has to be, and says what is there."""
    methods: set[str] = set()
    for settings in every_setting:
        method: object = settings.get("quant_method") if isinstance(settings, dict) else None
        if not isinstance(method, str):
            expected = "an object with a quant_method"
            yield Finding("quantization_config", CONFIG_FILE, None, shorten(settings), expected)
        methods.add(str(method))
    if found and not every_setting:
        told = f"{found[0].weight.dtype}, and {len(found)} quantized tensors in all"
        expected = f"{QUANTIZATION} in {CONFIG_FILE}, or tensors that are not quantized"
        first = found[0]
        yield Finding("quantization_config", first.file, first.weight.name, told, expected)
    if every_setting and not found:
        told = f"{QUANTIZATION}, though no tensor is quantized"
        expected = "quantized tensors, or no such field"
        yield Finding("quantization_config", CONFIG_FILE, None, told, expected, severity="warning")
    schemes = [_scheme(one.weight, one.scale, None) for one in found if one.scale]
    kinds = {re.split("[ ,]", scheme)[0] for scheme in schemes}
    meant = {kind for method in methods for kind in _METHODS.get(method, _KINDS)}
    if methods and kinds and kinds <= _KINDS - meant:
        told = f"quant_method {', '.join(sorted(methods))}, and tensors in {min(schemes)}"
        expected = f"the quant_method of {min(kinds)}, or tensors as {QUANTIZATION} says"
        yield Finding("quantization_method", CONFIG_FILE, None, told, expected)


def _check_owners(tensors: Tensors, names: Mapping[str, TensorInfo]) -> Iterator[Finding]:
    """Check that every scale has its weight, and that the weight is quantized."""
    has_blocks = any(name.endswith("_blocks") for name in names)
    for file, tensor in tensors:
        owners = _owner_names(tensor.name, has_blocks=has_blocks)
        there = [names[owner] for owner in owners if owner in names]
        if owners and not there:
            expected = f"its weight, {' or '.join(owners)}, or no scale"
            yield Finding("scale_alone", file, tensor.name, "a scale without weight", expected)
        elif there and all(owner.dtype in _FULL_PRECISION for owner in there):
            told = f"a scale beside {there[0].name} in {there[0].dtype}"
            expected = "a quantized weight, or no scale: a server may multiply by it"
            yield Finding("scale_of_plain", file, tensor.name, told, expected, severity="warning")


def _scale_names(name: str) -> tuple[str, ...]:
    """Names that the scale of a weight may have."""
    if name.endswith(".qweight"):
        return (f"{name.removesuffix('qweight')}scales",)
    if name.endswith("_blocks"):
        return (f"{name.removesuffix('_blocks')}_scales",)
    module = name.rpartition(".")[0]
    # The last two are those of bitsandbytes.
    others = (f"{module}.scale", f"{name}.absmax", f"{module}.SCB")
    return (*(f"{_stem(name)}{suffix}" for suffix in _SCALES), *others)


def _owner_names(name: str, *, has_blocks: bool) -> tuple[str, ...]:
    """Names that the weight of a scale may have; none where the name is not one of a scale alone:
    a model may call a parameter of its own `scale`.
    """
    if found := _OF_A_WEIGHT.fullmatch(name):
        return (found["stem"], f"{found['stem']}_packed")
    if name.endswith((".scales", ".qzeros")):
        module = name.rpartition(".")[0]
        return (f"{module}.qweight", f"{module}.weight")
    if has_blocks and name.endswith("_scales"):
        return (f"{name.removesuffix('_scales')}_blocks",)
    return ()


def _stem(name: str) -> str:
    return name.removesuffix("_packed")


def _is_four_bits(weight: TensorInfo, scale: TensorInfo) -> bool:
    """Whether the weight is of FP4: by dtype, or two to a byte with scales in 8 bits."""
    has_small_scales = scale.dtype in _POWERS_OF_TWO | _FP8.keys()
    return weight.dtype == "F4" or (weight.dtype in _BYTES and has_small_scales)


def _is_nvfp4(weight: TensorInfo, scale: TensorInfo) -> bool:
    return _is_four_bits(weight, scale) and scale.dtype == "F8_E4M3"


def _values_shape(weight: TensorInfo, scale: TensorInfo) -> tuple[int, ...]:
    return plain_shape(weight) if _is_four_bits(weight, scale) else weight.shape


def _block(weight: TensorInfo, scale: TensorInfo, declared: Block | None) -> Block | None:
    """Tell the block of a weight that its config declares, or the format has by itself."""
    if _is_four_bits(weight, scale):
        # A config of FP8 may have experts in FP4: its blocks are not theirs.
        if declared is not None and declared[0] == 1:
            return declared
        group = NVFP4_GROUP if _is_nvfp4(weight, scale) else MX_GROUP
        return (1, group) if scale.dtype in _POWERS_OF_TWO | _FP8.keys() else None
    if declared is None and weight.dtype in _FP8 and scale.dtype in _POWERS_OF_TWO:
        is_mx = len(weight.shape) > 1 and scale.shape == _grid(weight.shape, (1, MX_GROUP))
        return (1, MX_GROUP) if is_mx else None
    return declared


def _expected_shape(weight: TensorInfo, scale: TensorInfo, declared: Block | None) -> str | None:
    """Say which shape the scale should have; None where it has it, or headers cannot tell."""
    if weight.name.endswith("_blocks"):
        wanted = weight.shape[:-1]
        return None if scale.shape == wanted else f"{list(wanted)}: one a block"
    if weight.dtype not in _LOW_PRECISION | _BYTES or scale.name.endswith((".absmax", ".SCB")):
        return None
    shape, block = _values_shape(weight, scale), _block(weight, scale, declared)
    if len(shape) < 2:
        return None
    if block is None:
        if scale.shape in _plain_scales(shape) or _is_grid(shape, scale.shape):
            return None
        return f"one scale a tensor, a row or a block of a weight of {list(shape)}"
    wanted = _grid(shape, block)
    if scale.shape == wanted:
        return None
    source = f"{QUANTIZATION} says" if block == declared else "the format has"
    size = f"{block[0]} x {block[1]}"
    return f"{list(wanted)}: blocks of {size}, as {source}, of a weight of {list(shape)}"


def _grid(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def _plain_scales(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Shapes of scales of whole tensors and rows, of each matrix of a stack, too."""
    lead, rows = shape[:-2], shape[-2]
    return {(), (1,), lead, (*lead, 1), (*lead, 1, 1), (*lead, rows), (*lead, rows, 1)}


def _is_grid(shape: tuple[int, ...], scale: tuple[int, ...]) -> bool:
    """Whether blocks of one size give so many scales."""
    if len(scale) != len(shape):
        return False
    if not all(0 < count <= size for count, size in zip(scale, shape, strict=True)):
        return False
    block = -(-shape[-2] // scale[-2]), -(-shape[-1] // scale[-1])
    return _grid(shape, block) == scale


def _scheme(weight: TensorInfo, scale: TensorInfo | None, declared: Block | None) -> str:
    """Name the format as a person does: the kind of number first, then what shares a scale."""
    assert scale is not None
    if weight.name.endswith("_blocks"):
        return f"mxfp4, groups of {MX_GROUP}"
    if weight.dtype not in _LOW_PRECISION | _BYTES:
        return f"integers packed in {weight.dtype}"
    block = _block(weight, scale, declared)
    if _is_four_bits(weight, scale):
        name = "nvfp4" if scale.dtype == "F8_E4M3" else "mxfp4"
    elif weight.dtype in _FP8:
        is_mx = block == (1, MX_GROUP) and scale.dtype in _POWERS_OF_TWO
        name = "mxfp8" if is_mx else f"fp8 {_FP8[weight.dtype]}"
    else:
        name = {"I8": "int8", "U8": "4 bits"}.get(weight.dtype, weight.dtype)
    if block is not None and block[0] == 1:
        return f"{name}, groups of {block[1]}"
    if block is not None:
        return f"{name}, blocks of {block[0]} x {block[1]}"
    shape = _values_shape(weight, scale)
    if scale.shape in _plain_scales((*shape[:-2], 1, 1)):
        return f"{name}, one scale a tensor"
    if len(shape) > 1 and scale.shape in _plain_scales(shape):
        return f"{name}, one scale a row"
    return f"{name}, blocks"
