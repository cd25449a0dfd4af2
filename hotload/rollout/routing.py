"""Routes: the experts that each token was sent to, out of what services send (protocol §12).

A sequence of N tokens, prompt and answer, has N−1 rows of int16: row i is of the forward over token
i, which predicts token i+1. The last token, which nothing follows, has none. A row has every active
expert of every layer with experts, and is −1 throughout where the service told none.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Routes = npt.NDArray[np.int16]
"""`[N−1, layers with experts × active experts]`."""
NO_ROUTE = -1
ITEM = np.dtype("<i2")
EXPERT_LIMIT, MATRIX_LIMIT = np.iinfo(ITEM).max, np.iinfo(np.uint8).max


def routes_of_matrices(matrices: Sequence[str], prompt_length: int) -> bytes:
    """Lay out the routes of an answer, from a `routing_matrix` for each of its tokens: base64 of
    uint8, of the forward that predicted it. All of the prompt but its last token has none.

    Raises:
        ValueError: not base64, or not all of one size.
    """
    rows = [np.frombuffer(_bytes_of(text), np.uint8) for text in matrices]
    if len({row.size for row in rows}) != 1 or not rows[0].size:
        raise ValueError("routing matrices of several sizes, or of none")
    untold = np.full((prompt_length - 1, rows[0].size), NO_ROUTE, ITEM)
    return np.concatenate([untold, np.stack(rows).astype(ITEM)]).tobytes()


def routes_of_array(text: str, token_count: int) -> bytes:
    """Lay out the routes of an answer, from vLLM's `routed_experts`: base64 of a .npy file with
    integers `[N−1, layers, active experts]`.

    Args:
        token_count: N, the tokens of prompt and answer.

    Raises:
        ValueError: it is not of that form.
    """
    file = io.BytesIO(_bytes_of(text))
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("routes in a .npy file of an unknown version")
    shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if len(shape) != 3 or shape[0] != token_count - 1 or is_fortran or dtype.kind not in "iu":
        expected = f"integers [{token_count - 1}, layers, experts]"
        raise ValueError(f"routes of form {dtype} {list(shape)}, expected {expected}")
    experts = np.frombuffer(file.read(), dtype).reshape(shape)
    if experts.size and not NO_ROUTE <= experts.min() <= experts.max() <= EXPERT_LIMIT:
        raise ValueError(f"routes with expert {experts.max()}, expected 0 to {EXPERT_LIMIT}")
    return experts.astype(ITEM).tobytes()


def extend_routes(
    before: bytes, before_count: int, after: bytes | None, count: int
) -> bytes | None:
    """Lay out the routes of a sequence that went on: the rows it had, then those of the answer that
    made it `count` tokens long; `None` where the two do not fit each other.

    Args:
        before_count: tokens of the sequence until now.
        after: of the whole sequence, as the answer told them; `None` where it sampled nothing.
    """
    row_size = len(before) // (before_count - 1)
    if after is None:
        return before + ITEM.type(NO_ROUTE).tobytes() * (
            row_size // ITEM.itemsize * (count - before_count)
        )
    return before + after[len(before) :] if len(after) == row_size * (count - 1) else None


def read_routes(routes: bytes, token_count: int) -> Routes:
    """Read the routes of a sequence of so many tokens; read-only.

    Raises:
        ValueError: they are not of that many.
    """
    flat = np.frombuffer(routes, ITEM) if len(routes) % ITEM.itemsize == 0 else np.empty(0, ITEM)
    if token_count < 2 or not flat.size or flat.size % (token_count - 1):
        raise ValueError(f"{len(routes)} bytes of routes for {token_count} tokens")
    return flat.reshape(token_count - 1, -1)


def pack_matrices(routes: Routes) -> list[str]:
    """Pack routes as the vendor's trainer takes them: a `routing_matrix` for every input position,
    empty where there is none.

    Raises:
        ValueError: an expert's number is no byte.
    """
    if routes.max(initial=0) > MATRIX_LIMIT:
        raise ValueError(f"routes with expert {routes.max()}, expected 0 to {MATRIX_LIMIT}")
    return [
        "" if (row < 0).any() else base64.b64encode(row.astype(np.uint8)).decode() for row in routes
    ]


def _bytes_of(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, binascii.Error):
        raise ValueError("routes that are not base64") from None
