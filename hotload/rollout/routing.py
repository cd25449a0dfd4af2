"""The experts each token was routed to, as arrays (protocol §12)."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


def join_routing(matrices: Iterable[str]) -> bytes:
    """Join the matrices of all tokens, from one base64 text per token.

    Raises:
        ValueError: not base64, or not all of one size.
    """
    decoded = [_bytes_of(text) for text in matrices]
    if len(set(map(len, decoded))) > 1:
        raise ValueError("routing matrices of several sizes")
    return b"".join(decoded)


def routing_array(
    routing: str, token_count: int, *, active_expert_count: int
) -> npt.NDArray[np.uint8]:
    """Read the experts of every token, `uint8[T, moe_layers, active_experts]`; read-only.

    Args:
        routing: `Trajectory.routing_matrix`.
        token_count: T, the tokens of the trajectory's first segment.
        active_expert_count: experts a token is sent to per layer; the model's config knows it.

    Raises:
        ValueError: the bytes do not divide into that form.
    """
    flat = np.frombuffer(_bytes_of(routing), np.uint8)
    per_token = active_expert_count * token_count
    if per_token <= 0 or not len(flat) or len(flat) % per_token:
        expected = f"{token_count} tokens of {active_expert_count} experts"
        raise ValueError(f"{len(flat)} bytes of routing for {expected}")
    return flat.reshape(token_count, -1, active_expert_count)


def _bytes_of(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, binascii.Error):
        raise ValueError("a routing matrix that is not base64") from None
