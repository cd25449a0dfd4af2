"""Read the letter that a text chooses among the answers of a multiple-choice question.

A letter counts where it is marked as the choice, not wherever it stands: `A` and `I` are words.
"""

from __future__ import annotations

import re

from hotload.reward.final_number import boxed_text

_LETTER = re.compile(r"[\s*$(\[{]*([A-Za-z])[\s*$)\]}.:]*")
_IN_BOX = re.compile(r"(?:\\[a-z]+|[\s{(*$])*([A-Za-z])(?![A-Za-z])[\s)}.:]*")
# `the answer is B`, `Answer: **(b)**`; a bare small letter would be a word.
_SAID = re.compile(
    r"(?i:\b(?:answer|choice|option)(?:\s+is)?(?:\s+(?:option|choice))?\s*:?)"
    r"[\s*$\"'{]*(?:\\[a-z]+\{)?(?:\(\s?([A-Za-z])\s?\)|([A-Z])(?![\w'’])(?!\s+(?!because|since|as)[a-z]))"
)
_OWN_LINE = re.compile(r"^[ \t*]*\(?([A-Z])[).]?[ \t*.]*$", re.MULTILINE)
_IN_PARENTHESES = re.compile(r"\(([A-Za-z])\)")


def one_letter(answer: str) -> str | None:
    """Read an answer that is one letter, with or without parentheses; `None` for any other."""
    found = _LETTER.fullmatch(answer) if len(answer) <= 8 else None
    return found[1].upper() if found else None


def chosen_letter(text: str) -> str | None:
    """Read the letter that the text chooses, as a capital; `None` where it chooses none.

    The last box counts, else the last `answer is X`, else the last line that is a letter alone,
    else the only letter that stands in parentheses.
    """
    boxed = boxed_text(text)
    if boxed is not None:
        found = _IN_BOX.match(boxed[:80])
        return found[1].upper() if found else None
    said = [one or other for one, other in _SAID.findall(text)]
    if letters := said or _OWN_LINE.findall(text):
        return str(letters[-1]).upper()
    named = {letter.upper() for letter in _IN_PARENTHESES.findall(text)}
    return named.pop() if len(named) == 1 else None
