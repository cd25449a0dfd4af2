"""Final numbers by a table of texts, and by numbers written in every way."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotload.reward.final_number import final_number, one_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so it is 72.", 72),
        ("**-5**", -5),
        ("The answer is \u22125.", -5),
        ("The answer is \u20135.", -5),
        ("The answer is \uff0d5.", -5),
        ("-$5", -5),
        ("$-5$", -5),
        (r"\(x = 5\)", 5),
        ("<answer>5</answer>", 5),
        ("It is `5`!", 5),
        ("so x=5", 5),
        ("So 48+24=72.", 72),
        ("3/2", Fraction(3, 2)),
        ("1,234.50", Fraction(2469, 2)),
        ("1\u202f234", 1234),
        ("5\u00a0km", 5),
        ("v1.2.3 says 7", 7),
        ("= .50", Fraction(1, 2)),
        ("1e3", 1000),
        ("2.5E-1", Fraction(1, 4)),
        ("the area is 12 m^2", 12),
        ("12 m²", 12),
        ("it is 9.81 m/s^2", Fraction(981, 100)),
        ("7 g of CO2 and H2O", 7),
        ("49, as x_1 = 49 with x_2", 49),
        ("5 (five)", 5),
        ("50%", 50),
        ("50\\%", 50),
        ("٥", 5),
        ("5\n6", 6),
        ("#### Step 2: add\n40 + 2\n\n#### Final answer\n**Forty-two**, i.e. 42", 42),
        ("#### 2. Add them\nThat makes 42", 42),
        ("####\n5", 5),
        ("##### 5\n6", 6),
        ("You need 1½ cups", Fraction(3, 2)),
        ("You need 3 ½ cups", Fraction(7, 2)),
        ("You need ½ a cup", Fraction(1, 2)),
        ("it is -⅓", Fraction(-1, 3)),
        ("the sum is ₹500.", 500),
        ("it costs USD 500", 500),
        (r"it costs US\$500", 500),
        (r"so $x_{1}=18$", 18),
        (r"$\mathbf{18}$ of them", 18),
        (r"{\bf 18}", 18),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text: str, number: Fraction | int | None) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize(
    "text",
    [
        "- 5",
        "negative 5",
        "pages 5–10",
        "x = 8-5",
        "8 - 5",
        "3 / 4 of it",
        "2 1/2 cups",
        "2 000",
        "3,5",
        "1, 2",
        "(1,2)",
        "(1, 2)",
        "1,111,1111",
        "12,34",
        "x<=5",
        "x <= 5",
        "x != 5",
        "5/0",
        "10^2",
        "10 ^ 2",
        "10²",
        "5 million",
        r"2\pi",
        r"2 \pi",
        r"2\sqrt{3}",
        r"\sqrt 5",
        "1011_2",
        r"$-\frac{1}{2}$",
        r"2\frac12",
        r"$3 \times 10^{-2}$",
        "3 × 10^5 m",
        r"x=\frac{1,000}{3}",
        r"2\,\pi",
        r"2 \cdot \pi",
        r"3\,\sqrt{2}",
        "8  million",
        "$5k",
        "$5 k",
        "$1.2M",
        "$1.2 B",
        "5 and a half",
        "it is not 5",
        "2 x",
        r"\overline{5}",
        r"\log_2 8",
        "π 5",
        "First 3. Answer:5",
        "3 个, 答案是5",
    ],
)
def test_what_may_be_another_number_is_not_read(text: str) -> None:
    assert final_number(text) is None


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", 72),
        ("####72", 72),
        ("48/2 = <<48/2=24>>24 clips.\n48+24 = <<48+24=72>>72 clips.\n#### 72", 72),
        ("#### −1,234 so 7", -1234),
        ("#### -$5 or 3", -5),
        ("#### **$18.50**\n\n7", Fraction(37, 2)),
        ("#### 72 clips (48 in April and 24 in May)", 72),
        ("#### 72.\nSo 3", 72),
        ("#### 5\n\n#### 6\n7", 6),
        ("#### 10^2, so 3", None),
        ("#### 5-3", None),
        ("#### 2 1/2", None),
        ("#### 72 million", None),
        (r"\boxed{7} and not 8", 7),
        (r"\boxed{7} and \boxed{8}", 8),
        ("\\boxed{7}\n#### Check 3", 7),
        ("\\boxed{7}\n#### 8\n9", 8),
        (r"#### 8, that is \boxed{7}", 7),
        (r"\boxed {5} after 3", 5),
        (r"\fbox{5} after 3", 5),
        (r"\boxed{\boxed{5}} after 3", 5),
        (r"\boxed{-\$5} after 3", -5),
        (r"\boxed{$5$}", 5),
        (r"\boxed{7/2}", Fraction(7, 2)),
        (r"\boxed{10{,}000}", 10_000),
        (r"\boxed{10,\!000}", 10_000),
        (r"\boxed{10\,000}", 10_000),
        (r"\boxed{50\%}", 50),
        (r"\boxed{x = 5}", 5),
        (r"3 in \boxed 5", None),
        (r"3 in \boxed{}", None),
        (r"\boxed{{18}}", 18),
        (r"\boxed{\left(18\right)}", 18),
        (r"\boxed{\boldsymbol{18}}", 18),
        (r"\boxed{\displaystyle {\bf 18}}", 18),
        (r"\boxed{\textcolor{red}{18}}", 18),
        (r"\boxed{\text{18}\quad}", 18),
        (r"\boxed{\$18/\text{hour}}", 18),
        (r"\boxed{₹500}", 500),
        (r"\boxed{USD 500}", 500),
        (r"\boxed{500~EUR}", 500),
        (r"\boxed{US\$500}", 500),
        (r"\boxed{½}", Fraction(1, 2)),
        (r"\boxed{x_{1}=18}", 18),
        (r"3 in \boxed{(1,234)}", None),
        (r"3 in \boxed{8 \text{ million}}", None),
        (r"3 in \boxed{18/x}", None),
        (r"3 in \boxed{\cancel{18}}", None),
        (r"3 in \boxed{18\overline{3}}", None),
        (r"3 in \boxed{\frac{1}{{2}}}", None),
        (r"3 in \boxed{5", None),
        (r"3 in \boxed{no}", None),
        (r"3 in \boxed{- 5}", None),
        (r"3 in \boxed{-x = 5}", None),
        (r"3 in \boxed{(1,2)}", None),
        (r"3 in \boxed{1,2}", None),
        (r"3 in \boxed{3x}", None),
        (r"3 in \boxed{2\pi}", None),
        (r"3 in \boxed{\frac{7}{2}}", None),
        (r"3 in \boxed{\sqrt{5}}", None),
        (r"3 in \boxed{10^2}", None),
        (r"3 in \boxed{3 \times 10^5}", None),
        (r"3 in \boxed{3+5}", None),
        (r"3 in \boxed{3:5}", None),
        (r"3 in \boxed{x < 5}", None),
        (r"3 in \boxed{x=3 \text{ or } x=5}", None),
        (r"3 in \boxed{3\text{ or }5}", None),
        (r"3 in \boxed{42\text{ cm}}", None),
        (r"3 in \boxed{5 million}", None),
    ],
)
def test_a_marked_number_counts_before_others(text: str, number: Fraction | int | None) -> None:
    assert final_number(text) == number
    if number is None:
        with pytest.raises(ValueError, match="expected an answer that is one number"):
            one_number(text)
    else:
        assert one_number(text) == number  # an answer may be the whole solution


@pytest.mark.parametrize("text", ["5", "-5", "$5", "5%", "x = 5", "$x=5$", "5.", "1/2", "1e-07"])
def test_an_answer_that_is_one_number(text: str) -> None:
    assert one_number(text) == final_number(text)


@pytest.mark.parametrize(
    "text",
    [
        "(1,2)",
        "1,2",
        "2 000",
        "3,5",
        "five",
        "none",
        "",
        "3x",
        "5 apples",
        "5 or 7",
        "3:5",
        "1/0",
        "10^2",
        "5!",
        r"\frac12",
    ],
)
def test_an_answer_that_is_not_one_number(text: str) -> None:
    with pytest.raises(ValueError, match="expected an answer that is one number, found"):
        one_number(text)


WAYS = [
    "{}",
    "{:,}",
    "{:,}.00",
    "${}$",
    "**{:,}**",
    "#### {:,}",
    r"\boxed{{{}}}",
    r"\fbox{{x = {}}}",
    r"\boxed{{{:,}\%}}",
    r"\boxed{{{}/1}}",
    "{}/1",
    "{:,}%",
]


@given(
    number=st.integers(-(10**18), 10**18),
    way=st.sampled_from(WAYS),
    minus=st.sampled_from("-\u2212\u2013\uff0d"),
    comma=st.sampled_from([",", "{,}", r",\!", r"\,", "\u202f"]),
)
def test_a_number_is_read_however_it_is_written(
    number: int, way: str, minus: str, comma: str
) -> None:
    text = way.format(number).replace("-", minus).replace(",", comma)
    assert one_number(text) == number
    assert final_number(f"First 3 of 7. So: {text}") == number


@given(st.fractions(max_denominator=10**6))
def test_a_fraction_is_read_however_it_is_written(number: Fraction) -> None:
    for text in (str(number), rf"\boxed{{{number}}}", f"#### {number}"):
        assert final_number(text) == one_number(text) == number


CHANGED_BY_WHAT_FOLLOWS = [
    r"\pi", "π", r"\sqrt{2}", r"\frac{1}{2}", "^2", "^{3}", "_2", "x", "²", r"\times 10^5",
    r"\cdot 3", "/7", "million", r"\text{ million}", r"\mathrm{billion}", "½ ¾", "k", r"\%\pi",
    r"$\pi$",
]  # fmt: skip
CHANGED_BY_WHAT_IS_BEFORE = [
    r"\sqrt", r"\sqrt ", "2^", r"\frac{1}", r"\pi ", r"\log ", r"\ln", "3 × ", r"3\times ", "- ",
    "-", r"2 \cdot", "π", r"\neq ", r"\overline", r"\hat", r"\cancel", "not ", "minus ", "< ",
    "4 + ",
]  # fmt: skip
SPACES = [
    "",
    " ",
    "  ",
    r"\,",
    r"\;",
    r"\ ",
    "~",
    r"\quad ",
    r"\cdot ",
    " * ",
    r"\times ",
    "\u202f",
]
DRESS = ["{}", "{{{}}}", r"\mathbf{{{}}}", r"\text{{{}}}", r"{{\bf {}}}", r"\left({}\right)"]
PLACES = ["{}", r"\boxed{{{}}}", r"\boxed{{{{{}}}}}", "#### {}", "It is {}.", "${}$", r"\({}\)"]


@settings(max_examples=2000)
@given(
    number=st.integers(1, 10**6),
    change=st.sampled_from([*CHANGED_BY_WHAT_FOLLOWS, *CHANGED_BY_WHAT_IS_BEFORE]),
    space=st.sampled_from(SPACES),
    dress=st.sampled_from(DRESS),
    place=st.sampled_from(PLACES),
)
def test_no_number_is_read_where_something_changes_it(
    number: int, change: str, space: str, dress: str, place: str
) -> None:
    dressed = dress.format(number)
    if change in CHANGED_BY_WHAT_FOLLOWS:
        text = place.format(f"{dressed}{space}{change}")
    else:
        text = place.format(f"{change}{dressed}" if "{" in dressed else f"{change}{{{number}}}")
    assert final_number(text) != number, text


@given(
    number=st.integers(0, 10**9),
    dress=st.lists(st.sampled_from(DRESS), max_size=4),
    place=st.sampled_from(PLACES),
)
def test_dress_changes_nothing(number: int, dress: list[str], place: str) -> None:
    text = str(number)
    for one in dress:
        text = one.format(text)
    assert final_number(place.format(text)) == number or text.count("(") > 1, text


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("#### 18\n\nQuestion: and now?\n#### 4", 18, 4),
        (r"\boxed{5}, no, \boxed{7}", 5, 7),
        (r"\boxed{\boxed{5}}", 5, 5),
        ("first 5 then 6", 5, 6),
        ("#### Step 1\n#### 7\n#### 8", 7, 8),
    ],
)
def test_the_first_or_the_last_counts(text: str, first: int, last: int) -> None:
    assert final_number(text, "first") == first
    assert final_number(text) == last


@given(st.text("0123456789,.-+/^_ \\{}$#%e\n"))
def test_whatever_a_text_says_it_has_a_number_or_none(text: str) -> None:
    for written in (text, rf"\boxed{{{text}}}", f"#### {text}", rf"\frac{text}"):
        found = final_number(written)
        assert found is None or isinstance(found, Fraction)


MANY = 250_000
"""Characters of a hostile text: with work that grows as their square no time limit would do."""


@pytest.mark.parametrize(
    "piece",
    [
        "1", "1,", ",111", "1.", "1/", "1 ", "1e", "1^", "-", " ", "#", "#### ", "#### 1", "{", "}",
        "a", "a_", "ab ", "\\", "\\frac", r"\frac{1", r"\frac{1}{", r"\boxed{", r"\boxed{1",
        r"\boxed 1", r"\text{", r"\text{a}", r"\x{", "{}", r"\bf ", r"\color{", "½", "₹",
        "USD", r"/\text{a", r"1\times 10^", "1 million", "$", "=", "m^", "é",
    ],
)  # fmt: skip
def test_a_long_text_costs_little(piece: str) -> None:
    many = piece * (MANY // len(piece))
    for text in (many, f"1{many}1", rf"\boxed{{{many}}}"):
        final_number(text)


@pytest.mark.parametrize(
    "text", ["1" * MANY, "1e999999999", "1e-999999999", "1e" + "9" * MANY, "0." + "0" * MANY]
)
def test_a_number_too_large_to_handle_is_none(text: str) -> None:
    assert final_number(text) is None
    with pytest.raises(ValueError, match="one number"):
        one_number(text)
