"""The breaker opens after a streak, or at half of what was seen lately (protocol §16), and after
requests in a row that swaps of weights kept from an answer."""

import pytest

from hotload.rollout.breaker import Breaker
from hotload.rollout.failures import failure_of_status


@pytest.mark.parametrize(
    ("rows", "opens_after"),
    [
        ("xxxxx", 5),
        ("xxxx.xxxx.xx", 10),  # never five in a row, but half of ten
        (".....xxxxx", 10),
        ("x.x.x.x.x", None),  # half of nine and more: too few were seen
        ("x.x.x.x.x.", 10),
        ("." * 15 + "xxxx.xxxx.xx", 27),
        ("." * 30 + "xxx." * 2 + "xxxx", 42),
        ("", None),
    ],
)
def test_when_it_opens(rows: str, opens_after: int | None) -> None:
    breaker = Breaker()
    opened = []
    for row in rows:
        breaker.note(is_failure=row == "x")
        opened.append(breaker.is_open)
    assert (opened.index(True) + 1 if True in opened else None) == opens_after


def test_it_stays_open() -> None:
    breaker = Breaker()
    for _ in range(5):
        breaker.note(is_failure=True)
    for _ in range(50):
        breaker.note(is_failure=False)
    assert breaker.is_open


SWAP, TIMEOUT, REFUSED = (failure_of_status(status, "", "") for status in (425, 504, 400))
REQUESTS = {
    "s": (SWAP, True),
    "h": (TIMEOUT, True),  # refused for a swap, then held until it timed out
    "t": (TIMEOUT, False),
    "r": (REFUSED, False),
    "R": (REFUSED, True),
    ".": (None, False),
    "!": (None, True),
}


@pytest.mark.parametrize(
    ("requests", "opens_after"),
    [
        ("sssss", 5),
        ("shshs", 5),
        ("ssss.sssss", 10),
        ("ssss!sssss", 10),
        ("ssssrssssRsssss", 15),  # a refusal is an answer: the service is there
        ("sttstttstsss", 11),  # time-outs alone say nothing of swaps, and end no run of them
        ("ttttttttttttttttttttt", None),
        ("ssss.ssss.ssss.ssss.", None),
    ],
)
def test_requests_that_swaps_keep_from_an_answer(requests: str, opens_after: int | None) -> None:
    breaker = Breaker()
    opened = []
    for request in requests:
        failure, met_swap = REQUESTS[request]
        breaker.note_request(failure, met_swap=met_swap)
        opened.append(breaker.is_open)
    assert (opened.index(True) + 1 if True in opened else None) == opens_after
