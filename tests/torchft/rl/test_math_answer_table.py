r"""Our reading of answers beside math-verify's: the same on every pair but those that say why not.

Made by math-verify 0.9.0 with latex2sympy2_extended 1.11.0 and sympy 1.14.0, which are not needed to run it:

    from math_verify import parse, verify
    verify(parse(f"${answer}$"), parse(text))
"""

import pytest

from torchft.rl.math_answer import final_answer, is_equal, wanted_answer

PAIRS = [  # the data's answer, what a model said, whether math-verify takes it for right
    ("1234", "The total is 1,234 dollars", True),
    ("1000", "It costs 1,000", True),
    ("12345678", "12,345,678 stars", True),
    ("2072", "she pays $2,072.", True),
    ("72", "she pays $2,072.", False),
    (r"\frac{3}{4}", r"The answer is \frac{3}{4}.", True),
    ("4", r"The answer is \frac{3}{4}.", False),
    (r"-\frac{1}{2}", r"$-\frac{1}{2}$", True),
    ("2", r"$-\frac{1}{2}$", False),
    ("3-5", "the range is 3-5", True),
    ("-5", "the range is 3-5", False),
    ("5", '#### 5\nmore text', True),
    ("7", "The answer is 3 + 4 = 7.", True),
    ("5", "The answer is 5. I checked 3 times.", True),
    ("3", "The answer is 5. I checked 3 times.", False),
    ("16", "so 4 * 4 = 16 in total", True),
    ("14", "so the total is (3+4)*2", True),
    ("6", "costs $5 and $6", True),
    ("9", "costs $5 and $6", False),
    ("8", "It is **8**", True),
    ("0.5", "one half, so 50%", True),
    (r"2\sqrt{3}", r"The answer is 2\sqrt{3}.", False),
    (r"2\sqrt{3}", r"it is $2\sqrt{3}$, as said", True),
    ("(1,2)", "The point is (1, 2).", False),
    ("19", "covid-19 has 19 proteins", True),
    ("1250.5", "It costs $1,250.50 in all.", True),
    ("12", r"\boxed{12} after 13 steps", True),
    ("x^2", r"so \boxed{x^{2}}.", True),
    (r"\frac{1}{2}", r"$$\boxed{\frac{1}{2}}$$", True),
    ("(1,2)", "$[1,2]$", False),
    ("(1,2]", "$[1,2)$", False),
    ("(1,2)", "$(1,2)$", True),
    ("(1,2)", "$(2,1)$", False),
    ("(100,200)", "$(100, 200)$", True),
    (r"(-\infty,3]", r"$(-\infty, 3]$", True),
    (r"(-\infty,3]", r"$(-\infty, 3)$", False),
    (r"(3,\infty)", r"$(3,-\infty)$", False),
    (r"[1,2]\cup[3,4]", r"$[3,4]\cup[1,2]$", True),
    (r"[1,2]\cup[3,4]", r"$[1,2]\cup[3,5]$", False),
    (r"x \in [1,2]", "$[1,2]$", True),
    ("x>3", "$x>3$", True),
    ("x>3", "$x<3$", False),
    ("x>3", r"$(3,\infty)$", True),
    ("12", "1 2", False),
    ("12", "$1 2$", False),
    (r"1\frac{1}{2}", "1.5", True),
    ("1.5", r"$1\frac{1}{2}$", True),
    (r"11\frac{1}{4}", "$11.25$", True),
    (r"\frac{1}{2}", r"$1\frac{1}{2}$", False),
    ("1.5", "1 1/2", False),
    (r"\{1,2\}", r"$\{2,1\}$", True),
    (r"\{1,2\}", r"$\{1,3\}$", False),
    (r"\{1,2\}", "$1,2$", True),
    ("{1,2}", "{2,1}", False),
    ("1,2", "$2,1$", True),
    ("(1,2)", "$1,2$", True),
    (r"\{5\}", "$5$", True),
    ("1/2, 1/3", r"$\frac13,\frac12$", True),
    ("2xy", "$2yx$", True),
    ("2xy", "$2xz$", False),
    ("xy+1", "$1+yx$", True),
    ("xy", "$yx$", True),
    ("(x+1)(x-1)", "$x^2-1$", True),
    ("(x+1)^2", "$x^2+1$", False),
    (r"\frac{1}{x}", "$x^{-1}$", True),
    ("a+b", "$b+a$", True),
    ("3+4i", "$4i+3$", True),
    ("y=2x+1", "$2x+1$", True),
    ("x=7", "7", True),
    ("x=2", "$y=2$", False),
    (r"\sin^2 x+\cos^2 x", "$1$", True),
    ("100000", "1e5", False),
    ("0.0015", "1.5e-3", False),
    ("5!", "120", True),
    ("120", "$5!$", True),
    (r"\binom{5}{2}", "10", True),
    (r"\log_2 8", "$3$", True),
    ("|-5|", "$5$", True),
    ("|x|", "$x$", False),
    (r"\sqrt[3]{8}", "$2$", True),
    ("2^{10}", "1024", True),
    ("0.1", "$.1$", True),
    ("3.0", "3", True),
    ("50", r"$50\%$", True),
    ("0.5", "50%", True),
    ("8%", "0.08", True),
    ("8%", "0.8", False),
    ("1/2", "0.5", True),
    ("1/3", "0.333", False),
    ("1/3", "0.333333", True),
    ("0.333333", r"$\frac13$", True),
    ("3.141593", r"$\pi$", True),
    (r"\pi", "3.14", False),
    ("12345678901", "12345678902", False),
    (r"6.63\times10^{-34}", r"$6.62\times 10^{-34}$", True),
    (r"10,\!000", "10000", True),
    ("1{,}000", "1000", True),
    (r"-\frac{1}{2}", r"$\frac{-1}{2}$", True),
    ("-4", "\u22124", False),
    ("1:2", r"$\frac{1}{2}$", True),
    ("5", r"$5\text{ km}$", True),
    ("30", r"$30^\circ$", True),
    ("10", r"$10\text{ dollars}$", True),
    ("18", "$18 dollars$", False),
    ("5km", "5", True),
    (r"\text{east}", "east", False),
    (r"\text{east}", r"$\text{east}$", True),
    (r"\text{east}", r"$\text{west}$", False),
    ("A", "A", False),
    ("(A)", "A", False),
    ("3", "(3)", False),
    ("four is the answer", "4", False),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"$\begin{pmatrix}1\\2\end{pmatrix}$", True),
]  # fmt: skip
OTHERWISE = {  # where we differ, and why
    (r"2\sqrt{3}", r"The answer is 2\sqrt{3}."): "LaTeX without dollars is read as what it is, not as its last number",
    ("(1,2)", "The point is (1, 2)."): "a pair without dollars is a pair",
    ("1.5", "1 1/2"): "a mixed number without LaTeX",
    ("{1,2}", "{2,1}"): "a set without dollars is a set",
    ("-4", "\u22124"): "the minus sign of typography",
    ("100000", "1e5"): "numbers as programs write them",
    ("0.0015", "1.5e-3"): "numbers as programs write them",
    (r"6.63\times10^{-34}", r"$6.62\times 10^{-34}$"): "small numbers are not rounded to six places",
    ("18", "$18 dollars$"): "a unit after a number is no product of letters",
    ("3", "(3)"): "brackets around one value mean nothing",
    (r"\text{east}", "east"): "an answer that is a word",
    ("A", "A"): "an answer that is a letter",
    ("(A)", "A"): "an answer that is a letter",
    ("xy", "$yx$"): "letters alone are a word: 'no' is not 'on'",
    ("5km", "5"): "letters that touch a number are a product: there is no list of units",
    ("x>3", r"$(3,\infty)$"): "an inequality equals what is written alike; it is not solved",
}


@pytest.mark.parametrize(("answer", "text", "theirs"), PAIRS)
def test_as_math_verify(answer, text, theirs):
    if answer == "four is the answer":
        with pytest.raises(ValueError, match="x:1: no value in the answer of the data"):
            wanted_answer(answer, "x:1")
        return
    got = final_answer(text)
    ours = got is not None and is_equal(got, wanted_answer(answer, "x:1"))
    assert ours == (theirs != ((answer, text) in OTHERWISE)), f"read {got!r}"


def test_each_difference_is_of_a_pair():
    assert OTHERWISE.keys() <= {(answer, text) for answer, text, _ in PAIRS}
    assert len(PAIRS) > 100
