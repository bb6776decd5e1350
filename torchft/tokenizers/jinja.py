"""A checkpoint's chat template, run as the untrusted code that it is: sandboxed, and bounded in size and time.

Variables, filters and white space are those of transformers, so that a template renders the same text.
Threat: a template of a stranger's checkpoint that reads what it should not, or that never ends.
"""

import json
import threading
import time
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

from torchft.errors import UserError

MAX_SOURCE = 1 << 20  # characters
MAX_TEXT = 1 << 25  # characters of the rendered text and of each string on the way to it
MAX_SECONDS = 10.0  # a long conversation takes milliseconds

# Lone surrogates cannot be in a valid text, so no message can forge these.
START, END = "\udc01", "\udc02"  # around what {% generation %} marks
GUARD = "\udc03"  # put inside a string that must not act as a control token

_SIZED = (str, list, tuple)
_FAILURES = (  # what a template's own mistakes raise
    jinja2.TemplateError, ArithmeticError, LookupError, AttributeError, TypeError, ValueError, RecursionError,
    MemoryError,
)  # fmt: skip


class Template:
    """One compiled chat template. ``where`` names its file in errors. Pickles by its source."""

    def __init__(self, source: str, where: str) -> None:
        if len(source) > MAX_SOURCE:
            raise UserError(f"{where}: the chat template has {len(source):,} characters; the limit is {MAX_SOURCE:,}")
        self.source = source
        self.where = where
        self._environment = _Sandbox()
        try:
            self._template = self._environment.from_string(source)
            self._template.globals = dict(self._template.globals)  # not a ChainMap, which a render walks twice
            self.variables = meta.find_undeclared_variables(self._environment.parse(source))
        except _FAILURES as e:
            raise UserError(f"{where}: the chat template does not compile: {_describe(e)}") from None
        self.has_marks = any(
            START in data.data for data in self._environment.parse(source).find_all(nodes.TemplateData)
        )

    def __reduce__(self) -> tuple[type["Template"], tuple[str, str]]:
        return Template, (self.source, self.where)

    def render(self, **variables: Any) -> str:
        """The text, with START, END and GUARD still in it. UserError if the template refuses, fails or goes too far."""
        self._environment.budget.deadline = time.monotonic() + MAX_SECONDS
        parts, size = [], 0
        try:
            for part in self._template.generate(**variables):
                parts.append(part)
                size += len(part)
                _check_size(size)
        except _FAILURES as e:
            raise UserError(
                f"{self.where}: the chat template cannot render this conversation: {_describe(e)}"
            ) from None
        return "".join(parts)


class _Budget(threading.local):
    deadline = 0.0


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}``: what the model is to learn, transformers' mark."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        before, after = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (START, END))
        return [before, nodes.Scope(body, lineno=line), after]


class _Limits(NodeTransformer):
    """Puts the clock into every loop and macro, and the size check into ``~``.

    As filters, which compiled code calls at once; each call of a function goes through the sandbox's checks.
    """

    def visit_For(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_filter("tick", nodes.Const(None))))
        return node

    visit_Macro = visit_CallBlock = visit_For

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter("paste", nodes.List(node.nodes))


def _filter(name: str, argument: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(argument, name, [], [], None, None)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})
    # these make a huge string of two small arguments
    _huge_filters = ("batch", "center", "format", "indent", "slice", "wordwrap", "xmlattr")
    _huge_methods = frozenset({"center", "expandtabs", "ljust", "rjust", "translate", "zfill"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.budget = _Budget()
        self.globals.pop("lipsum")
        self.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now, "dict": _dict}
        for name in self._huge_filters:
            del self.filters[name]
        self.filters |= {"tojson": _tojson, "replace": _replace, "join": _join, "tick": self.tick, "paste": _paste}

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:  # jinja2's hook before it compiles
        return super()._generate(_Limits().visit(source), *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Any:
        if super().wrap_str_format(value) is not None:
            raise SecurityError("str.format is not allowed here")
        return None

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return super().is_safe_attribute(obj, attr, value) and not (isinstance(obj, str) and attr in self._huge_methods)

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        match getattr(function, "__self__", None), getattr(function, "__name__", ""):
            case str(text), "replace":
                return _replace(text, *args, **kwargs)
            case str(text), "join":
                return _join(args[0], text)
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+":
            if isinstance(left, _SIZED) and isinstance(right, _SIZED):
                _check_size(len(left) + len(right))
        elif operator == "*":  # of numbers too: squared often enough, one fills the memory
            sizes = [len(x) if isinstance(x, _SIZED) else x for x in (left, right)]
            _check_size(sizes[0] * sizes[1])
        elif operator == "**" or isinstance(left, str):
            raise SecurityError(f"the operator {operator} is not allowed here")
        return super().call_binop(context, operator, left, right)

    def tick(self, _: None) -> None:
        if time.monotonic() > self.budget.deadline:
            raise SecurityError(f"it runs for more than {MAX_SECONDS:.0f} s")


def _check_size(size: int) -> None:
    if size > MAX_TEXT:
        raise SecurityError(f"it makes a text of {size:,} characters; the limit is {MAX_TEXT:,}")


def _paste(parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _replace(text: Any, old: str, new: str, count: int = -1) -> str:
    text = str(text)
    _check_size(len(text) + text.count(old) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _join(value: Any, d: str = "", attribute: str | None = None) -> str:
    texts = [str(item[attribute] if attribute else item) for item in value]
    _check_size(sum(map(len, texts)) + len(d) * len(texts))
    return d.join(texts)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    _check_size((indent or 0) * 1000)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100 or any(c.isdigit() for c in pattern):  # "%9999999d" pads
        raise SecurityError(f"strftime_now({pattern!r:.100}) is not allowed")
    return datetime.now().strftime(pattern)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _describe(e: BaseException) -> str:
    line = f" (line {e.lineno})" if isinstance(e, jinja2.TemplateSyntaxError) else ""
    return f"{e or type(e).__name__}{line}"
