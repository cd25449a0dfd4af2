"""Text of others, made fit for an HTML page."""

from __future__ import annotations

from html import escape

# A page must not hold controls, and a reader should see that they were there: U+2400 and so on are
# their pictures.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}


def safe(text: str) -> str:
    """The text as the browser shall show it: `<`, `>`, `&` and quotes escaped, controls drawn."""
    return escape(text.translate(_CONTROLS))
