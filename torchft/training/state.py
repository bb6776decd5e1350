"""What a checkpoint holds of a model and its optimizer, by parameter name; and the fingerprint of a frozen base."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchft.errors import UserError
from torchft.training.shards import TensorFolder
from torchft.weights import WeightFiles

PIECE = 1024  # values of a tensor that a fingerprint looks at, at its start, middle and end


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes. The frozen rest comes from ``checkpoint_dir``; no checkpoint holds it."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_parameters(saved: TensorFolder, parameters: Mapping[str, Tensor]) -> None:
    """Copies saved tensors into ``parameters``. UserError, before any copy, if a name, shape or dtype differs."""
    problems = []
    for what, names in (
        ("lacks", parameters.keys() - saved.entries.keys()),
        ("holds, unknown to this model,", saved.entries.keys() - parameters.keys()),
    ):
        if names:
            problems.append(f"{saved.folder} {what} {len(names)} parameters: {', '.join(sorted(names)[:10])}")
    for name in sorted(parameters.keys() & saved.entries.keys()):
        want, have = parameters[name], saved
        if tuple(want.shape) != have.shape(name) or want.dtype != have.dtype(name):
            problems.append(
                f"{saved.folder}: {name} is {list(have.shape(name))} {have.dtype(name)}, "
                f"the model's is {list(want.shape)} {want.dtype}"
            )
    if problems:
        raise UserError(*problems[:10], "this checkpoint is of another model: resume with the config it was made with")
    for name, parameter in parameters.items():
        parameter.copy_(saved.read(name))


def optimizer_tree(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """``{"class": name, "state": {parameter name: its state}, "groups": [hyperparameters and parameter names]}``."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # states that live in host memory may still be on their way there
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    groups = [
        {k: v for k, v in group.items() if k != "param_names"} | {"params": [names[p] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    state = {names[p]: dict(state) for p, state in optimizer.state.items()}
    return {"class": type(optimizer).__qualname__, "state": state, "groups": groups}


def load_optimizer(
    tree: Mapping[str, Any], model: nn.Module, optimizer: Optimizer, *, hyperparameters: bool = True
) -> None:
    """Restores an ``optimizer_tree``. ``hyperparameters=False`` keeps the groups' settings (lr ...) as configured now.

    Sets the state directly, because Optimizer.load_state_dict would cast fp32 states of bf16 parameters to bf16.
    Tensors that the optimizer holds from the start, wherever it wants them, are filled in place.
    """
    if tree["class"] != type(optimizer).__qualname__:
        raise UserError(
            f"the checkpoint holds the state of {tree['class']}, which {type(optimizer).__qualname__} can't take over: "
            "resume with the same optimizer, or choose another output_dir to start anew"
        )
    parameters = dict(model.named_parameters())
    names = {p: name for name, p in parameters.items()}
    if [g["params"] for g in tree["groups"]] != [[names[p] for p in g["params"]] for g in optimizer.param_groups]:
        raise UserError("the checkpoint's optimizer had other groups of parameters: resume with the same optimizer")
    for group, saved in zip(optimizer.param_groups, tree["groups"], strict=True):
        for key, value in saved.items() if hyperparameters else ():
            if key == "params":
                continue
            if isinstance(group.get(key), Tensor):  # torchao's optimizers keep lr in a tensor that they have captured
                group[key].copy_(torch.as_tensor(value))
            else:
                group[key] = value
        for name in saved["params"]:
            if name not in tree["state"]:
                continue
            device = parameters[name].device
            step_device = device if group.get("fused") or group.get("capturable") else "cpu"  # torch.optim's own rule
            held = optimizer.state.get(parameters[name], {})
            state = dict(tree["state"][name])
            for key, value in state.items():
                if isinstance(held.get(key), Tensor):
                    state[key] = held[key].copy_(value)
                elif isinstance(value, Tensor):
                    state[key] = value.to(step_device if key == "step" else device)
            optimizer.state[parameters[name]] = state


def base_fingerprint(checkpoint_dir: Path) -> str:
    """Hex digest of a Hub folder's config.json and weights: names, dtypes, shapes, and three pieces of every tensor.

    Any real change of a tensor touches a piece. Same for links, copies and other shards. Load the weights before: that
    checks them.
    """
    digest = hashlib.sha256((checkpoint_dir / "config.json").read_bytes())
    files = WeightFiles(checkpoint_dir)
    for name in sorted(files.names()):
        num_rows, *row_shape = files.shape(name)
        digest.update(f"{name} {files.dtype(name)} {num_rows} {row_shape}\n".encode())
        length = 1 if row_shape else PIECE
        for start in (0, num_rows // 2, max(0, num_rows - length)):
            piece = files.read(name, slice(start, start + length)).flatten()[:PIECE].contiguous()
            digest.update(bytes(piece.view(torch.uint8).tolist()))
    return digest.hexdigest()
