"""What a checkpoint holds of a model and its optimizer, by parameter name; and the fingerprint of a frozen base."""

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchft.errors import UserError
from torchft.ranks import is_sharded, local, region, sharded_like
from torchft.training.seed import rng_state
from torchft.training.shards import TensorFolder
from torchft.training.tree import unflatten
from torchft.weights import WeightFiles

PIECE = 1024  # values of a tensor that a fingerprint looks at, at its start, middle and end


def everything(model: nn.Module, optimizer: Optimizer, **others: Mapping[str, Any]) -> dict[str, Any]:
    """All that a checkpoint holds, for `Saver.save`: what is trained, ``others``, and this rank's random state, which
    is its own."""
    held = {"model": trainable(model), "optimizer": optimizer_tree(model, optimizer), "rng": rng_state()}
    return {**held, **others}


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes. The frozen rest comes from ``checkpoint_dir``; no checkpoint holds it."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_parameters(saved: TensorFolder, parameters: Mapping[str, Tensor]) -> None:
    """Copies saved tensors into ``parameters``, of sharded ones this rank's part, whatever ranks had saved them.

    UserError, before any copy, if a name, shape or dtype differs.
    """
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
        local(parameter).copy_(saved.read(name, region(parameter)))


def check_savable(optimizer: Optimizer) -> None:
    """UserError if ``optimizer`` keeps states that several ranks can't save. Call before training, or a save does."""
    sharded = any(is_sharded(p) for group in optimizer.param_groups for p in group["params"])
    if sharded and type(optimizer).__module__.startswith("torchao."):
        raise UserError(
            f"optimizer: {type(optimizer).__qualname__}'s low-bit states cannot be saved by several processes, which "
            "may cut a tensor within a block of them: use torch.optim.AdamW, or "
            "torchft.training.stochastic.AdamWStochastic with state_dtype: bf16",
            is_shared=True,
        )


def optimizer_tree(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """``{"class": name, "state": {parameter name: its state}, "groups": [hyperparameters and parameter names]}``."""
    check_savable(optimizer)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # states that live in host memory may still be on their way there
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    groups = [
        {k: v for k, v in group.items() if k != "param_names"} | {"params": [names[p] for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    state = {names[p]: dict(state) for p, state in optimizer.state.items()}
    return {"class": type(optimizer).__qualname__, "state": state, "groups": groups}


@torch.no_grad()
def load_optimizer(
    saved: TensorFolder, model: nn.Module, optimizer: Optimizer, *, hyperparameters: bool = True
) -> None:
    """Restores a saved ``optimizer_tree``. ``hyperparameters=False`` keeps the groups' settings (lr ...) as they are.

    States that have their parameter's shape are sharded as it is, and of them only this rank's part is read. Sets the
    state directly, because Optimizer.load_state_dict would cast fp32 states of bf16 parameters to bf16. Tensors that
    the optimizer holds from the start, wherever it wants them, are filled in place.
    """
    tree = saved.structure
    if tree["class"] != type(optimizer).__qualname__:
        raise UserError(
            f"the checkpoint holds the state of {tree['class']}, which {type(optimizer).__qualname__} can't take over: "
            "resume with the same optimizer, or choose another output_dir to start anew"
        )
    parameters = dict(model.named_parameters())
    names = {p: name for name, p in parameters.items()}
    groups = unflatten(tree["groups"], saved.read)
    if [g["params"] for g in groups] != [[names[p] for p in g["params"]] for g in optimizer.param_groups]:
        raise UserError("the checkpoint's optimizer had other groups of parameters: resume with the same optimizer")
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        for key, value in settings.items() if hyperparameters else ():
            if key == "params":
                continue
            if isinstance(group.get(key), Tensor):  # torchao's optimizers keep lr in a tensor that they have captured
                group[key].copy_(torch.as_tensor(value))
            else:
                group[key] = value
        for name in settings["params"]:
            if name not in tree["state"]:
                continue
            p = parameters[name]
            step_device = p.device if group.get("fused") or group.get("capturable") else "cpu"  # torch.optim's own rule
            held = optimizer.state.get(p, {})
            state = unflatten(tree["state"][name], partial(_read_state, saved, p))
            for key, value in state.items():
                if isinstance(held.get(key), Tensor):
                    local(held[key]).copy_(local(value))
                    state[key] = held[key]
                elif isinstance(value, Tensor):
                    state[key] = value.to(step_device if key == "step" else p.device)
            optimizer.state[p] = state


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


def _read_state(saved: TensorFolder, p: Tensor, path: str) -> Tensor:
    """One tensor of the state of ``p``."""
    if is_sharded(p) and saved.shape(path) == tuple(p.shape):
        return sharded_like(p, saved.read(path, region(p)).to(p.device))
    return saved.read(path)
