"""Written answers of equal and of other value; none runs code or runs for ever."""

import time
from dataclasses import replace

import pytest

from torchft.config import Component
from torchft.data.prompts import Prompt
from torchft.rl.math_answer import evaluate, final_answer, is_equal
from torchft.rl.rewards import Attempt
from torchft.rl.scoring import RewardConfig, Scorer

EQUAL = [
    ("0.5", r"\frac{1}{2}"), ("1/2", ".5"), (r"\dfrac12", "0.5"), ("50%", "0.5"), (r"50\%", r"\frac{1}{2}"),
    ("1,000", "1000"), ("1,234,567.5", "1234567.5"), ("$12", "12"), ("x = 7", "7"), (r"7\text{ cm}", "7"),
    (r"2\sqrt{3}", r"\sqrt{12}"), (r"\sqrt[3]{27}", "3"), (r"\frac{\pi}{4}", "pi/4"), ("-3", r"\left(-3\right)"),
    ("2^{10}", "1024"), ("2^-1", "0.5"), ("-2^2", "-4"), ("(1, 2)", r"\left( 1 , \frac{4}{2} \right)"),
    ("x^2+2x+1", "(x+1)^2"), ("3(a-b)", "3a-3b"), (r"\frac{x}{2}", "0.5x"), ("30^\\circ", "30"),
    ("east", "East"), (r"5 \times 10^3", "5000"), ("3.0", "3"), ("1e", "e"), ("\u22124", "-4"), ("12.", "12"),
    (r"\sin(\pi/6)", "1/2"), (r"1\frac12", "1.5"), ("1 1/2", "3/2"), ("{1,2}", "{2, 1}"), ("1, 2", "2, 1"),
    ("2xy", "2yx"), ("1e5", "100000"), ("1.5e-3", "0.0015"), ("5!", "120"), ("3!+1", "7"), ("5 million", "5,000,000"),
    ("50%", "50"), (r"\left(-\infty, 3\right]", r"(-\infty,3]"), ("0.333333", "1/3"), ("(1,2)", "1,2"), ("|x|", "|-x|"),
    (r"10,\!000", "10000"), ("(100,200)", "(100, 200)"), ("18 dollars", "18"), ("x > 3", "x>3"), (r"x \geq 3", "x≥3"),
    (r"\binom{5}{2}", "10"), (r"\log_2 8", "3"), (r"\sin^2 x + \cos^2 x", "1"), ("sin(pi)", "0"),
]  # fmt: skip
OTHER = [
    ("0.5", "0.51"), ("1/3", "0.333"), ("x+1", "x-1"), ("(1, 2)", "(2, 1)"), ("(1, 2)", "1"), ("x", "y"),
    ("", ""), ("", "0"), ("1/0", "1/0x"), ("__import__('os')", "1"), ("9" * 600, "1"), ("2^(10^10)", "1"),
    ("((((", "1"), ("-3", "3"), ("east", "west"), ("10", "1010"),
    ("(1,2)", "[1,2]"), ("(1,2]", "[1,2)"), ("12", "1 2"), ("1 2", "2"), ("2xy", "2xz"), ("no", "on"), ("east", "seat"),
    ("{1,2}", "{1,3}"), ("{1,1,2}", "{1,2,3}"), ("(1,2)", "(2,1)"), ("(1,2)", "{1,2}"), ("1e5", "e"), ("-5!", "120"),
    ("x=2", "y=2"), ("|x|", "x"), ("123456789012", "123456789013"), ("6.63e-34", "6.62e-34"), ("0.333", "1/3"),
    ("x > 3", "x < 3"), (r"(3, \infty)", r"(3, -\infty)"), ("9" * 400, "8" * 400), ("999!", "998!"), ("5!", "5"),
    ("(3]", "3"),
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
        ("The total is 1,234 dollars", "1,234"),
        ("she sees 12,345,678 stars", "12,345,678"),
        ("she pays $2,072.", "2,072"),
        (r"The answer is \frac{3}{4}.", r"\frac{3}{4}"),
        (r"so it is $-\frac{1}{2}$", r"-\frac{1}{2}"),
        ("the range is 3-5", "3-5"),
        ("covid-19 it is", "19"),
        ("it is \u22124 now", "-4"),
        ("#### 5\nmore text", "5"),
        ("#### Final answer: 72", "72"),
        ("#### the red one", "the red one"),
        ("####", None),
        ("3x + y = 7", "3x + y = 7"),
        ("2x = 4\nx = 2", "2"),
        (r"\boxed{}", None),
        ("The answer is 5. I checked 3 times.", "5"),
        ("Answer: 3 + 4 = 7", "7"),
        ("I think the answer to 2 is 7", "7"),
        ("<think>3</think><answer>It is 42 in all</answer> 9", "42"),
        ("A = 3.14 * 2^2 = 12.56 cm^2.", "12.56"),
        ("So, 12", "12"),
        ("ok: 5 then", "5"),
        ("costs $5 and $6", "6"),
        ("so the point is $(1, 2)$, or not", "(1, 2)"),
        ("1. Eggs\n2. Milk\n- 3 apples", "3"),
        ("so $x > 3$ it is", "x > 3"),
        ("2xy", "2xy"),
        ("**8**", "8"),
        ("I do not know", None),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer


def test_long_and_nested_text_takes_no_time():
    began = time.perf_counter()
    texts = ["(" * 100_000, "1+" * 100_000, "2^" * 1000 + "2", "1" * 100_000, "{" * 400 + "}" * 400]
    texts += [part * 5000 for part in ("\\[ ", "(111, ", "$1 a$ ", "((1) ", "1.1. ", "-( ", "\\a ")]
    for text in texts:
        is_equal(text, "1")
        final_answer(text)
    assert time.perf_counter() - began < 2


def test_an_answer_of_the_data_without_a_value_is_a_counted_failure(caplog):
    prompt = Prompt(messages=[], answer="four is the answer", values={}, where="data.jsonl:3")
    wrong = Attempt(prompt=prompt, text="4", num_tokens=1, finish="stop")
    right = replace(wrong, prompt=replace(prompt, answer="so 4"))
    scorer = Scorer([RewardConfig(reward=Component("torchft.rl.rewards.math_answer"))], timeout_s=5)
    found = scorer.score([wrong, right])
    assert found.num_failed == {"math_answer": 1} and found.by_reward["math_answer"][1] == 1
    assert "data.jsonl:3: no value in the answer of the data, 'four is the answer'" in caplog.text


def test_evaluate():
    assert evaluate("3*4+2^3/4") == 14
    for broken in ("", "1/0", "x+1", "(1,2)", "1 2", "200!", "sqrt(-1)", "import os", "9^9^9^9"):
        with pytest.raises(ValueError):
            evaluate(broken)


def test_a_mixed_number_in_a_sentence():
    assert final_answer("he has 3 1/2 apples") == "3 1/2" and is_equal("3 1/2", "3.5") and not is_equal("3 1/2", "1.5")
    assert final_answer("in 2024 1/2 of them") == "1/2"  # a year is no part of it


def test_choices_are_of_whole_numbers_and_bounded():
    assert is_equal(r"\binom{5}{2}", "10") and not is_equal(r"\binom{2.7}{1.2}", "2")
    began = time.monotonic()
    with pytest.raises(ValueError, match="no whole number up to 1000"):
        evaluate(r"\binom{100000000}{50000000}")
    assert time.monotonic() - began < 1
