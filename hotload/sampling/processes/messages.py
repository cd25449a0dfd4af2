"""What crosses between a rollout's coordinator and its sampling processes: values alone.

To a process go pickles: its work, then calls as (number, method, arguments), at last None. What
it sends is a pickle after its length: an answer or an error by the number of the call, and unasked
what the coordinator acts on.
"""

import asyncio
import pickle
from typing import Any

LENGTH_BYTES = 8


def pack_message(message: tuple[Any, ...]) -> bytes:
    """Pickle a message, its length before it."""
    data = pickle.dumps(message)
    return len(data).to_bytes(LENGTH_BYTES, "big") + data


async def read_message(source: asyncio.StreamReader) -> tuple[Any, ...]:
    """Read a message.

    Raises:
        asyncio.IncompleteReadError: there are no more.
    """
    size_bytes = int.from_bytes(await source.readexactly(LENGTH_BYTES), "big")
    message: tuple[Any, ...] = pickle.loads(await source.readexactly(size_bytes))
    return message
