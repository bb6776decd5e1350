r"""The answer that a solution ends in, and whether two have the same value: 0.5, 1/2, \frac{1}{2}, 50\%, (1, 2), x^2+1.

Expressions are compared by their value (math_value.py), those with letters at a few points: letters stand for positive
numbers, unless there is a |x|. Beside Hugging Face's math-verify: tests/torchft/rl/test_math_answer_table.py.
"""

import cmath
import random
import re
from collections.abc import Sequence

from torchft.rl.math_value import Group, Value, letters_of, number, tokens_of, value

POINTS = 4  # at which expressions with letters are compared
TOLERANCE = 1e-12  # relative: 123456789012 is not 123456789013
LONGEST = 500  # characters of an answer
TAIL = 2000  # characters in which a text without a box ends
NEAR = 60  # characters after "answer" in which it is given

_NUMBER = r"(?>(?:\d{1,3}(?:,\d{3})+(?!,?\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+)"  # 1,234.5, 1e-3
_TERM = rf"(?:(?<![\w)\]}}])-)?(?:\({{1,5}}-?)?(?<![\w.]){_NUMBER}\){{0,5}}"  # the "-" of 3-5 is no sign
_SIZES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}  # powers of ten
_MIXED = r"(?:(?<![\w.,-])\d{1,3} (?=\d+/\d+(?![\w/])))?"  # the 3 of 3 1/2
_RUN = rf"(?<!\^){_MIXED}{_TERM}(?: ?[-+*/^\u00d7÷] ?{_TERM}){{0,40}}(?:\s?\\?%| (?:{'|'.join(_SIZES)})\b)?"
_RELATION = re.compile(r"[<>≤≥≠]|\\(?:[lg]eq?|neq?|[lg]t)(?![a-zA-Z])|^[^=]*\d[a-zA-Z][^=]*=[^=]*$")
_MATH = re.compile(
    rf"""\$\$(?P<a>.{{1,{LONGEST}}}?)\$\$ | \\\[(?P<b>.{{1,{LONGEST}}}?)\\\] | \\\((?P<c>.{{1,{LONGEST}}}?)\\\)
    | (?<![\\\d])\$(?P<d>[^$\n]{{1,{LONGEST}}})\$(?!\d)                     # no price: $5 and $6
    | (?<!\S)(?P<e>\S*\\[a-zA-Z]+[^\s.,;]*(?:[.,;][^\s.,;]+)*)              # \frac{{3}}{{4}} without dollars
    | (?P<f>(?<!\w)[(\[]\s*RUN(?:\s*,\s*RUN)+\s*[)\]]) | (?P<g>RUN)
    """.replace("RUN", _RUN.replace(" ", "[ ]")),
    re.DOTALL | re.VERBOSE,
)


def final_answer(text: str) -> str | None:
    r"""What a solution ends in: its last \boxed{...}, the line after the last "####", all of a text that is an
    expression or a word, what follows "answer", or the last expression; the last three in <answer> if there is one.
    None if there is nothing."""
    if (boxed := _last_boxed(text)) is not None:
        return boxed or None
    if tagged := re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL):
        text = tagged[-1]
    _, mark, line = text.rpartition("####")
    if mark:
        text = next(iter(line.strip().splitlines()), "")
    if len(text.split()) == 1:
        return text.strip().strip("*`")[:LONGEST] or None
    text = text[-TAIL:].replace("\u2212", "-").strip()
    if _is_expression(text, products=False):
        return text
    return _in_prose(text) or (text or None if mark else None)


def wanted_answer(text: str, where: str) -> str:
    """The `final_answer` of the data's own solution. ValueError if there is none: nothing would ever equal it."""
    if (found := final_answer(text)) is None:
        raise ValueError(
            f"{where}: no value in the answer of the data, {text[:200]!r}; it needs a \\boxed{{...}}, a line #### 72 "
            "or a number: name another column, or leave the row out"
        )
    return found


def is_equal(one: str, other: str) -> bool:
    """Whether both are written alike, but for spaces, or have the same value; 50% is 0.5 and 50."""
    if len({match[1] for text in (one, other) if (match := re.match(r"[\s$]*([a-zA-Z])\s*=", text))}) > 1:
        return False  # x = 2, y = 2
    one, other = _clean(one), _clean(other)
    if _is_same(one, other):
        return True
    return one.endswith("%") != other.endswith("%") and _is_same(one.removesuffix("%"), other.removesuffix("%"))


def evaluate(expression: str) -> float:
    """The real value of an expression in numbers. ValueError if it has none."""
    try:
        found = number(value(tokens_of(_clean(expression), products=False), {}))
    except ArithmeticError:
        raise ValueError(f"{expression!r} has no value") from None
    if abs(found.imag) > 1e-12 or not cmath.isfinite(found):
        raise ValueError(f"{expression!r} has no real value")
    return found.real


def _is_same(one: str, other: str) -> bool:
    if one.lower() == other.lower():
        return bool(one)
    if max(len(one), len(other)) > LONGEST:
        return False
    ours, theirs = tokens_of(one, products=True), tokens_of(other, products=True)
    names = sorted(letters_of(ours) | letters_of(theirs))
    rounding = max(_rounding(one), _rounding(other))
    if not rounding and re.search(r"[a-zA-Z]{2}|[π√]", one + other):
        rounding = 1e-15  # sin(pi) is not quite 0
    draw, low = random.Random(0), -2.0 if "|" in one + other else 0.3
    try:
        for _ in range(POINTS if names else 1):
            letters = {name: complex(draw.uniform(low, 2.0)) for name in names}
            if not _is_close(value(ours, letters), value(theirs, letters), 1e-12 if names else rounding):
                return False
    except (ValueError, ArithmeticError):
        return False
    return True


def _is_close(one: Value, other: Value, rounding: float) -> bool:
    if isinstance(one, Group) and isinstance(other, Group):
        kinds = {one.brackets, other.brackets}
        if len(one.items) != len(other.items) or (len(kinds) > 1 and kinds not in ({"", "()"}, {"", "{}"})):
            return False
        if kinds <= {"", "{}"}:  # of a set, or of solutions one after another, the order means nothing
            return _covers(one.items, other.items, rounding) and _covers(other.items, one.items, rounding)
        return all(_is_close(a, b, rounding) for a, b in zip(one.items, other.items))
    if isinstance(one, Group) or isinstance(other, Group):
        return False
    return cmath.isfinite(one) and cmath.isclose(one, other, rel_tol=TOLERANCE, abs_tol=rounding)


def _covers(some: Sequence[Value], others: Sequence[Value], rounding: float) -> bool:
    return all(any(_is_close(a, b, rounding) for b in others) for a in some)


def _rounding(text: str) -> float:
    """How far a decimal of six places or more may be from what it stands for: 0.333333 is 1/3, 0.333 is not."""
    decimal = re.fullmatch(r"-?\d*\.(\d{6,})", text)
    return 0.5000001 * 10.0 ** -len(decimal[1]) if decimal else 0.0


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, at = 1, start + len("\\boxed{")
    for i in range(at, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[at:i].strip()
    return None


def _in_prose(text: str) -> str | None:
    """The first expression close after the last "answer" that no "=" follows; else the last of all."""
    found, at = None, 0
    start = max((said.end() for said in re.finditer(r"(?i)answer(?:[^.\n]{0,60}? is\b)?", text)), default=-1)
    while match := _MATH.search(text, at):
        said = (match[match.lastgroup] if match.lastgroup else "").strip()
        if match.lastgroup == "g" and said.count("(") != said.count(")"):
            said = said.strip("()")
        if not _is_expression(said, products=True):
            at = match.start() + 1
            continue
        found, at = said, match.end()
        if 0 <= start <= match.start() <= start + NEAR and not re.match(r"\s*=", text[at : at + 9]):
            break
    return found


def _is_expression(text: str, *, products: bool) -> bool:
    if len(text) > LONGEST:
        return False
    if _RELATION.search(text) and not re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{2}", text):
        return True  # x > 3, which equals only what is written alike
    tokens = tokens_of(_clean(text), products=products)
    try:
        value(tokens, dict.fromkeys(letters_of(tokens), 1.5 + 0j))
    except ValueError:
        return False
    except ArithmeticError:  # 1/0 is written as an expression
        return True
    return True


def _clean(text: str) -> str:
    """Without what has no value: dollar signs, spacing, units, a full stop, "x =" before the answer."""
    text = re.sub(r"(?<=\d)(?:\{,\}|,?\\[,!;: ])(?=\d{3}(?!\d))", ",", text)  # 10{,}000, 10\,000, 10,\!000
    text = re.sub(r"\\(?:left|right|displaystyle|q?quad)(?![a-zA-Z])|\\[,;:! $]|[$€£]", " ", text)
    is_of_numbers = re.search(r"\d", re.sub(r"\\text\{[^{}]*\}", "", text))
    text = re.sub(r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf)|mbox)\{([^{}]*)\}", " " if is_of_numbers else r"\1", text)
    for old, new in _WRITTEN.items():
        text = text.replace(old, new)
    text = text.strip().rstrip(".").strip()
    if text[:1] not in "([{":  # (100,200) is a pair
        text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda m: m[0].replace(",", ""), text)
    text = re.sub(r"^[a-zA-Z](?:\([a-z]\))?\s*(?:=|\\in(?![a-zA-Z]))", "", text)
    text = re.sub(r"\s*([^\w\s.]|\s)\s*", r"\1", text).strip()  # spaces only between words and numbers
    text = re.sub(r"(?<=\d):(?=\d)", "/", text)
    text = re.sub(rf"(?<=\d) ({'|'.join(_SIZES)})\b", lambda m: f"*10^{_SIZES[m[1]]}", text)
    text = re.sub(r"^(-?[\d.,/*^]*\d) [a-zA-Z]{2,}[a-zA-Z /]*$", r"\1", text)  # 18 dollars
    part = r"\\frac(?:\{\d+\}|\d)(?:\{\d+\}|\d)"
    return re.sub(rf"(?<![\w.)}}\]])(\d+)(?:({part})| (\d+/\d+)(?![\d/]))", r"(\1+\2\3)", text)  # 1\frac{1}{2}, 1 1/2


_WRITTEN = {
    "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\dbinom": "\\binom", "\\{": "{", "\\}": "}", "\\%": "%",
    "\\cdot": "*", "\\times": "*", "\\div": "/", "\u00d7": "*", "÷": "/", "\u2212": "-", "√": "\\sqrt ",
    "∞": "\\infty ",
    "^\\circ": "", "^{\\circ}": "", "°": "", "\\lvert": "|", "\\rvert": "|",
    "\\leq": "≤", "\\le": "≤", "\\geq": "≥", "\\ge": "≥", "\\neq": "≠", "\\ne": "≠", "\\lt": "<", "\\gt": ">",
}  # fmt: skip
