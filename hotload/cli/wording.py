"""How numbers and names are worded for a person."""

from __future__ import annotations

from collections.abc import Sequence


def ratio(whole: int, part: int) -> str:
    """Say how many times smaller the part is."""
    times = whole / part if part else 1.0
    return f"{times:,.0f}" if times >= 1000 else f"{times:.1f}"


def density_percent(density: float | None) -> str:
    """Show a share in per cent; a dash where it is unknown."""
    return "–" if density is None else f"{density:.2%}"


def one_line(text: str) -> str:
    """Escape whatever would move a terminal's cursor: names come from files."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns: the first to the left, all others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return [
        "  ".join(
            one_line(cell).ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
