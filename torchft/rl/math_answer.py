r"""Whether two written answers have the same value: 0.5, 1/2, \frac{1}{2}, 50\%, 1,000, 2\sqrt{3}, x^2+1, (1, 2).

Expressions are parsed (never run as code) and compared by their value; those with letters at a few points.
"""

import cmath
import math
import random
import re

Value = complex | tuple["Value", ...]

POINTS = 4  # at which expressions with letters are compared
TOLERANCE = 1e-9  # relative
LONGEST = 500  # characters of an answer
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)?\.?\d+(?:/\d+)?%?")
_TOKEN = re.compile(r"\s*(\d+\.?\d*|\.\d+|\\?[a-zA-Z]+|\^|.)", re.DOTALL)
_FUNCTIONS = {
    "sqrt": cmath.sqrt, "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "exp": cmath.exp,
    "ln": cmath.log, "log": cmath.log10,
}  # fmt: skip


def final_answer(text: str) -> str | None:
    r"""What a solution ends in: its last \boxed{...} or, without one, what follows "####", a short text, or its last
    number. None if there is nothing."""
    if (boxed := _last_boxed(text)) is not None:
        return boxed
    if "####" in text:
        return text.rpartition("####")[2].strip() or None
    if text.strip() and len(text.split()) <= 1:
        return text.strip()
    if _is_expression(text):
        return text.strip()
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def is_equal(one: str, other: str) -> bool:
    """Whether both are written alike, but for spaces, or have the same value."""
    one, other = _clean(one), _clean(other)
    if one.replace(" ", "").lower() == other.replace(" ", "").lower():
        return bool(one)
    if max(len(one), len(other)) > LONGEST:
        return False
    draw = random.Random(0)
    letters = {name: complex(draw.uniform(0.3, 2.0)) for name in sorted(_letters(one) | _letters(other))}
    try:
        for _ in range(POINTS if letters else 1):
            if not _is_close(_Parser(one, letters).value(), _Parser(other, letters).value()):
                return False
            letters = {name: complex(draw.uniform(0.3, 2.0)) for name in letters}
    except (ValueError, ZeroDivisionError, OverflowError, RecursionError):
        return False
    return True


def _is_close(one: Value, other: Value) -> bool:
    if isinstance(one, tuple) or isinstance(other, tuple):
        both = isinstance(one, tuple) and isinstance(other, tuple) and len(one) == len(other)
        return both and all(_is_close(a, b) for a, b in zip(one, other))  # type: ignore[arg-type]
    return cmath.isfinite(one) and cmath.isclose(one, other, rel_tol=TOLERANCE, abs_tol=1e-12)


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


def _clean(text: str) -> str:
    """Without what has no value: dollar signs, spacing, units in \\text, a full stop, "x =" before the answer."""
    text = re.sub(r"\\(?:left|right|displaystyle|,|;|!|quad)(?![a-zA-Z])|\\[$]|\$", " ", text)
    text = re.sub(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}", lambda m: "" if re.search(r"\d", text) else m[1], text)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\%", "%").replace("\\cdot", "*")
    text = text.replace("\\times", "*").replace("\\div", "/").replace("\u2212", "-")
    text = text.replace("^\\circ", "").replace("°", "")
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text).strip().rstrip(".").strip()
    return re.sub(r"^[a-zA-Z]\s*=\s*", "", text)


def _letters(text: str) -> set[str]:
    return {w for w in re.findall(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])", text) if w not in ("e", "i")}


def _is_expression(text: str) -> bool:
    text = _clean(text)
    try:
        _Parser(text, dict.fromkeys(_letters(text), 1.0 + 0j)).value()
    except (ValueError, ZeroDivisionError, OverflowError, RecursionError):
        return False
    return bool(text) and len(text) <= LONGEST


class _Parser:
    """sum := product (("+" | "-") product)*; product := sign? power (("*" | "/")? power)*; power := atom "^" power."""

    def __init__(self, text: str, letters: dict[str, complex]) -> None:
        self._tokens = [t for t in _TOKEN.findall(text) if t.strip()]
        self._letters, self._at = letters, 0

    def value(self) -> Value:
        found = self._list()
        if self._at != len(self._tokens):
            raise ValueError(f"{self._next()!r} was not expected")
        return found

    def _list(self) -> Value:
        items: list[Value] = [self._sum()]
        while self._next() == ",":
            self._at += 1
            items.append(self._sum())
        return items[0] if len(items) == 1 else tuple(items)

    def _sum(self) -> Value:
        total = self._product()
        while (sign := self._next()) in ("+", "-"):
            self._at += 1
            term = _number(self._product())
            total = _number(total) + (term if sign == "+" else -term)
        return total

    def _product(self) -> Value:
        if self._next() in ("-", "+"):
            sign = -1 if self._take() == "-" else 1
            return sign * _number(self._product())
        total = self._power()
        while (token := self._next()) and token not in ("+", "-", ",", ")", "}", "]"):
            if token == "%":
                self._at += 1
                total = _number(total) / 100
            elif token in ("*", "/"):
                self._at += 1
                sign = -1 if self._next() == "-" else 1
                self._at += sign < 0
                factor = sign * _number(self._power())
                total = _number(total) * factor if token == "*" else _number(total) / factor
            else:
                total = _number(total) * _number(self._power())  # 2x, 3(4), 2\sqrt{3}
        return total

    def _power(self) -> Value:
        base = self._atom()
        if self._next() != "^":
            return base
        self._at += 1
        negative = self._next() == "-"
        self._at += negative
        exponent = _number(self._power())
        if abs(exponent) > 1000:
            raise OverflowError
        return _number(base) ** (-exponent if negative else exponent)

    def _atom(self) -> Value:
        token = self._take()
        if token[0].isdigit() or token[0] == ".":
            return complex(float(token))
        if token in ("(", "[", "{"):
            inner = self._list()
            self._take(*")]}" if token != "{" else "}")
            return inner
        if token == "\\frac":
            above = self._argument()
            return above / self._argument()
        name = token.removeprefix("\\")
        if name in _FUNCTIONS:
            if name == "sqrt" and self._next() == "[":
                self._at += 1
                root = _number(self._sum())
                self._take("]")
                return _number(self._atom()) ** (1 / root)
            return _FUNCTIONS[name](_number(self._atom()))
        constants = {"pi": math.pi, "π": math.pi, "e": math.e, "i": 1j, "infty": math.inf}
        if name in constants:
            return complex(constants[name])
        if name in self._letters:
            return self._letters[name]
        raise ValueError(f"{token!r} has no value")

    def _argument(self) -> complex:
        """Of \\frac: what braces hold or, without them, one digit."""
        token = self._next()
        if token.isdigit() and len(token) > 1:
            self._tokens[self._at] = token[1:]
            return complex(int(token[0]))
        return _number(self._atom())

    def _next(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, *expected: str) -> str:
        token = self._next()
        if not token or (expected and token not in expected):
            raise ValueError(f"{token!r} where {expected} was expected")
        self._at += 1
        return token


def evaluate(expression: str) -> float:
    """The real value of an expression in numbers. ValueError if it has none."""
    try:
        found = _number(_Parser(_clean(expression), {}).value())
    except (ZeroDivisionError, OverflowError, RecursionError):
        raise ValueError(f"{expression!r} has no value") from None
    if abs(found.imag) > 1e-12 or not cmath.isfinite(found):
        raise ValueError(f"{expression!r} has no real value")
    return found.real


def _number(value: Value) -> complex:
    if isinstance(value, tuple):
        raise ValueError("a list has no value of its own")
    return value
