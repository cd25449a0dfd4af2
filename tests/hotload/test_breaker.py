"""The breaker opens after a streak, or at half of what was seen lately (protocol §16)."""

import pytest

from hotload.rollout.breaker import Breaker


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
