"""Whether the checkpoint is all of the model that its own config.json describes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hotload.checkpoint.anatomy import Parts
from hotload.checkpoint.names import CONFIG_FILE
from hotload.checkpoint.sub_configs import expert_counts, is_tied, layer_count, vocab_size
from hotload.errors import Finding, Severity, shorten

# Of these a reinforcement-learning service samples; others, as classifiers, have no such head.
_GENERATIVE = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


def check_complete(parts: Parts, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Find the layers, experts, embeddings and head that config.json promises and no shard holds.

    An index that lacks the same tensors agrees with the shards; a replica would fill the gap with
    random weights, or fail.
    """
    yield from _check_layers(parts, config)
    yield from _check_experts(parts, config)
    size = vocab_size(config)
    if size and parts.stacks and not parts.embeddings:
        found = "no embeddings by name, and no matrix of that many rows"
        expected = f"one row for each of vocab_size = {size} tokens in {CONFIG_FILE}"
        yield Finding("no_embeddings", CONFIG_FILE, None, found, expected, severity="warning")
    if is_tied(config) is False and parts.embeddings and not parts.heads:
        found = "tie_word_embeddings: false, and no head in any shard"
        expected = "the head's tensor, or tie_word_embeddings: true"
        severity: Severity = "error" if _is_generative(config) else "warning"
        yield Finding("missing_head", CONFIG_FILE, None, found, expected, severity=severity)


def _check_layers(parts: Parts, config: Mapping[str, Any]) -> Iterator[Finding]:
    count = layer_count(config)
    if count is None or not parts.tensors:
        return
    if not parts.stacks:
        found, expected = "no numbered layers", f"{count}, as {CONFIG_FILE} says"
        yield Finding("no_layers", CONFIG_FILE, None, found, expected, severity="warning")
        return
    roots = {one.name.rpartition(".")[0].rpartition(".")[0] for one in parts.embeddings}
    beside = [stack for stack in parts.stacks if any(_is_under(stack, root) for root in roots)]
    stacks = {stack: parts.stacks[stack] for stack in beside or parts.stacks}
    missing = {stack: _first_missing(numbers, count) for stack, numbers in stacks.items()}
    # Others may count otherwise: an encoder beside the decoder, a tower for images.
    if all(number is not None for number in missing.values()):
        stack = max(stacks, key=lambda one: len(stacks[one]))
        found = f"{len(stacks[stack])} layers of {shorten(stack)}, none of number {missing[stack]}"
        expected = f"layers 0 to {count - 1}, as {CONFIG_FILE} says"
        yield Finding("missing_layers", CONFIG_FILE, None, found, expected)


def _check_experts(parts: Parts, config: Mapping[str, Any]) -> Iterator[Finding]:
    """Find what a rank of an expert-parallel trainer did not write."""
    counts = expert_counts(config)
    if not counts:
        return
    found: dict[str, set[str]] = {}
    for tensor in parts.tensors:
        module, mark, rest = tensor.name.partition(".experts.")
        number = rest.partition(".")[0]
        if mark and number.isascii() and number.isdigit():
            found.setdefault(module, set()).add(number)
    for module, numbers in found.items():
        count = len(numbers)
        if count not in counts:
            count = min((one for one in counts if one > count), default=max(counts))
        missing = _first_missing(frozenset(numbers), count)
        if missing is not None:
            lacking = f"{len(numbers)} experts of {shorten(module)}, none of number {missing}"
            expected = f"experts 0 to {count - 1}"
            yield Finding("missing_experts", CONFIG_FILE, None, lacking, expected)


def _first_missing(numbers: frozenset[str], count: int) -> int | None:
    # However large the count is, one of the first len(numbers) + 1 numbers tells.
    limit = min(count, len(numbers) + 1)
    return next((number for number in range(limit) if str(number) not in numbers), None)


def _is_under(stack: str, root: str) -> bool:
    return not root or stack.startswith(f"{root}.")


def _is_generative(config: Mapping[str, Any]) -> bool:
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        return True
    return any(str(name).endswith(_GENERATIVE) for name in names)
