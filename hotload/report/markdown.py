"""The cycle's report as Markdown, for a person who looks at the flow run in Prefect's UI."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from hotload.quantities import number, size, version_words
from hotload.report.cycle_report import CycleReport
from hotload.report.run_history import RunVersion

BAR_WIDTH = 20
# Text of others goes into these tables: no markup, no link, no further column.
_MARKUP = re.compile(r"([\\`*_{}\[\]<>|#~!&:@])")


def render_markdown(report: CycleReport, versions: Sequence[RunVersion], page: str) -> str:
    """Render the figures of one cycle, below those of its run's versions so far.

    Args:
        versions: rows of the run's last versions, this one among them, oldest first.
        page: where the page with all charts lies in the store.
    """
    return "\n".join(
        [
            f"## Run {_plain(report.run_id)}",
            *_table(("version", "snapshot", "sent", "mean reward", ""), _version_rows(versions)),
            "",
            f"## Version {version_words(report.policy_version, report.line)}",
            *_table(
                ("what", "value"),
                [(_plain(row["what"]), _plain(row["value"])) for row in report.rows()],
            ),
            "",
            f"The page with all charts: {_plain(page)}",
        ]
    )


def _version_rows(versions: Sequence[RunVersion]) -> list[tuple[str, ...]]:
    """One row a version: the chain, bytes sent, and the reward as a bar from the lowest up."""
    known = [one.mean_reward for one in versions if one.mean_reward is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    return [
        (
            version_words(one.policy_version, one.line),
            _snapshot(one),
            "" if one.outcome == "not due" else size(one.size_bytes),
            "–" if one.mean_reward is None else number(one.mean_reward),
            "" if one.mean_reward is None else _bar(one.mean_reward, low, high),
        )
        for one in versions
    ]


def _snapshot(version: RunVersion) -> str:
    if version.outcome == "not due":
        return f"not due, sampled {_plain(version.identity)}"
    follows = f" on {_plain(version.previous)}" if version.previous else ""
    fell_back = ", a delta failed" if version.outcome == "fell back" else ""
    return f"{version.kind.value} {_plain(version.identity)}{follows}{fell_back}"


def _bar(value: float, low: float, high: float) -> str:
    share = (value - low) / (high - low) if high > low else 1.0
    return "█" * (1 + round((BAR_WIDTH - 1) * share))


def _table(headings: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [headings, ("---",) * len(headings), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _plain(text: str) -> str:
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))
