"""The gate: rows of earlier parts first, and nothing lost when a waiting row is given up."""

import asyncio

from hotload.rollout.admission import Admission
from hotload.sampling.row_gate import Gate


def gate(limit: int = 4) -> tuple[Gate, Admission]:
    """Rows of 2, 100 of them, `limit` samples at once."""
    admission = Admission(
        group_size=2, batch_size=200, initial_version=1, max_head_offpolicy_versions=0
    )
    return Gate(admission, lambda: limit), admission


def end_row(rows: Gate) -> None:
    """Both draws of a row end, and it is settled."""
    rows.end()
    rows.end()
    rows.end_row()
    rows.leave(is_kept=True)


async def settle() -> None:
    """Let every task run as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_rows_of_earlier_parts_go_first() -> None:
    rows, _ = gate(limit=2)
    entered: list[int] = []

    async def enter(part: int) -> None:
        await rows.enter(part)
        entered.append(part)

    await rows.enter(0)
    waiting = [asyncio.create_task(enter(part)) for part in (2, 1, 3, 1)]
    await settle()
    assert entered == []
    for count in range(1, 5):
        end_row(rows)
        await settle()
        assert entered == [1, 1, 2, 3][:count]
    await asyncio.gather(*waiting)


async def test_a_part_that_has_rows_to_begin_holds_back_later_ones() -> None:
    rows, _ = gate(limit=100)
    with rows.beginning(0):
        later = asyncio.create_task(rows.enter(1))
        await rows.enter(0)
        await settle()
        assert not later.done()
    await settle()
    assert later.done()


async def test_draws_that_end_let_the_next_row_in_whatever_became_of_theirs() -> None:
    rows, _ = gate(limit=4)
    await rows.enter(0)
    await rows.enter(0)
    waiting = asyncio.create_task(rows.enter(0))
    rows.end()
    await settle()
    assert not waiting.done()
    rows.end()  # of the one row or one of each
    await settle()
    assert waiting.done()


async def test_a_row_that_is_given_up_leaves_no_trace() -> None:
    rows, admission = gate(limit=2)
    await rows.enter(0)
    waiting = asyncio.create_task(rows.enter(0))
    await settle()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    let_in = asyncio.create_task(rows.enter(0))
    await settle()
    end_row(rows)  # lets the row in, before its task has run
    let_in.cancel()
    await asyncio.gather(let_in, return_exceptions=True)
    counts = admission.in_flight, admission.sampled, admission.reserved, admission.accepted
    assert counts == (0, 0, 0, 2)


async def test_a_stale_gate_stands_open() -> None:
    rows, _ = gate(limit=2)
    await rows.enter(0)
    waiting = asyncio.create_task(rows.enter(0))
    await settle()
    assert not waiting.done()
    assert rows.publish(2)
    await waiting
    assert rows.is_stale
