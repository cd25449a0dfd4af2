"""Read the number that ends a text: `#### 72`, a plain number in `\\boxed{}`, or the last one.

A plain number is digits with a sign, a decimal point, commas between groups of three, an exponent
or a denominator, with currency before it and `%` behind it, which change nothing. Mathematics is
not read here but by `hotload.reward.math_answer`: whatever stands beside a number and may make
another one of it leaves the text without a number. Every step takes time in proportion to the text.
"""

from __future__ import annotations

import re
from fractions import Fraction

DIGITS_LIMIT = 400
EXPONENT_LIMIT = 400
NUMBER_LIMIT_CHARACTERS = 1000
DASHES = str.maketrans("\u2212\u2013\uff0d", "---")
"""The minus sign, and what is written for it."""

_PLAIN = re.compile(
    r"""
    [\s*$]* (?:[A-Za-z]\s*=)? [\s*$€£¥]* (?P<sign>[-+])? [$€£¥]?
    (?P<over>\d{1,3}(?:,\d{3})+(?:\.\d+)? | \d+(?:\.\d+)? | \.\d+)
    (?:[eE](?P<exponent>[-+]?\d{1,6}))? (?:/(?P<under>\d+))?
    \s?%?[\s*$.]*
    """,
    re.VERBOSE,
)
_SEPARATOR = re.compile(r"(?<=\d)(?:\\,|\{,\}|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_DELIMITERS = re.compile(r"\\[()\[\]]|</?[A-Za-z]\w*>|`")  # around a formula, a tag, code
_MARKER = re.compile(r"(?<!\#)\#{4}(?!\#)|\\(?:boxed|fbox)(?![A-Za-z])\s{0,9}\{?")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# `#### 2. Add them` is a heading, as is `#### Step 2`.
_HEADING = re.compile(r"[\s*]*(?:[-+$€£¥]*\d+[.):][\ \t]+\w|[^-+$€£¥.\d\s*]|$)")
_NAME = re.compile(r"[A-Za-z/]{1,4}[_^]?\{?-?\d[A-Za-z\d]*\}?")  # CO2, x_1, m^2: no numbers
# Words that make another number of the one beside them.
_BEFORE = re.compile(r"(?:[-+*/^×÷·√<>≤≥≠≈_\\,]|[<>!]=|\d,?|\\[A-Za-z]+|(?i:minus|negative|sqrt))$")
_AFTER = re.compile(r"[-+*/^×÷·√π=<>≤≥≠\\\d_]|(?i:hundred|thousand|million|billion|trillion|dozen)")


def final_number(text: str) -> Fraction | None:
    """Read the number behind the last `####` or in the last `\\boxed{}`, else the last of the text.

    `None` where there is none, where it is not a plain number, or where it has more than 400 digits
    or an exponent beyond ±400. A `####` that begins a heading is no marker.
    """
    text = _simplified(text)
    is_marked, marked = _last_marked(text)
    return marked if is_marked else _last_in(text)


def one_number(text: str) -> Fraction:
    """Read an answer: the number behind the last marker, else the plain number it is.

    Raises:
        ValueError: it is not exactly one plain number.
    """
    simplified = _simplified(text)
    is_marked, number = _last_marked(simplified)
    if not is_marked:
        number = plain_number(simplified)
    if number is None:
        raise ValueError(f"expected an answer that is one number, found {text[-80:]!r}")
    return number


def plain_number(text: str) -> Fraction | None:
    """Read a text that is nothing but one plain number, or `x =` and one; `None` for any other."""
    if len(text) > NUMBER_LIMIT_CHARACTERS:
        return None
    found = _PLAIN.fullmatch(_simplified(text))
    if found is None:
        return None
    digits, exponent = found["over"].replace(",", ""), int(found["exponent"] or "0")
    denominator = int(found["under"] or "1") if len(found["under"] or "") <= DIGITS_LIMIT else 0
    if len(digits) > DIGITS_LIMIT or abs(exponent) > EXPONENT_LIMIT or not denominator:
        return None
    value = Fraction(digits) * Fraction(10) ** exponent / denominator
    return -value if found["sign"] == "-" else value


def last_box(text: str) -> str | None:
    """Return what the last `\\boxed{}` holds: empty where it is not closed, `None` without one."""
    boxes = [marker for marker in _MARKER.finditer(text) if marker[0].startswith("\\")]
    return _held(text, boxes[-1]) if boxes else None


def _simplified(text: str) -> str:
    """Write signs, separators, currency and `%` in one way."""
    text = _SEPARATOR.sub(",", text.translate(DASHES).replace("\\!", ""))
    return text.replace("\\$", "$").replace("\\%", "%")


def _last_marked(text: str) -> tuple[bool, Fraction | None]:
    """Return whether the text has a marker, and the number at the last."""
    for marker in reversed(list(_MARKER.finditer(text))):
        if marker[0].startswith("\\"):
            return True, plain_number(_held(text, marker))
        line = text[marker.end() : marker.end() + NUMBER_LIMIT_CHARACTERS].partition("\n")[0]
        if not _HEADING.match(line):
            return True, _number_at(line.split(), 0)
    return False, None


def _held(text: str, box: re.Match[str]) -> str:
    """Return the content of a box up to the brace that closes it."""
    depth = 1
    for brace in _BRACE.finditer(text, box.end() if box[0].endswith("{") else len(text)):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[box.end() : brace.start()]
    return ""


def _last_in(text: str) -> Fraction | None:
    """Read the last word that has a digit and is no name; it must be a number by itself."""
    for line in reversed(_DELIMITERS.sub(" ", text).splitlines()):
        words = line.split()
        for index in range(len(words) - 1, -1, -1):
            word = words[index].strip("*$\"'():;,!?.")
            if re.search(r"\d", word) and not _NAME.fullmatch(word):
                return _number_at(words, index)
    return None


def _number_at(words: list[str], index: int) -> Fraction | None:
    """Read the number that a word is, unless a word beside it makes another number of it."""
    before, after = "".join(words[index - 1 : index]), "".join(words[index + 1 : index + 2])
    head, _, word = words[index].strip("*\"':;,!?").rstrip(".").rpartition("=")
    if _BEFORE.search(before) or head.endswith(("<", ">", "!")) or _AFTER.match(after):
        return None
    return plain_number(word)
