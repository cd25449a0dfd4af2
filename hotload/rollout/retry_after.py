"""The header Retry-After (RFC 9110 §10.2.3)."""

from __future__ import annotations

from email.utils import parsedate_to_datetime
from math import isfinite


def retry_after_seconds(text: str | None, date: str | None = None) -> float | None:
    """Read the seconds to wait: a number, or a date counted from `date`, the server's own clock;
    `None` for anything else.
    """
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            until, now = parsedate_to_datetime(text), parsedate_to_datetime(date or "")
            seconds = (until - now).total_seconds()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(0.0, seconds) if isfinite(seconds) else None
