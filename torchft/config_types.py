"""Fitting one YAML scalar to a Python type, the words for types in error messages, and what a component accepts."""

import inspect
import math
import os
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from torchft.config import Component
from torchft.config_yaml import scalar

NO_FIT = object()

_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    Path: "a path",
    types.NoneType: "null",
    list: "a list",
    tuple: "a list",
    Sequence: "a list",
    dict: "a mapping",
    Mapping: "a mapping",
}


@dataclass(frozen=True)
class Parameters:
    """What a component accepts by keyword."""

    types: dict[str, Any]  # name -> type, Any if it does not say
    required: list[str]
    takes_any: bool  # has **kwargs


def members(kind: Any) -> list[tuple[Any, tuple[Any, ...]]]:
    """The alternatives of a type, each with its notes: ``Annotated[int, R] | None`` -> (int, (R,)), (NoneType, ())."""
    if get_origin(kind) is Annotated:
        inner, *notes = get_args(kind)
        return [(member, (*own, *notes)) for member, own in members(inner)]
    if get_origin(kind) in (Union, types.UnionType):
        return [pair for arg in get_args(kind) for pair in members(arg)]
    return [(kind, ())]


def fit(kind: Any, value: Any, *, exact: bool) -> Any:
    """``value`` as the scalar type ``kind``, else NO_FIT. Only if not ``exact`` is quoted text read as a number."""
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if choice == value and type(choice) is type(value)), NO_FIT)
    if kind is float and type(value) in (int, float) and not math.isnan(value):
        return float(value)
    if kind is Path and isinstance(value, str) and value.strip():
        return Path(os.path.expanduser(value))
    if kind in (bool, int, str, types.NoneType) and type(value) is kind:
        return value
    if exact or kind not in (bool, int, float, str):
        return NO_FIT
    if kind is int and type(value) is float and value.is_integer():
        return int(value)  # max_steps: 1e4
    if kind is str:
        return str(value) if type(value) is int else NO_FIT
    return fit(kind, scalar(value), exact=False) if isinstance(value, str) and scalar(value) != value else NO_FIT


def is_known(kind: Any) -> bool:
    """Whether a YAML value can be held against this type at all (not so: Tensor, Callable, ...)."""
    base = get_origin(kind) or kind
    return base in _WORDS or base is Literal or is_dataclass(kind)


def words(kind: Any) -> str:
    """A type in a user's words."""
    described: list[str] = []
    alternatives = [member for member, _ in members(kind)]
    for member in [m for m in alternatives if is_known(m)] or alternatives:
        if get_origin(member) is Literal:
            described += [repr(choice) for choice in get_args(member)]
        elif is_dataclass(member) and isinstance(member, type):
            described.append("a component" if member is Component else "a mapping")
        else:
            base = get_origin(member) or member
            described.append(_WORDS.get(base, getattr(base, "__name__", str(base))))
    unique = list(dict.fromkeys(described))
    return " or ".join([", ".join(unique[:-1]), unique[-1]] if len(unique) > 1 else unique)


def parameters(component: Callable[..., Any]) -> Parameters:
    """The keyword parameters of a class or function with their types; where it says none, a simple default's type."""
    source = component.__init__ if inspect.isclass(component) else component
    try:
        hints = get_type_hints(source, include_extras=True)
    except NameError:  # a type that is only imported for type checkers
        hints = {}
    found: dict[str, Any] = {}
    required = []
    takes_any = False
    for name, parameter in inspect.signature(component).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            takes_any = True
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            found[name] = hints.get(name, _type_of(parameter.default))
            if parameter.default is parameter.empty:
                required.append(name)
    return Parameters(found, required, takes_any)


def _type_of(default: Any) -> Any:
    if type(default) in (int, float):
        return float if type(default) is float else int | float
    return type(default) if type(default) in (bool, str) else Any
