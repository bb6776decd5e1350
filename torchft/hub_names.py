"""Names and shapes of Hub checkpoints. Each family declares how its Hub names differ from ours.

A few rules cover every family: a renamed name, several of our tensors fused into one Hub tensor (Phi 3, GLM 4), and a
stacked weight of ours that is stored as tensors of one expert each (Mixtral, Qwen 3 MoE, DeepSeek), or transposed
(Llama 4, gpt-oss).
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

STACKED = {r"(\.experts\.\w+)\.weight$": r"\1"}  # transformers 5: stacked weights are no modules


@dataclass(frozen=True)
class HubNames:
    """How one family's Hub names differ from ours (which are Llama's, except for the norms)."""

    renamed: dict[str, str] = field(default_factory=dict)  # regex on our name -> replacement
    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)  # Hub module -> our modules, in order, along dim 0
    per_expert: str | None = None  # regex whose match in the Hub's name becomes "<match>.<expert>"
    split: dict[str, tuple[str, ...]] = field(default_factory=dict)  # our stacked module -> equal parts of its rows
    transposed: str | None = None  # regex on our names of stacked weights that the Hub holds as [e, in, out]
    keeps_dtype: str | None = None  # regex on our names of parameters that are stored as they are, whatever the rest
    ignored: str = r"\.rotary_emb\.inv_freq$"  # regex of Hub tensors to leave out
    unread: str = r"(?!)"  # regex of Hub tensors to leave out of layers that read another's keys and values
    # Layers that predict further tokens, for faster decoding, are left out: how the names of their tensors begin, at
    # the first layer behind the last one where "{num_layers}" stands; how one of them goes on; and the fields of
    # config.json that count them.
    predictor: tuple[str, str] | None = None
    predictors: tuple[str, ...] = ()
    fresh: str | None = None  # regex on our names of parameters that a checkpoint need not hold yet: a new head
    headed: dict[str, str] = field(default_factory=dict)  # regex on the Hub's name -> what a model with a new head has
    peft_swaps: bool = False  # PEFT takes the inputs of a ``transposed`` weight for its outputs
    also: dict[str, str] = field(
        default_factory=dict
    )  # regex on the Hub's name -> what it is in some folders, read too
    stacked: "HubNames | None" = None  # transformers 5's own layout of the same model, which files may have instead

    def ignoring(self, pattern: str) -> "HubNames":
        """These names, in both layouts, with Hub tensors of ``pattern`` left out besides."""
        stacked = self.stacked and self.stacked.ignoring(pattern)
        return replace(self, ignored=rf"{self.ignored}|{pattern}", stacked=stacked)

    def rename(self, name: str) -> str:
        """Our module or parameter name -> the Hub's."""
        for pattern, new in self.renamed.items():
            name = re.sub(pattern, new, name)
        return name

    def peft_name(self, module: str) -> str:
        """Our module's name -> that of transformers 5's module, which PEFT wraps."""
        return (self.stacked or self).rename(module)


@dataclass(frozen=True)
class Piece:
    """A part of our parameter ``name``, the matrix of an ``expert`` or all of it, and where the Hub has it.

    ``rows`` of that part's dim 0 are ``hub_rows`` of the Hub tensor ``hub``; None: all of them are all of it.
    """

    name: str
    hub: str
    shape: tuple[int, ...]  # of the part, as we have it
    expert: int | None = None
    rows: slice | None = None
    hub_rows: slice | None = None
    transposed: bool = False  # the last two dimensions


def pieces(params: Mapping[str, Tensor], names: HubNames) -> Iterator[Piece]:
    """Where each of our parameters lies in the Hub's tensors."""
    for name, param in params.items():
        shape, hub, hub_rows = tuple(param.shape), name, None
        module, _, child = name.rpartition(".")
        module, _, word = module.rpartition(".")
        for fused, parts in names.fused.items():
            if word in parts:
                sizes = [params[f"{module}.{p}.{child}"].shape[0] for p in parts]
                start = sum(sizes[: parts.index(word)])
                hub, hub_rows = f"{module}.{fused}.{child}", slice(start, start + shape[0])
        if names.per_expert is None or not re.search(names.per_expert, names.rename(hub)):
            transposed = bool(names.transposed and re.search(names.transposed, name))
            yield Piece(name, names.rename(hub), shape, hub_rows=hub_rows, transposed=transposed)
            continue
        halves = [name.replace(f".{word}.", f".{part}.") for part in names.split.get(word, (word,))]
        step = shape[1] // len(halves)
        for expert in range(shape[0]):
            for i, part in enumerate(halves):
                hub = re.sub(names.per_expert, rf"\g<0>.{expert}", names.rename(part), count=1)
                rows = slice(i * step, (i + 1) * step)
                yield Piece(name, hub, (step, *shape[2:]), expert, rows if len(halves) > 1 else None)


def hub_shapes(parts: Iterable[Piece]) -> dict[str, list[int]]:
    """The shapes of the Hub's tensors that hold ``parts``, by name."""
    shapes: dict[str, list[int]] = {}
    for piece in parts:
        shape = list(piece.shape)
        if piece.transposed:
            shape[-2], shape[-1] = shape[-1], shape[-2]
        if piece.hub in shapes:
            shapes[piece.hub][0] += shape[0]  # fused along dim 0
        else:
            shapes[piece.hub] = shape
    return shapes
