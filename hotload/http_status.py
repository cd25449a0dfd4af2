"""HTTP status codes: what each says, whoever sent it (protocol §2, §13).

What to do about it each caller decides: `clients.service.calls` for the hot-load service,
`rollout.failures` for samples, `clients.store.failures` for a store.
"""

from __future__ import annotations

from enum import Enum


class StatusMeaning(Enum):
    """What an answer's status says."""

    GOOD = "the request was carried out"
    REDIRECT = "the answer is elsewhere, or not final"
    BAD_REQUEST = "this request is wrong or too large"
    NO_ACCESS = "the key, its account or its rights are not enough"
    NOT_FOUND = "no such name, or not yet"
    NOT_LOADABLE = "suspended, or the adapter cannot be loaded"
    TOO_EARLY = "not yet; the service is swapping weights"
    TIMEOUT = "not done in time"
    BUSY = "too much to do"
    SERVER_ERROR = "the server failed"
    OTHER = "nothing the protocol knows"


_MEANINGS = {
    400: StatusMeaning.BAD_REQUEST,
    401: StatusMeaning.NO_ACCESS,
    402: StatusMeaning.NO_ACCESS,
    403: StatusMeaning.NO_ACCESS,
    404: StatusMeaning.NOT_FOUND,
    408: StatusMeaning.TIMEOUT,
    412: StatusMeaning.NOT_LOADABLE,
    413: StatusMeaning.BAD_REQUEST,
    422: StatusMeaning.BAD_REQUEST,
    425: StatusMeaning.TOO_EARLY,
    429: StatusMeaning.BUSY,
    503: StatusMeaning.BUSY,
    504: StatusMeaning.TIMEOUT,
}

MAY_PASS = frozenset(
    {
        StatusMeaning.TOO_EARLY,
        StatusMeaning.TIMEOUT,
        StatusMeaning.BUSY,
        StatusMeaning.SERVER_ERROR,
    }
)
"""What may be answered otherwise the next time, by inference or a store. The hot-load service's own
answers are fewer: it knows no 425."""


def meaning_of(status_code: int) -> StatusMeaning:
    """Return what a status code says."""
    if status_code in _MEANINGS:
        return _MEANINGS[status_code]
    if 200 <= status_code < 300:
        return StatusMeaning.GOOD
    if status_code < 400:
        return StatusMeaning.REDIRECT
    return StatusMeaning.SERVER_ERROR if status_code >= 500 else StatusMeaning.OTHER
