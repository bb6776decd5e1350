"""State as a tree of dicts, lists, numbers, strings and tensors -> JSON that points at named tensors, and back.

Anything else is refused rather than pickled. Tensor subclasses are taken apart only if SUBCLASSES names them.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchft.errors import UserError
from torchft.ranks import is_sharded, local

SUBCLASSES = (  # states of torchao's low-bit optimizers
    "torchao.optim.subclass_4bit.OptimState4bit",
    "torchao.optim.subclass_8bit.OptimState8bit",
    "torchao.optim.subclass_fp8.OptimStateFp8",
)


def flatten(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """The tree as JSON values, and its tensors, not copied, by path: ``{"a": {"b": t}}`` has the tensor ``a/b``.

    Sharded tensors stay so, and the rest is the same on all ranks. In the JSON a tensor is ``{"$tensor": path}``;
    tuples, dtypes, subclasses, dicts with odd keys are marked likewise.
    """
    tensors: dict[str, Tensor] = {}

    def encode(value: Any, path: str) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) in (Tensor, nn.Parameter) or (is_sharded(value) and type(local(value.detach())) is Tensor):
            assert path not in tensors, f"two tensors would be saved as {path!r}"
            tensors[path] = value.detach()
            return {"$tensor": path}
        if isinstance(value, torch.dtype):
            return {"$dtype": str(value).removeprefix("torch.")}
        if isinstance(value, list):
            return [encode(v, f"{path}/{i}") for i, v in enumerate(value)]
        if isinstance(value, tuple):
            return {"$tuple": encode(list(value), path)}
        if isinstance(value, dict):
            if all(isinstance(k, str) and not k.startswith("$") for k in value):
                return {k: encode(v, f"{path}/{k}" if path else k) for k, v in value.items()}
            return {"$dict": [[encode(k, path), encode(v, f"{path}/{k}")] for k, v in value.items()]}
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        if name in SUBCLASSES:
            parts, context = value.__tensor_flatten__()
            inner = {part: encode(getattr(value, part), f"{path}/{part}") for part in parts}
            return {"$subclass": name, "tensors": inner, "context": encode(context, path)}
        raise UserError(
            f"{path or 'the state'} holds a {name}, which a checkpoint can't: only numbers, strings, tensors"
        )

    return encode(tree, ""), tensors


def unflatten(value: Any, read: Callable[[str], Tensor]) -> Any:
    """The inverse of ``flatten``; ``read(path)`` gives a tensor."""
    if isinstance(value, list):
        return [unflatten(v, read) for v in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$tensor": path}:
            return read(path)
        case {"$dtype": name}:
            return getattr(torch, name)
        case {"$tuple": items}:
            return tuple(unflatten(items, read))
        case {"$dict": items}:
            return {unflatten(k, read): unflatten(v, read) for k, v in items}
        case {"$subclass": name, "tensors": inner, "context": context}:
            if name not in SUBCLASSES:
                raise UserError(f"the checkpoint asks for the tensor class {name}, which is none of {SUBCLASSES}")
            module, _, attribute = name.rpartition(".")
            cls = getattr(importlib.import_module(module), attribute)
            parts = {part: unflatten(v, read) for part, v in inner.items()}
            return cls.__tensor_unflatten__(parts, unflatten(context, read), None, None)
    return {k: unflatten(v, read) for k, v in value.items()}
