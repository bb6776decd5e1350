"""Written answers of equal and of other value; none runs code or runs for ever."""

import time

import pytest

from torchft.rl.math_answer import evaluate, final_answer, is_equal

EQUAL = [
    ("0.5", r"\frac{1}{2}"), ("1/2", ".5"), (r"\dfrac12", "0.5"), ("50%", "0.5"), (r"50\%", r"\frac{1}{2}"),
    ("1,000", "1000"), ("1,234,567.5", "1234567.5"), ("$12", "12"), ("x = 7", "7"), (r"7\text{ cm}", "7"),
    (r"2\sqrt{3}", r"\sqrt{12}"), (r"\sqrt[3]{27}", "3"), (r"\frac{\pi}{4}", "pi/4"), ("-3", r"\left(-3\right)"),
    ("2^{10}", "1024"), ("2^-1", "0.5"), ("-2^2", "-4"), ("(1, 2)", r"\left( 1 , \frac{4}{2} \right)"),
    ("x^2+2x+1", "(x+1)^2"), ("3(a-b)", "3a-3b"), (r"\frac{x}{2}", "0.5x"), ("30^\\circ", "30"),
    ("east", "East"), (r"5 \times 10^3", "5000"), ("3.0", "3"), ("1e", "e"), ("\u22124", "-4"), ("12.", "12"),
    (r"\sin(\pi/6)", "1/2"),
]  # fmt: skip
OTHER = [
    ("0.5", "0.51"), ("1/3", "0.333"), ("x+1", "x-1"), ("(1, 2)", "(2, 1)"), ("(1, 2)", "1"), ("x", "y"),
    ("", ""), ("", "0"), ("1/0", "1/0x"), ("__import__('os')", "1"), ("9" * 600, "1"), ("2^(10^10)", "1"),
    ("((((", "1"), ("-3", "3"), ("east", "west"), ("10", "1010"),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_equal(one, other):
    assert is_equal(one, other) and is_equal(other, one)


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_other(one, other):
    assert not is_equal(one, other) and not is_equal(other, one)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So \boxed{\frac{1}{2}} it is, or \boxed{\sqrt{x^{2}}}.", r"\sqrt{x^{2}}"),
        ("He has 3 and 4, so 3 + 4 = 7 apples.", "7"),
        ("It costs $1,250.50 in all.", "1,250.50"),
        ("First 5.\n#### 72", "72"),
        ("A half is 1/2 of it", "1/2"),
        ("east", "east"),
        ("x^2 + 1", "x^2 + 1"),
        ("I do not know", None),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_long_and_nested_text_takes_no_time():
    began = time.perf_counter()
    for text in ("(" * 100_000, "1+" * 100_000, "2^" * 1000 + "2", "1" * 100_000, "{" * 400 + "}" * 400):
        is_equal(text, "1")
        final_answer(text)
    assert time.perf_counter() - began < 2


def test_evaluate():
    assert evaluate("3*4+2^3/4") == 14
    for broken in ("", "1/0", "x+1", "(1,2)", "sqrt(-1)", "import os", "9^9^9^9"):
        with pytest.raises(ValueError):
            evaluate(broken)
