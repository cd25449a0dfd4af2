"""The table of a retention: what stays, what goes, with bytes, reasons and money."""

from __future__ import annotations

from collections.abc import Iterator

from hotload.cli.wording import text_table
from hotload.publish.retention import Retention, RetentionRow, sums_of
from hotload.quantities import size

NO_KIND = "–"


def retention_lines(
    retention: Retention, price_per_gb_month: float | None, *, is_done: bool
) -> Iterator[str]:
    """Word a retention in lines: a row for every snapshot, the sums, and what is in doubt.

    Args:
        price_per_gb_month: of 10^9 bytes, in any currency; None shows no money.
        is_done: whether what goes is gone already.
    """
    if retention.rows:
        head, *lines = text_table(
            ("snapshot", "kind", "bytes", "fate"), [_cells(row, is_done) for row in retention.rows]
        )
        yield head
        yield from (
            f"{line}  {row.reason}" for line, row in zip(lines, retention.rows, strict=True)
        )
    for cycle in retention.old_cycles:
        goes = "removed" if is_done else "goes"
        yield f"{cycle.name}: report, metrics and rollouts, {size(cycle.size_bytes)}, {goes}"

    yield sums_of(retention, is_done=is_done, price_per_gb_month=price_per_gb_month)
    yield from (f"in doubt: {line}" for line in retention.obstacles)
    yield from (f"note: {line}" for line in retention.notes)


def _cells(row: RetentionRow, is_done: bool) -> tuple[str, str, str, str]:
    snapshot = row.snapshot
    fate = "stays" if row.is_kept else "removed" if is_done else "goes"
    kind = snapshot.kind.value if snapshot.kind else NO_KIND
    return snapshot.identity, kind, size(snapshot.size_bytes), fate
