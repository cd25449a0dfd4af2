"""Retry-After in all its forms."""

import pytest

from hotload.rollout.retry_after import retry_after_seconds

DATE = "Sun, 06 Nov 1994 08:49:37 GMT"
LATER = "Sun, 06 Nov 1994 08:50:07 GMT"


@pytest.mark.parametrize(
    ("text", "date", "seconds"),
    [
        ("7", None, 7),
        ("0.5", None, 0.5),
        ("-3", None, 0),
        (LATER, DATE, 30),
        (DATE, LATER, 0),
        (LATER, None, None),
        (LATER, "today", None),
        (LATER, "Sun, 06 Nov 1994 08:49:37", None),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", DATE, None),
        ("soon", DATE, None),
        ("nan", None, None),
        ("inf", None, None),
        ("", None, None),
        (None, DATE, None),
    ],
)
def test_seconds_to_wait(text: str | None, date: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(text, date) == seconds
