r"""The value of a written expression: 1/2, 2\sqrt{3}, 5!, x^2+1, (1, 2], {1, 2}. It is parsed, never run as code.

sum := product (("+" | "-") product)*
product := sign? power (("*" | "/")? power)*
power := atom "!"? ("^" power)?
"""

import cmath
import math
import re
from dataclasses import dataclass

LARGEST_POWER = 1000
LARGEST_CHOICE = 1000  # of how many
LARGEST_FACTORIAL = 170  # the last that a float holds
_TOKEN = re.compile(r"\s*(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\\?[a-zA-Z]+|.)", re.DOTALL)
_FUNCTIONS = {
    "sqrt": cmath.sqrt, "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "exp": cmath.exp,
    "ln": cmath.log, "log": cmath.log10,
}  # fmt: skip
_CONSTANTS = {"pi": math.pi, "π": math.pi, "e": math.e, "i": 1j}
_ENDS = ("+", "-", ",", "\\cup", ")", "}", "]", "|")  # of a product
_CLOSING = {"(": ")]", "[": ")]", "{": "}"}


@dataclass(frozen=True)
class Group:
    """Several values. ``brackets``: both of them, "()" or "[)" or "{}"; "" of a list without."""

    brackets: str
    items: tuple["Value", ...]


Value = complex | Group


def tokens_of(text: str, *, products: bool) -> list[str]:
    """Numbers, names and signs. ``products``: two or three letters that touch anything are one each: 2xy, not "is"."""
    found: list[str] = []
    for match in _TOKEN.finditer(text):
        word, before, after = match[1], text[: match.start(1)][-1:], text[match.end() :][:1]
        is_name = not 1 < len(word) <= 3 or not word.isalpha() or word in _FUNCTIONS or word in _CONSTANTS
        found += [word] if is_name or not products or not (before + after).strip() else word
    return [token for token in found if token.strip()]


def letters_of(tokens: list[str]) -> set[str]:
    r"""What stands for any number; \infty too, which equals nothing else."""
    return {t for t in tokens if t == "\\infty" or (len(t) == 1 and t.isalpha() and t not in _CONSTANTS)}


def value(tokens: list[str], letters: dict[str, complex]) -> Value:
    """Of ``tokens``, with what their ``letters`` stand for. ValueError or ArithmeticError if there is none."""
    parser = _Parser(tokens, letters)
    try:
        found = parser.items("")
    except RecursionError:
        raise ValueError("nested too deep") from None
    if parser.next():
        raise ValueError(f"{parser.next()!r} was not expected")
    return found


def number(found: Value) -> complex:
    if isinstance(found, Group):
        raise ValueError("a list has no value of its own")
    return found


def _whole(n: complex, most: int) -> int:
    if n.imag or not n.real.is_integer() or not 0 <= n.real <= most:
        raise ValueError(f"{n} is no whole number up to {most}")
    return int(n.real)


class _Parser:
    def __init__(self, tokens: list[str], letters: dict[str, complex]) -> None:
        self._tokens, self._letters, self._at = list(tokens), letters, 0

    def items(self, opening: str) -> Value:
        """What stands between brackets, or all of a text."""
        found = [self._sum()]
        while self.next() in (",", "\\cup"):  # a union is the list of its parts
            self._at += 1
            found.append(self._sum())
        brackets = opening + self._take(*_CLOSING[opening]) if opening else ""
        if len(found) > 1:
            return Group(brackets, tuple(found))
        if brackets in ("(]", "[)"):
            raise ValueError(f"{brackets} around one value")
        return found[0]

    def next(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _sum(self) -> Value:
        total = self._product()
        while (sign := self.next()) in ("+", "-"):
            self._at += 1
            term = number(self._product())
            total = number(total) + (term if sign == "+" else -term)
        return total

    def _product(self) -> Value:
        if self.next() in ("-", "+"):
            sign = -1 if self._take() == "-" else 1
            return sign * number(self._product())
        total = self._power()
        while (token := self.next()) and token not in _ENDS:
            if token == "%":
                self._at += 1
                total = number(total) / 100
            elif token in ("*", "/"):
                self._at += 1
                sign = -1 if self.next() == "-" else 1
                self._at += sign < 0
                factor = sign * number(self._power())
                total = number(total) * factor if token == "*" else number(total) / factor
            elif _is_number(token) and _is_number(self._tokens[self._at - 1]):
                raise ValueError(f"{token} follows a number")
            else:
                total = number(total) * number(self._power())  # 2x, 3(4), 2\sqrt{3}
        return total

    def _power(self) -> Value:
        base = self._atom()
        if self.next() == "!":
            self._at += 1
            base = complex(math.factorial(_whole(number(base), LARGEST_FACTORIAL)))
        return _to_the(number(base), self._exponent()) if self.next() == "^" else base

    def _exponent(self) -> complex:
        self._take("^")
        negative = self.next() == "-"
        self._at += negative
        found = number(self._power())
        return -found if negative else found

    def _atom(self) -> Value:
        token = self._take()
        if _is_number(token):
            if math.isinf(float(token)):
                raise OverflowError(token)
            return complex(float(token))
        if token in _CLOSING:
            return self.items(token)
        if token == "|":
            inside = abs(number(self._sum()))
            self._take("|")
            return complex(inside)
        if token == "\\frac":
            above = self._argument()
            return above / self._argument()
        if token == "\\binom":
            n, k = (_whole(self._argument(), LARGEST_CHOICE) for _ in "nk")
            return complex(math.comb(n, k))
        name = token.removeprefix("\\")
        if name in _FUNCTIONS:
            return self._function(name)
        if name in _CONSTANTS:
            return complex(_CONSTANTS[name])
        if token in self._letters:
            return self._letters[token]
        raise ValueError(f"{token!r} has no value")

    def _function(self, name: str) -> complex:
        if name == "sqrt" and self.next() == "[":
            self._at += 1
            root = number(self._sum())
            self._take("]")
            return number(self._atom()) ** (1 / root)
        if name == "log" and self.next() == "_":
            self._at += 1
            base = self._argument()
            return cmath.log(number(self._atom())) / cmath.log(base)
        power = self._exponent() if self.next() == "^" else 1  # \sin^2 x
        return _to_the(_FUNCTIONS[name](number(self._atom())), power)

    def _argument(self) -> complex:
        r"""Of \frac: what braces hold or, without them, one digit."""
        token = self.next()
        if token.isdecimal() and len(token) > 1:
            self._tokens[self._at] = token[1:]
            return complex(int(token[0]))
        return number(self._atom())

    def _take(self, *expected: str) -> str:
        token = self.next()
        if not token or (expected and token not in expected):
            raise ValueError(f"{token!r} where {expected} was expected")
        self._at += 1
        return token


def _is_number(token: str) -> bool:
    return re.match(r"\.?\d", token, re.ASCII) is not None


def _to_the(base: complex, power: complex) -> complex:
    if abs(power) > LARGEST_POWER:
        raise OverflowError
    if base.imag == power.imag == 0 and (base.real >= 0 or complex(power).real.is_integer()):
        return complex(base.real**power.real)  # exact where complex powers go by logarithms
    return base**power
