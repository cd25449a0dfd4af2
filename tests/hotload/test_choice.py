"""Multiple choice: which letter a text chooses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotload.reward.built_ins import BUILT_INS, check_answer
from hotload.reward.choice import chosen_letter, one_letter
from hotload.rollout.trajectory import Problem
from tests.factories import segment, trajectory


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A train leaves at noon. The answer is B.", "B"),
        ("I think the answer is C.", "C"),
        ("The answer is (b).", "B"),
        ("**Answer: D**", "D"),
        ("the correct option is E because of it", "E"),
        ("The answer is A because it is", "A"),
        ("The answer is A.", "A"),
        ("The answer is A train", None),
        ("The answer is a", None),
        ("The answer is I'm sure B", None),
        ("the answer is not B", None),
        ("The answer is A. No, the answer is B", "B"),
        (r"So \boxed{C}, and the answer is D", "C"),
        (r"\boxed{\text{C}}", "C"),
        (r"\boxed{\textbf{(C) } 12}", "C"),
        (r"The answer is \boxed{12}", None),
        (r"The answer is $\mathbf{B}$", "B"),
        ("some thought\nB\n", "B"),
        ("some thought\n**(B)**", "B"),
        ("A) 5\nB) 6\nHm.", None),
        ("(A) 5 (B) 6", None),
        ("It must be (B), as (B) fits", "B"),
        ("B", "B"),
        ("", None),
    ],
)
def test_the_letter_that_a_text_chooses(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter


def test_an_answer_of_one_letter() -> None:
    assert [one_letter(text) for text in ("B", "(b)", " B. ", "$B$")] == ["B"] * 4
    assert [one_letter(text) for text in ("", "BC", "5", "B C", "(" * 9 + "B")] == [None] * 5


@given(st.sampled_from("ABCDEFGHI"), st.sampled_from("ABCDEFGHI"), st.text(" abcAI.,\n()"))
def test_a_letter_is_chosen_and_no_other(answer: str, chosen: str, before: str) -> None:
    sample = trajectory(segment((5,)), text=f"{before}\nThe answer is {chosen}.")
    for reward in (BUILT_INS["multiple_choice"], BUILT_INS["contains"]):
        assert reward(Problem("p", "x", answer=answer), sample) == float(answer == chosen)


@pytest.mark.parametrize("piece", ["(A", "answer ", "answer is ", "A\n", "(A)", " ", "*", "\\a{"])
def test_a_long_text_costs_little(piece: str) -> None:
    many = piece * (250_000 // len(piece))
    for text in (many, rf"\boxed{{{many}}}", f"{many}B"):
        chosen_letter(text)


def test_an_answer_that_is_no_letter() -> None:
    with pytest.raises(ValueError, match="expected an answer that is one letter, found 'blue'"):
        check_answer("multiple_choice", {}, Problem("p", "x", answer="blue"))
