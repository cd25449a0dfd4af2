"""The number that ends a text: GSM8K's `#### 72`, MATH's `\\boxed{\\frac{1}{2}}`, or the last one.

Numbers are exact. `%`, units and currency are not looked at: `50%` is 50. What is no number by
itself (`2\\pi`, `10^2`, `5 million`) is not read as one. Every pattern takes time in proportion to
the text, whatever it says.
"""

from __future__ import annotations

import re
from fractions import Fraction

DIGITS_LIMIT = 400
EXPONENT_LIMIT = 400
ONE_NUMBER_LIMIT_CHARACTERS = 1000
DASHES = str.maketrans("\u2212\u2013\uff0d", "---")
"""The minus sign, and what is written for it."""

# Groups of three by commas, or by the spaces that no line breaks at; never by others.
# Only single characters are taken for good by `++`: for groups Python below 3.11.5 has it wrong.
_DIGITS = r"(?:\d{1,3}(?:[,\u00a0\u2009\u202f]\d{3}(?!\d))+|\d++)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d++)?|\.\d++)"
_MAGNITUDE = rf"""
    (?>
        (?:[$€£¥]\ ?)?
        (?:(?P<whole>\d++)\ {{1,3}}(?=\d++\ ?/\ ?\d))?
        (?P<over>{_DECIMAL})
        (?:(?:[eE]|\ ?(?:\\times|\\cdot|×)\ ?10\ ?\^\ ?\{{?)(?P<exponent>[-+]?\d++)\}}?)?
        (?:\ ?/\ ?(?P<under>{_DECIMAL}))?
    )
"""
# What makes another number of the one before it, with its own digits; they are none to be read.
_FACTOR = r"""
    \ ?(?:[_^]\ ?\{?[-+]?\d++ | [⁰¹²³⁴-⁹⁻]++ | (?:\\sqrt|√)\ ?\{?\d*+ | \\pi | π
       | (?i:hundred|thousand|million|billion|trillion|dozen)\b)
"""
# A small letter alone is a variable, but for those that are mostly units.
_UNIT = r"""
    (?:% | ° | \^\ ?\{?\\circ\}?
    | (?:[^\W\d_]{2,}+ | (?![a-zα-ω])[^\W\d_] | [ghlms])(?![^\W\d_])(?:\ ?\^\ ?\{?-?\d\}? | [²³])?)
"""
# In running text a minus behind a digit, a letter or a bracket subtracts, or joins.
_IN_TEXT = re.compile(
    rf"""
    (?:[A-Za-z]_?\{{? | \^\ ?\{{?[-+]?) \d[\d.,]*+        # x1, a_{{2}}, \sqrt{{3}}, m^2: no numbers
    | (?P<number>(?:(?<![\dA-Za-z)\]}}])(?P<sign>[-+]))? {_MAGNITUDE}) (?P<factor>{_FACTOR})?
    """,
    re.VERBOSE,
)
_ALONE = re.compile(
    rf"""
    (?:[^\d=:,;<>!]*+[=:])? [\s$*]*+ (?P<sign>[-+])?\s* {_MAGNITUDE} (?!{_FACTOR})
    [\s$€£¥*.]*+ (?:{_UNIT}[\s$*./·-]*+)*
    """,
    re.VERBOSE,
)
# `#### 2. Add them` is a heading, as is `#### Step 2`.
_MARKER = re.compile(
    rf"""
    (?:(?<!\#)\#{{4}}(?!\#) | \\(?:boxed|fbox)\b) [\s*]{{0,9}}+
    (?P<line>(?:[-+]\s?)?{_MAGNITUDE}(?>(?:{_FACTOR})?))(?![.):][\ \t]*+\w)
    | \\(?:boxed|fbox)\s{{0,9}}(?P<brace>\{{)
    """,
    re.VERBOSE,
)
_WRAPPED = re.compile(r"\\(?:text[a-z]{0,6}|math[a-z]{0,6}|mbox|underline)\s?\{([^{}]*)\}")
_FRACTION = re.compile(
    r"\\[cdt]?frac\s?(?:\{\s?(-?[\d.,]++)\s?\}|(\d))\s?(?:\{\s?([\d.,]++)\s?\}|(\d))"
)
_SEPARATOR = re.compile(r"[^\d.]")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def final_number(text: str) -> Fraction | None:
    """The number behind the last `####` or in the last `\\boxed{}`, else the last of the text.

    `None` where there is none, where the last box does not hold exactly one, or where it has more
    than 400 digits or an exponent beyond ±400. A `####` without a number right behind it is a
    heading.
    """
    plain = _plain(text)
    marked = _marked(plain)
    if marked is not None:
        return _alone(marked)
    last = None
    for each in _IN_TEXT.finditer(plain):
        last = each if each["number"] else last
    return None if last is None or last["factor"] else _value(last)


def one_number(text: str) -> Fraction:
    """The number behind the last marker, else the one that is the whole text but for a unit, a
    currency and `x =` before it.

    Raises:
        ValueError: it is not exactly one number.
    """
    plain = _plain(text)
    marked = _marked(plain)
    found = _alone(plain if marked is None else marked)
    if found is None:
        raise ValueError(f"expected an answer that is one number, found {text[-80:]!r}")
    return found


def _plain(text: str) -> str:
    """Without what LaTeX and typography write around a number."""
    text = text.translate(DASHES).replace("\\!", "").replace("{,}", ",").replace("\\,", "\u202f")
    text = re.sub(r"\\([$%])", r"\1", text)
    text = re.sub(r"\\[ ;:]|~", " ", text)
    text = _WRAPPED.sub(r"\1", text)
    return _FRACTION.sub(_fraction, text)


def _fraction(found: re.Match[str]) -> str:
    over, under = found[1] or found[2], found[3] or found[4]
    is_signed = found.string[max(found.start() - 1, 0) : found.start()] in ("-", "+")
    return f"{'' if is_signed else ' '}{over}/{under} "


def _marked(text: str) -> str | None:
    """What the last marker marks: empty for a box that is not closed; `None` without a marker."""
    last = None
    for last in _MARKER.finditer(text):  # noqa: B007 - the last one is what is wanted
        pass
    if last is None:
        return None
    if last["line"]:
        return last["line"]
    depth = 0
    for brace in _BRACE.finditer(text, last.start("brace")):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[last.end() : brace.start()]
    return ""


def _alone(text: str) -> Fraction | None:
    whole = _ALONE.fullmatch(text) if len(text) <= ONE_NUMBER_LIMIT_CHARACTERS else None
    return _value(whole) if whole else None


def _value(found: re.Match[str]) -> Fraction | None:
    over = _decimal(found["over"], found["exponent"] or "0")
    under = _decimal(found["under"] or "1", "0")
    whole = _decimal(found["whole"] or "0", "0")
    if over is None or whole is None or not under:
        return None
    return (whole + over / under) * (-1 if found["sign"] == "-" else 1)


def _decimal(digits: str, exponent: str) -> Fraction | None:
    if len(digits) > DIGITS_LIMIT or len(exponent) > 6 or abs(int(exponent)) > EXPONENT_LIMIT:
        return None
    return Fraction(_SEPARATOR.sub("", digits)) * Fraction(10) ** int(exponent)
