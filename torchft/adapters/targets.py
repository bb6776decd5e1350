"""Which linear layers an adapter or a quantisation applies to."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from torchft.errors import UserError
from torchft.modules.grouped import StackedLinear
from torchft.names import nearest

ALL_LINEAR = "all-linear"  # every linear layer, those of experts too, but the output head
OUTPUT_HEADS = ("lm_head",)

Number = TypeVar("Number", int, float)
Layer = TypeVar("Layer", bound=nn.Module)


def find_linears(model: nn.Module, targets: str | Sequence[str], *, key: str) -> dict[str, nn.Linear]:
    """The nn.Linear modules by name that ``targets`` (patterns, or "all-linear") match, in the model's order.

    Raises UserError, naming the YAML ``key``, with every pattern that is no regex or matches no linear layer.
    """
    return _find({n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}, targets, key=key)


def find_layers(model: nn.Module, targets: str | Sequence[str], *, key: str) -> dict[str, nn.Linear | StackedLinear]:
    """As ``find_linears``, with the stacked linear layers of experts."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, StackedLinear))}
    return _find(layers, targets, key=key)


def _find(layers: Mapping[str, Layer], targets: str | Sequence[str], *, key: str) -> dict[str, Layer]:
    if targets == ALL_LINEAR:
        return {name: layer for name, layer in layers.items() if name.rpartition(".")[2] not in OUTPUT_HEADS}
    patterns = [targets] if isinstance(targets, str) else targets
    if not patterns:
        raise UserError(f"{key} is empty: name at least one linear layer, or write {ALL_LINEAR}")
    regexes = _compile(patterns, list(layers), key=key)
    return {name: layer for name, layer in layers.items() if any(r.fullmatch(name) for r in regexes)}


def by_pattern(names: Iterable[str], values: Mapping[str, Number], *, default: Number, key: str) -> dict[str, Number]:
    """For each module name the value of the first pattern that matches it, else ``default``.

    Raises UserError, naming the YAML ``key``, with every pattern that is no regex or matches none of ``names``.
    """
    names = list(names)
    choices = list(zip(_compile(values, names, key=key), values.values()))
    return {name: next((value for regex, value in choices if regex.fullmatch(name)), default) for name in names}


def _compile(patterns: Iterable[str], names: Sequence[str], *, key: str) -> list[re.Pattern[str]]:
    """A pattern is the last words of a module's name ("q_proj", "mlp.up_proj") or a regex for all of it."""
    regexes, problems = [], []
    kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})  # layers.0.mlp.up_proj -> layers.*.mlp.up_proj
    words = {name.rpartition(".")[2] for name in names}
    for pattern in patterns:
        try:
            regex = re.compile(rf"(?:.*\.)?{re.escape(pattern)}|(?:{pattern})")
        except re.error as e:
            problems.append(f"{key}: {pattern!r} is not a valid regular expression: {e.msg}")
            continue
        if not any(regex.fullmatch(name) for name in names):
            problems.append(
                f"{key}: {pattern!r} matches no linear layer{nearest(pattern, words)}; give the last words of a name "
                f"or a regex for the whole name. There are: {', '.join(kinds) or 'none'}"
            )
        regexes.append(regex)
    if problems:
        raise UserError(*problems)
    return regexes
