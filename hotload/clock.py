"""The clock: every wait and every moment of the program is read here (docs/simulation.md)."""

import asyncio
import time
from datetime import UTC, datetime


def monotonic() -> float:
    """Return the seconds of the clock that deadlines are kept by: the running loop's own.

    In a thread there is no loop, and the system's is the same clock.
    """
    try:
        return asyncio.get_running_loop().time()
    except RuntimeError:
        return time.monotonic()


def utc_now() -> datetime:
    """Return the moment by this host's wall clock, in UTC."""
    return datetime.now(UTC)
