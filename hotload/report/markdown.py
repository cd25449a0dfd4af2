"""The cycle's report as Markdown, for a person who looks at the flow run in Prefect's UI."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from hotload.quantities import number, size
from hotload.report.cycle_report import CycleReport

BAR_WIDTH = 20
# Text of others goes into these tables: no markup, no link, no further column.
_MARKUP = re.compile(r"([\\`*_{}\[\]<>|#~!&:@])")


def render_markdown(report: CycleReport, earlier: Sequence[CycleReport], page: str) -> str:
    """Render the figures of one cycle, below those of its run's versions so far.

    Args:
        earlier: reports of versions before, oldest first.
        page: where the page with all charts lies in the store.
    """
    versions = [*earlier, report]
    return "\n".join(
        [
            f"## Run {_plain(report.run_id)}",
            *_table(("version", "snapshot", "sent", "mean reward", ""), _version_rows(versions)),
            "",
            f"## Version {report.policy_version}",
            *_table(
                ("what", "value"),
                [(_plain(row["what"]), _plain(row["value"])) for row in report.rows()],
            ),
            "",
            f"The page with all charts: {_plain(page)}",
        ]
    )


def _version_rows(reports: Sequence[CycleReport]) -> list[tuple[str, ...]]:
    """One row a version: the chain, bytes sent, and the reward as a bar from the lowest up."""
    rewards = [one.rollouts.mean_reward for one in reports]
    known = [reward for reward in rewards if reward is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    return [
        (
            str(report.policy_version),
            _snapshot(report),
            size(report.snapshot.size_bytes) if report.is_published else "",
            "–" if reward is None else number(reward),
            "" if reward is None else _bar(reward, low, high),
        )
        for report, reward in zip(reports, rewards, strict=True)
    ]


def _snapshot(report: CycleReport) -> str:
    snapshot = report.snapshot
    if not report.is_published:
        return f"not due, sampled {_plain(snapshot.identity)}"
    follows = f" on {_plain(snapshot.previous)}" if snapshot.previous else ""
    fell_back = ", a delta failed" if report.fallback_reason else ""
    return f"{snapshot.kind.value} {_plain(snapshot.identity)}{follows}{fell_back}"


def _bar(value: float, low: float, high: float) -> str:
    share = (value - low) / (high - low) if high > low else 1.0
    return "█" * (1 + round((BAR_WIDTH - 1) * share))


def _table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [headings, ("---",) * len(headings), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _plain(text: str) -> str:
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))
