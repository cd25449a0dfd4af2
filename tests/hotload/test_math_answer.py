"""Mathematical answers by a table: what is equal, and what must never be paid."""

import sys

import pytest

from hotload.reward.built_ins import BUILT_INS, check_built_in
from hotload.rollout.trajectory import Problem
from tests.factories import trajectory


def score(answer: object, text: str, **arguments: str) -> float:
    pytest.importorskip("math_verify")  # the extra `math`
    sample = trajectory(text=text)
    return BUILT_INS["math_verify"](Problem("p", "x", answer=answer), sample, **arguments)


@pytest.mark.parametrize(
    ("answer", "box"),
    [
        ("1/2", r"\frac{2}{4}"),
        (r"\frac12", "0.5"),
        (0.5, r"\frac12"),
        (r"$2\pi$", r"2\pi"),
        (r"\frac{\sqrt{3}}{2}", r"\sqrt3/2"),
        ("(1,2)", "(1, 2)"),
        ("(1,2,3)", "(1,2,3)"),
        ("1,2", "2,1"),
        ("[1,2)", "[1,2)"),
        ("x>5", r"(5,\infty)"),
        ("x^2-1", "(x-1)(x+1)"),
        ("2(x+1)", "2x+2"),
        ("12", r"12\text{ cm}"),
        ("100", r"100\mathrm{~m}"),
        ("20{,}000", "20000"),
        ("-5", "\u22125"),
        (r"\text{Tuesday}", r"\text{Tuesday}"),
        ("A", "A"),
        ("thus \\boxed{5}", "x=5"),
        ("50\\%", "50"),
        ("45", r"45^\circ"),
        (r"2\frac12", r"\frac52"),
        (r"\sqrt{2}", "1.414214"),
        ("18", "{18}"),
        ("18", r"\left(18\right)"),
        ("18", r"\boldsymbol{18}"),
        ("18", r"\$18/\text{hour}"),
        ("500", "₹500"),
        ("500", "USD 500"),
        ("7/2", "3 ½"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ],
)
def test_an_equal_answer_is_paid(answer: object, box: str) -> None:
    assert score(answer, rf"not \boxed{{4}} but \boxed{{{box}}}.") == 1


@pytest.mark.parametrize(
    ("answer", "box"),
    [
        ("5", "-5"),
        ("1/2", r"\frac{3}{2}"),
        (r"\frac12", r"\frac72"),
        ("1/3", "0.333333"),
        ("20{,}000", "10{,}000"),
        ("10", "10^2"),
        ("3/2", "2 1/2"),
        ("5", "2(3)"),
        ("1011", "1011_2"),
        ("(1,2)", "(2,1)"),
        ("(1,2)", "1,2"),
        ("(1,2)", r"\{1,2\}"),
        ("(1,2,3)", r"\{1,2,3\}"),
        ("1,2", "(1,2)"),
        ("1,2", "1"),
        ("[1,2]", "(1,2)"),
        ("2", r"\pm 2"),
        ("5", "5,6"),
        ("5", r"5 \text{ or } 6"),
        ("5", r"5,\ldots"),
        ("5", r"\neq 5"),
        ("5", r"\approx 5"),
        ("5", r"\text{not }5"),
        ("5", r"\text{less than } 5"),
        ("5", r"5\text{ million}"),
        ("5", "5 million"),
        ("5", "50 lakh"),
        ("5", r"5\mathrm{k}"),
        ("5", r"\$5k"),
        ("2", r"2\,\pi"),
        ("2", r"2 \cdot \pi"),
        ("3", r"3\,\sqrt{2}"),
        ("1", "1½"),
        ("18", r"18\overline{3}"),
        ("18", r"\cancel{18}"),
        ("5", r"5 \pmod 7"),
        ("5", "x=4"),
        ("5", "-x=5"),
        ("5", "|x|=5"),
        ("5", "x^2=5"),
        ("5", "6=5"),
        ("5", r"x \le 5"),
        ("x>5", "x<5"),
        (r"\infty", r"-\infty"),
        ("5", "none"),
        ("5", ""),
    ],
)
def test_a_wrong_answer_is_not_paid(answer: str, box: str) -> None:
    assert score(answer, rf"\boxed{{{box}}}") == 0


@pytest.mark.parametrize("text", ["5", r"\boxed{5", r"\boxed 5", "#### 5", r"\boxed{5} \boxed{6}"])
def test_only_the_last_box_counts(text: str) -> None:
    assert score("5", text) == 0


def test_the_first_box_or_what_follows_a_mark() -> None:
    text = r"\boxed{5}</think> \boxed{7} \boxed{8}"
    assert score("5", text, which="first") == 1
    assert score("7", text, which="first", after="</think>") == 1
    assert score("8", text, after="</think>") == 1
    assert score("8", text, after="</thought>") == 0


@pytest.mark.parametrize(
    "answer", ["none", "2 1/2", "2 000", "1011_2", r"\neq 5", "x" * 2000, "#### 5"]
)
def test_an_answer_it_cannot_read_is_not_scored(answer: str) -> None:
    with pytest.raises(ValueError, match="expected an answer that math-verify reads"):
        score(answer, r"\boxed{5}")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ValueError, match=r"pip install 'hotload\[math\]'"):
        check_built_in("math_verify", {})
