"""The table of a preview: each way to publish, what it costs, and which one is chosen."""

from __future__ import annotations

from collections.abc import Iterator

from hotload.cli.wording import text_table
from hotload.publish.cost import PublicationPreview, SnapshotCost
from hotload.quantities import duration, number, size

NOT_KNOWN = "–"


def preview_lines(preview: PublicationPreview) -> Iterator[str]:
    """Word a preview in lines: the plan, its reason, a row for every way, and what else to know."""
    plan = preview.plan
    if plan is None:
        yield f"nothing: this cycle has ended; the service serves {preview.served}"
        return
    if preview.options:
        yield f"{plan.kind} {plan.identity}"
    else:
        yield f"nothing to upload: {plan.kind} {plan.identity} lies in the store"
    yield f"why: {plan.reason}"
    yield f"served now: {preview.served}"
    if preview.options:
        has_money = any(one.money is not None for one in preview.options)
        head = ["", "bytes", "egress", "late joiner", "time", *(["money"] if has_money else [])]
        rows = [_cells(one, is_chosen=one.kind is plan.kind) for one in preview.options]
        yield from text_table(head, [row[: len(head)] for row in rows])
    yield from (f"note: {line}" for line in preview.notes)


def _cells(cost: SnapshotCost, *, is_chosen: bool) -> list[str]:
    return [
        f"{'*' if is_chosen else ' '} {cost.kind}",
        size(cost.size_bytes),
        size(cost.egress_bytes),
        size(cost.replay_bytes),
        NOT_KNOWN if cost.seconds is None else duration(cost.seconds),
        NOT_KNOWN if cost.money is None else number(cost.money),
    ]
