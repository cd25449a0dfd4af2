"""Compare mathematical answers with the package math-verify: fractions, roots, sets, expressions.

It parses LaTeX into SymPy, which takes milliseconds and may take for ever: it is called where a
time limit holds. What it reads wrongly is kept from it here, so that no wrong answer is paid.
"""

from __future__ import annotations

import logging
import re
from typing import Any

from hotload.reward.final_number import DASHES, MULTIPLES, Which, boxed_text, plain_number

EXPRESSION_LIMIT_CHARACTERS = 1000
# Seen with math-verify 0.9: `2 1/2` is read as 3/2, `2(3)` as 5, `1011_2` as 1011, `\neq 5`,
# `\approx 5`, `5,\ldots` and `5 \text{ million}` as 5, and bare words as products of their letters.
_MISREAD = re.compile(
    r"""
    \d\s+\d | \d\s*\(\s*\d+\s*\) | [\d)}]\s*_ | [≠≈]
    | \\(?:not|neq?|approx|sim|[lc]?dots|boxed|text\s*\{\s*not)\b
    | (?<![\\A-Za-z{])[A-Za-z]{4,}
    """,
    re.VERBOSE,
)
_MULTIPLE = re.compile(
    rf"(?i:{MULTIPLES})|\d\s*(?:\\[,\ ])?\s*\\(?:text|mathrm|mbox)\s*\{{\s*(?:[kMB]|bn|mn)\s*\}}"
)
_UNIT = re.compile(r"(?<=\d)\s*(?:\\[,\ ])?\s*\\(?:text|mathrm|mbox)\s*\{[^{}\d]*\}")


def is_same_answer(answer: str, text: str, which: Which = "last") -> bool:
    """Tell whether the last `\boxed{}` of `text`, or the first, holds the answer, itself an
    expression or a box.

    Two plain numbers must be equal; of decimals beside other expressions six places count. The
    order of a tuple counts, of a set not; a tuple is no set. Units and `%` change nothing.

    Raises:
        ValueError: math-verify is missing, or the answer is none that it can read.
    """
    try:
        from math_verify import verify
    except ImportError:
        raise ValueError("it needs math-verify: pip install 'hotload[math]'") from None
    wanted = wanted_expression(answer)
    wanted_values = _parsed(wanted)
    if not wanted_values:
        raise _unreadable(answer)
    given = boxed_text(text, which)
    if given is None:
        return False
    number, given_number = plain_number(wanted), plain_number(given)
    if number is not None and given_number is not None:
        return number == given_number
    given_values = _parsed(given)
    return bool(
        given_values
        and _are_comparable(wanted_values[0], given_values[0])
        and verify(wanted_values, given_values, timeout_seconds=None)
    )


def wanted_expression(answer: str) -> str:
    """Return the expression that an answer is, or holds in its last box.

    Raises:
        ValueError: it is empty, too long, or of a kind that math-verify misreads.
    """
    boxed = boxed_text(answer)
    wanted = answer.strip().strip("$") if boxed is None else boxed
    if not wanted or _is_refused(wanted.translate(DASHES)):
        raise _unreadable(answer)
    return wanted


def _unreadable(answer: str) -> ValueError:
    return ValueError(f"expected an answer that math-verify reads, found {answer[-80:]!r}")


def _parsed(expression: str) -> list[Any]:
    """Parse one expression: the SymPy object and its text, or nothing where it cannot be read."""
    from math_verify import LatexExtractionConfig, parse

    # Without time limits of its own, which are signals, it would warn at every call.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    expression = expression.translate(DASHES)
    if _is_refused(expression):
        return []
    values = parse(
        rf"\boxed{{{expression}}}",
        extraction_config=[LatexExtractionConfig()],
        parsing_timeout=None,
    )
    return [] if not values or isinstance(values[0], str) else values


def _is_refused(expression: str) -> bool:
    is_long = len(expression) > EXPRESSION_LIMIT_CHARACTERS
    return is_long or bool(
        _MULTIPLE.search(expression) or _MISREAD.search(_UNIT.sub(",", expression))
    )


def _are_comparable(wanted: Any, given: Any) -> bool:
    """Whether math-verify may compare two values. It takes a tuple (a pair is an open interval to
    it) for the set of its parts, and any equation for its right side, as if `-x = 5` said 5.
    """
    from sympy import Equality, FiniteSet

    if isinstance(wanted, Equality) != isinstance(given, Equality):
        equation = wanted if isinstance(wanted, Equality) else given
        return bool(equation.lhs.is_Symbol)
    sets = [isinstance(value, FiniteSet) and len(value) > 1 for value in (wanted, given)]
    return sets[0] == sets[1]
