"""Numbers for a person: three figures, a unit, thousands apart."""

from __future__ import annotations

LONG = 1e12
BYTES_PER_GB = 1e9


def number(value: float) -> str:
    """`12,345`, `123`, `12.3`, `0.123`, `0.0004`, `1.2e-07`, `1e+30`; whole numbers whole, a minus
    sign that is one.
    """
    if value != value or value in (float("inf"), float("-inf")):
        return "–"
    size = abs(value)
    shown = float(f"{size:.3g}")  # 9.999 has as many figures as 10.0
    if size >= LONG or 0 < shown < 0.01:
        text = f"{size:.3g}"
    elif shown >= 100 or float(value).is_integer():
        text = f"{size:,.0f}"
    else:
        text = f"{size:.{1 if shown >= 10 else 2 if shown >= 1 else 3}f}"
    return f"−{text}" if value < 0 else text


def duration(seconds: float) -> str:
    """`0 s`, `85 ms`, `2 s`, `2.4 s`, `41 s`, `3 min 20 s`, `1 h 5 min`."""
    if seconds <= 0:
        return "0 s"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.001 else "< 1 ms"
    if seconds < 10 and not float(seconds).is_integer():
        return f"{seconds:.1f} s" if seconds < 9.95 else "10 s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    whole = round(seconds)
    if whole < 3600:
        minutes, rest = divmod(whole, 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours} h {rest} min" if rest else f"{hours} h"


def size(size_bytes: float) -> str:
    """`0 B`, `12 B`, `3.4 kB`, `1.2 MB`, `941 MB`, `1.5 TB` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 999.5:
            is_whole = unit == "B" or size_bytes >= 99.95
            return f"{size_bytes:.0f} {unit}" if is_whole else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.1f} TB"


def percent(part: float, whole: float) -> str:
    """`38 %`, `4.1 %`, `< 0.1 %`; `–` of nothing."""
    if not whole:
        return "–"
    share = 100 * part / whole
    if 0 < share < 0.1:
        return "< 0.1 %"
    return f"{share:.0f} %" if share >= 10 or share == int(share) else f"{share:.1f} %"


def plural(count: int, noun: str) -> str:
    """`1 sample`, `2,000 samples`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def version_words(policy_version: int, line: int = 0) -> str:
    """`3`, and `3 of line 1` where the run has gone on from an earlier version."""
    return f"{policy_version} of line {line}" if line else str(policy_version)
