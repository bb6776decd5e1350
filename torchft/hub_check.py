"""Whether a Hub folder holds what a model needs, all of it told before anything is copied."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from torchft.errors import UserError
from torchft.hub_names import HubNames, Piece, hub_shapes
from torchft.weights import WeightFiles


def check_names(files: WeightFiles, plan: Mapping[str, list[Piece]], names: HubNames) -> None:
    """UserError unless the folder holds exactly the tensors that the model needs, in their shapes."""
    want = hub_shapes(piece for parts in plan.values() for piece in parts)
    have = {n for n in files.names() if n in want or not re.search(names.ignored, n)}
    readers = {_layer(n) for n in want if ".q_proj." in n} - {_layer(n) for n in want if ".k_proj." in n}
    have -= {n for n in have - set(want) if re.search(names.unread, n) and _layer(n) in readers}
    have -= predictor_tensors(files, plan, names)
    problems, tied = list[str](), list[str]()
    if "lm_head.weight" in have - set(want):
        problems += (tied := _tied_head(files, "lm_head.weight", want))
        have.remove("lm_head.weight")
    if missing := sorted(set(want) - have):
        problems.append(f"lacks {len(missing)} of {len(want)} tensors: {_some(missing)}")
    if extra := sorted(have - set(want)):
        problems.append(f"holds {len(extra)} tensors that the model has no place for: {_some(extra)}")
    for name in sorted(set(want) & have):
        if (got := files.shape(name)) != tuple(want[name]):
            problems.append(f"{name} has shape {list(got)}, but config.json asks for {want[name]}")
        elif (dtype := files.dtype(name)) not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{name} is stored as {dtype}, which cannot be trained: take the original checkpoint")
    if problems:
        shown = [f"{files.folder}: {p}" for p in problems[:10]]
        if len(problems) > 10:
            shown.append(f"... and {len(problems) - 10} more such tensors")
        if problems != tied:
            shown[-1] += ". config.json and the weights are of different models, or damaged: download the folder again"
        raise UserError(*shown)


def predictor_tensors(files: WeightFiles, ours: Iterable[str], names: HubNames) -> set[str]:
    """Tensors of layers that predict further tokens, behind a model with the parameters ``ours``."""
    if names.predictor is None:
        return set()
    layers = [int(m[1]) for name in ours if (m := re.match(r"layers\.(\d+)\.", name))]
    prefix = names.predictor[0].format(num_layers=max(layers, default=-1) + 1)
    found = {name for name in files.names() if name.startswith(prefix)}
    return found if any(name.startswith(prefix + names.predictor[1]) for name in found) else set()


def _layer(name: str) -> str | None:
    found = re.search(r"layers\.\d+\.", name)
    return found and found[0]


def _tied_head(files: WeightFiles, head: str, want: Mapping[str, Any]) -> list[str]:
    """A tied model's checkpoint may repeat the embedding as lm_head, but not hold another one."""
    embedding = next((n for n in want if n.endswith("embed_tokens.weight")), "")
    if embedding in files and torch.equal(files.read(head), files.read(embedding)):
        return []
    return [f"config.json ties the embeddings, but {head} differs from {embedding}: set tie_word_embeddings to false"]


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f", ... ({len(names) - 10} more)" if len(names) > 10 else "")
