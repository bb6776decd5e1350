"""Which linear layers an adapter or a quantisation applies to."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from torchft.errors import UserError
from torchft.names import nearest

ALL_LINEAR = "all-linear"  # every nn.Linear but the output head
OUTPUT_HEADS = ("lm_head",)

Number = TypeVar("Number", int, float)


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` is the last words of a module's name ("q_proj", "mlp.up_proj") or a regex for all of it."""
    return name == pattern or name.endswith("." + pattern) or re.fullmatch(pattern, name) is not None


def find_linears(model: nn.Module, targets: str | Sequence[str], *, key: str) -> dict[str, nn.Linear]:
    """The nn.Linear modules by name that ``targets`` (patterns, or "all-linear") match, in the model's order.

    Raises UserError, naming the YAML ``key``, with every pattern that is no regex or matches no linear layer.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if targets == ALL_LINEAR:
        return {name: linear for name, linear in linears.items() if name.rpartition(".")[2] not in OUTPUT_HEADS}
    patterns = [targets] if isinstance(targets, str) else targets
    if not patterns:
        raise UserError(f"{key} is empty: name at least one linear layer, or write {ALL_LINEAR}")
    _check_patterns(patterns, list(linears), key=key)
    return {name: linear for name, linear in linears.items() if any(matches(p, name) for p in patterns)}


def by_pattern(names: Iterable[str], values: Mapping[str, Number], *, default: Number, key: str) -> dict[str, Number]:
    """For each module name the value of the first pattern that matches it, else ``default``.

    Raises UserError, naming the YAML ``key``, with every pattern that is no regex or matches none of ``names``.
    """
    names = list(names)
    _check_patterns(values, names, key=key)
    return {name: next((v for p, v in values.items() if matches(p, name)), default) for name in names}


def _check_patterns(patterns: Iterable[str], names: Sequence[str], *, key: str) -> None:
    problems = []
    kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})  # layers.0.mlp.up_proj -> layers.*.mlp.up_proj
    words = {name.rpartition(".")[2] for name in names}
    for pattern in patterns:
        try:
            found = any(matches(pattern, name) for name in names)
        except re.error as e:
            problems.append(f"{key}: {pattern!r} is not a valid regular expression: {e}")
            continue
        if not found:
            problems.append(
                f"{key}: {pattern!r} matches no linear layer{nearest(pattern, words)}; give the last words of a name "
                f"or a regex for the whole name. There are: {', '.join(kinds) or 'none'}"
            )
    if problems:
        raise UserError(*problems)
