"""Fills the templates of the pages: every text is escaped, and its control characters are drawn."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from hotload.quantities import duration, number, percent, plural, size, version_words

# A page must not hold controls, and a reader should see that they were there: U+2400 and so on are
# their pictures. Half a surrogate pair, which JSON may hold, cannot be written as UTF-8.
_DRAWN = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {
    0x7F: 0x2421,
    **dict.fromkeys((*range(0x80, 0xA0), *range(0xD800, 0xE000)), 0xFFFD),
}


def _draw_controls(value: Any) -> Any:
    return value.translate(_DRAWN) if isinstance(value, str) else value


_TEMPLATES = Environment(
    loader=PackageLoader("hotload.report"),
    autoescape=True,
    finalize=_draw_controls,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {
    "number": number,
    "size": size,
    "duration": duration,
    "percent": percent,
    "plural": plural,
    "version": version_words,
}


def render(template: str, **values: Any) -> str:
    """Fill a template of this room; only what is `Markup` keeps its tags."""
    return _TEMPLATES.get_template(template).render(values)
