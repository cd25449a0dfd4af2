"""Reading ahead of a reader: every byte right, several pieces at once, never many."""

import threading
from random import Random

import pytest

from hotload.directory.remote import FIRST_BYTES, PIECE_BYTES, PIECES_AHEAD, ReadAhead
from tests.waiting import PATIENCE_SECONDS

DATA = Random(7).randbytes(3 * PIECE_BYTES) * 3


class Afar:
    """Bytes whose reads are recorded, as (offset, size)."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, int]] = []
        self.open = threading.Event()
        self.open.set()
        self.arrived = threading.Semaphore(0)

    def fill(self, offset: int, view: memoryview) -> None:
        self.reads.append((offset, len(view)))
        self.arrived.release()
        assert self.open.wait(PATIENCE_SECONDS)
        view[:] = DATA[offset : offset + len(view)]


def read(ahead: ReadAhead, offset: int, size: int) -> bytes:
    data = bytearray(size)
    ahead.read_into(offset, memoryview(data))
    return bytes(data)


@pytest.mark.parametrize("step", [1 << 20, PIECE_BYTES, 3 * PIECE_BYTES - 5])
def test_bytes_in_their_order_are_read_once(step: int) -> None:
    afar = Afar()
    ahead = ReadAhead(afar.fill, len(DATA))
    for at in range(0, len(DATA), step):
        size = min(step, len(DATA) - at)
        assert read(ahead, at, size) == DATA[at : at + size]
    ahead.close()
    assert sum(size for _, size in afar.reads) == len(DATA)


def test_bytes_in_any_order_are_right() -> None:
    ahead, order = ReadAhead(Afar().fill, len(DATA)), Random(3)
    at = 0
    for _ in range(300):
        if order.random() < 0.5:
            at = order.randrange(len(DATA))
        size = min(order.choice([0, 1, 100, 1 << 16, PIECE_BYTES + 1]), len(DATA) - at)
        assert read(ahead, at, size) == DATA[at : at + size]
        at += size
    ahead.close()


def test_a_header_costs_one_small_read() -> None:
    afar = Afar()
    ahead = ReadAhead(afar.fill, len(DATA))
    assert read(ahead, 0, 8) + read(ahead, 0, 5000) == DATA[:8] + DATA[:5000]
    assert afar.reads == [(0, FIRST_BYTES)]
    assert read(ahead, 0, FIRST_BYTES + 3) == DATA[: FIRST_BYTES + 3]
    assert afar.reads[1:] == [(FIRST_BYTES, 3)]
    ahead.close()


def test_several_pieces_are_under_way_at_once_and_no_more() -> None:
    afar = Afar()
    ahead = ReadAhead(afar.fill, 1 << 40)
    read(ahead, 0, 8)
    assert afar.arrived.acquire(timeout=PATIENCE_SECONDS)
    afar.open.clear()
    reader = threading.Thread(target=read, args=(ahead, 8, 1 << 20))
    reader.start()
    for _ in range(PIECES_AHEAD):
        assert afar.arrived.acquire(timeout=PATIENCE_SECONDS)
    afar.open.set()
    reader.join()
    ahead.close()
    assert len(afar.reads) <= 2 + PIECES_AHEAD


def test_a_failed_piece_is_told_to_whoever_asks_for_it() -> None:
    def fill(offset: int, view: memoryview) -> None:
        if offset:
            raise OSError(f"at {offset}")
        view[:] = DATA[: len(view)]

    ahead = ReadAhead(fill, len(DATA))
    assert read(ahead, 0, 8) == DATA[:8]
    with pytest.raises(OSError, match=f"at {FIRST_BYTES}"):
        read(ahead, 8, FIRST_BYTES)
    ahead.close()
