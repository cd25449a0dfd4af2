"""Read the number that ends a text: `#### 72`, a plain number in `\\boxed{}`, or the last one.

A plain number is digits with a sign, a decimal point, commas between groups of three, an exponent
or a denominator, or a fraction such as ½, with currency before it and `%` behind it, which change
nothing. Nor does dress: LaTeX that says how a number looks. Mathematics is not read here but by
`hotload.reward.math_answer`: whatever stands beside a number and may make another one of it leaves
the text without a number. Every step takes time in proportion to the text.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from fractions import Fraction
from typing import Literal, TypeVar

DIGITS_LIMIT = 400
EXPONENT_LIMIT = 400
NUMBER_LIMIT_CHARACTERS = 1000
DASHES = str.maketrans("\u2212\u2013\uff0d", "---")
"""The minus sign, and what is written for it."""
Which = Literal["first", "last"]
T = TypeVar("T")

_VULGAR = "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"
_PLAIN = re.compile(
    rf"""
    [\s*$]* (?:[A-Za-z](?:_\{{?\w{{1,9}}\}}?)?\s*=)? [\s*$]* (?P<sign>[-+])? [$]?
    (?:
        (?P<over>\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)? | \d+(?:\.\d+)? | \.\d+)
        (?:[eE](?P<exponent>[-+]?\d{{1,6}}))? (?:/(?P<under>\d+))?
        | (?P<units>\d*)(?P<vulgar>[{_VULGAR}])
    )
    \s?%?[\s*$.]*
    """,
    re.VERBOSE,
)
_SEPARATOR = re.compile(r"(?<=\d)(?:\\,|\{,\}|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_DELIMITERS = re.compile(r"\\[()\[\]]|</?[A-Za-z]\w*>|`")  # around a formula, a tag, code
_MARKER = re.compile(r"(?<!\#)\#{4}(?!\#)|\\(?:boxed|fbox)(?![A-Za-z])\s{0,9}\{?")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# `#### 2. Add them` is a heading, as is `#### Step 2`.
_HEADING = re.compile(rf"[\s*]*(?:[-+$]*\d+[.):][\ \t]+\w|[^-+$.\d\s*{_VULGAR}]|$)")
_NAME = re.compile(r"[A-Za-z/]{1,4}[_^]?\{?-?\d[A-Za-z\d]*\}?")  # CO2, x_1, m^2: no numbers
_HAS_NUMBER = re.compile(rf"[\d{_VULGAR}]")
MULTIPLES = "hundred|thousand|million|billion|trillion|quadrillion|dozen|lakh|crore"
# What makes another number of the one beside it.
_BEFORE = re.compile(
    r"(?:[-+*/^×÷·√π<>≤≥≠≈_\\,}]|[<>!]=|\d,?|\\[A-Za-z]\S*|(?<![A-Za-z])(?i:minus|negative|not"
    r"|plus|times|half|twice|double|triple|sqrt|root|log|ln|exp|sin|cos|tan|mod))$"
)
_AFTER = re.compile(
    rf"[-+*/^×÷·√π=<>≤≥≠\\\d_{{²³¹⁰⁴-⁹⁺⁻{_VULGAR}]|(?i:{MULTIPLES})"
    r"|(?:[kMBxyzn]|bn|mn|pi|squared|cubed|factorial)(?![A-Za-z])|and (?:an?|one|two|three) [a-z]"
)

# Commands that change the looks of their argument alone. Of any other nothing is known, so that
# what it holds is not read: `\sqrt{5}`, `\neq{5}`, `\cancel{5}`.
_DRESS = re.compile(
    r"(?:text(?!(?:super|sub)script$)\w*|math(?!ring$)\w*|bold\w*|sym[a-z]+|bm|pmb|[mh]box|framebox"
    r"|emph|u(?:nder)?line|ensuremath|num|operatorname|(?:bf|it|rm|sf|tt|sl|sc|em|cal)(?:series)?"
    r"|\w+(?:series|shape|family)|\w*(?:display|text|script)style|tiny|small|normalsize|[lL]arge"
    r"|LARGE|[hH]uge)"
)
_BLANK = re.compile(r"q?quad|\w+space")
_DELIMITER_SIZE = re.compile(r"left|right|middle|[bB]igg?[lrm]?")
_COMMAND = re.compile(r"\\([A-Za-z]+)\*?\s{0,9}(\{)?|\\.|[{}]", re.DOTALL)
_COLOUR = re.compile(r"\\(?:text)?color(?:box)?\s?\{[^{}\d]{0,40}\}")
_PER_UNIT = re.compile(r"/\s?\\(?:text\w*|mathrm|mbox)\s?\{[A-Za-z ]{1,40}\}")
_SPACE = re.compile(r"\\[,;: ]|(?<!\\)~|[\u00a0\u2000-\u200a\u202f\u205f\u3000]")
_MIXED = re.compile(rf"(?<=\d)\s(?=[{_VULGAR}])")
_ISO_4217 = (
    "AED AFN ALL AMD ANG AOA ARS AUD AWG AZN BAM BBD BDT BGN BHD BIF BMD BND BOB BRL BSD "
    "BTN BWP BYN BZD CAD CDF CHF CLP CNY COP CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR "
    "FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD HNL HTG HUF IDR ILS INR IQD IRR ISK JMD JOD "
    "JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD MMK MNT "
    "MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG "
    "QAR RON RSD RUB RWF SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS "
    "TMT TND TOP TRY TTD TWD TZS UAH UGX USD UYU UZS VES VND VUV WST XAF XCD XOF XPF YER ZAR "
    "ZMW ZWG "
)
_CODES = frozenset(_ISO_4217.split())
_SIGNED = _CODES | {"US", "C", "CA", "A", "AU", "NZ", "HK", "NT", "S", "SG", "R", "MX"}  # US$
_CURRENCY = re.compile(
    r"(?<![A-Za-z])([A-Z]{1,3})(?:\s?(?=[-+.\d])|(?=\$\s?[-+.\d]))"
    r"|(?<=[\d%])\s?([A-Z]{3})(?![A-Za-z])"
)


def final_number(text: str, which: Which = "last") -> Fraction | None:
    """Read the number behind the last `####` or in the last `\\boxed{}`, else the last of the text;
    with `which` the first of them.

    `None` where there is none, where it is not a plain number, or where it has more than 400 digits
    or an exponent beyond ±400. A `####` that begins a heading is no marker.
    """
    text = _simplified(text)
    is_marked, marked = _marked(text, which)
    return marked if is_marked else _in_words(text, which)


def one_number(text: str) -> Fraction:
    """Read an answer: the number behind the last marker, else the plain number it is.

    Raises:
        ValueError: it is not exactly one plain number.
    """
    simplified = _simplified(text)
    is_marked, number = _marked(simplified, "last")
    if not is_marked:
        number = plain_number(simplified)
    if number is None:
        raise ValueError(f"expected an answer that is one number, found {text[-80:]!r}")
    return number


def plain_number(text: str) -> Fraction | None:
    """Read a text that is nothing but one plain number, or `x =` and one; `None` for any other."""
    if len(text) > NUMBER_LIMIT_CHARACTERS:
        return None
    simplified = _simplified(text).strip(" $*")
    if simplified.startswith("(") and simplified.endswith(")") and "," not in simplified:
        simplified = simplified[1:-1]  # with a comma it may be a pair
    found = _PLAIN.fullmatch(simplified)
    if found is None:
        return None
    if found["vulgar"]:
        part = Fraction(unicodedata.numeric(found["vulgar"])).limit_denominator(10)
        value = int((found["units"] or "0")[:DIGITS_LIMIT]) + part
        return -value if found["sign"] == "-" else value
    digits, exponent = found["over"].replace(",", ""), int(found["exponent"] or "0")
    denominator = int(found["under"] or "1") if len(found["under"] or "") <= DIGITS_LIMIT else 0
    if len(digits) > DIGITS_LIMIT or abs(exponent) > EXPONENT_LIMIT or not denominator:
        return None
    value = Fraction(digits) * Fraction(10) ** exponent / denominator
    return -value if found["sign"] == "-" else value


def boxed_text(text: str, which: Which = "last") -> str | None:
    """Return what the last, or first, `\\boxed{}` holds: empty where it is not closed, `None`
    without one.
    """
    boxes = [marker for marker in _MARKER.finditer(text) if marker[0].startswith("\\")]
    return _held(text, boxes[0 if which == "first" else -1]) if boxes else None


def _simplified(text: str) -> str:
    """Write signs, separators, spaces, currency and `%` in one way, and take the dress off."""
    text = _SEPARATOR.sub(",", text.translate(DASHES).replace("\\!", "").replace("⁄", "/"))
    text = text.replace("\\$", "$").replace("\\%", "%")
    text = text.translate({ord(one): "$" for one in set(text) if unicodedata.category(one) == "Sc"})
    if "\\" in text or "{" in text:
        text = _undressed(_PER_UNIT.sub("", _COLOUR.sub("", text)))
    return _CURRENCY.sub(_without_code, _MIXED.sub("", _SPACE.sub(" ", text)))


def _without_code(found: re.Match[str]) -> str:
    """Leave out the letters of a currency; keep any other."""
    code = found[1] or found[2]
    is_before_a_sign = found.string[found.end() : found.end() + 1] == "$"
    return "" if code in (_SIGNED if is_before_a_sign else _CODES) else found[0]


def _undressed(text: str) -> str:
    """Take off commands and braces that change nothing, however deep: `{\\mathbf{18}}` is 18."""
    pieces: list[str] = []
    is_dress: list[bool] = []  # of the braces that are open
    end, tail = 0, ""
    for found in _COMMAND.finditer(text):
        between, token, command = text[end : found.start()], found[0], found[1]
        end = found.end()
        tail = (between or tail)[-1:]
        if command is not None and found[2]:
            is_dress.append(_DRESS.fullmatch(command) is not None)
            token = "" if is_dress[-1] else token
        elif command is not None and _BLANK.fullmatch(command):
            token = " "
        elif command is not None:  # without an argument it holds for what follows
            is_size = _DRESS.fullmatch(command) or _DELIMITER_SIZE.fullmatch(command)
            token = "" if is_size else token
        elif token == "{":
            is_dress.append(tail not in ("_", "^", "}", "]"))
            token = "" if is_dress[-1] else token
        elif token == "}" and is_dress:
            token = "" if is_dress.pop() else token
        tail = token[-1:] or tail
        pieces += (between, token)
    return "".join((*pieces, text[end:]))


def _marked(text: str, which: Which) -> tuple[bool, Fraction | None]:
    """Return whether the text has a marker, and the number at the last or first of them."""
    for marker in _ordered(_MARKER.finditer(text), which):
        if marker[0].startswith("\\"):
            held = _held(text, marker)
            return True, plain_number(held.replace("\\boxed", "").replace("\\fbox", ""))
        line = text[marker.end() : marker.end() + NUMBER_LIMIT_CHARACTERS].partition("\n")[0]
        if not _HEADING.match(line):
            return True, _number_at(line.split(), 0)
    return False, None


def _ordered(found: Iterable[T], which: Which) -> Iterable[T]:
    return found if which == "first" else reversed([*found])


def _held(text: str, marker: re.Match[str]) -> str:
    """Return the content of a box up to the brace that closes it."""
    depth = 1
    for brace in _BRACE.finditer(text, marker.end() if marker[0].endswith("{") else len(text)):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[marker.end() : brace.start()]
    return ""


def _in_words(text: str, which: Which) -> Fraction | None:
    """Read the last, or first, word that has a digit and is no name; it must be a number by
    itself.
    """
    for line in _ordered(_DELIMITERS.sub(" ", text).splitlines(), which):
        words = line.split()
        for index in _ordered(range(len(words)), which):
            word = words[index].strip("*$\"'():;,!?.")
            if _HAS_NUMBER.search(word) and not _NAME.fullmatch(word):
                return _number_at(words, index)
    return None


def _number_at(words: list[str], index: int) -> Fraction | None:
    """Read the number that a word is, unless a word beside it makes another number of it."""
    before, after = "".join(words[index - 1 : index]), " ".join(words[index + 1 : index + 4])
    before, after = before.rstrip("$"), after.lstrip("%$ ")
    head, _, word = words[index].strip("*\"':;,!?").rstrip(".").rpartition("=")
    if _BEFORE.search(before) or head.endswith(("<", ">", "!")) or _AFTER.match(after):
        return None
    return plain_number(word)
