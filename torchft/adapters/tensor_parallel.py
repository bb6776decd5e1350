"""Tensor parallel: each rank holds some heads of every attention and some columns of every MLP.

(https://arxiv.org/abs/1909.08053; the tokens in between are shared out, https://arxiv.org/abs/2205.05198)

    split_blocks(model, world.tp_mesh, world.tokens)
    for layer in model.layers:
        fully_shard(layer, mesh=world.mesh, ...)

Surgery on a finished model: parameters become DTensors that know which part of the whole they are, for loading, saving,
norms and optimizers. A block computes with the plain parts: its forward has nothing to do with DTensor, so adapters,
quantised weights, kernels and compilation work as they are.
"""

import logging
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from torchft.adapters.fused import LoRAAttention, LoRAGatedMLP
from torchft.adapters.lora import LoRALinear
from torchft.adapters.quantised import QuantisedWeight
from torchft.errors import UserError
from torchft.modules.attention import Attention
from torchft.modules.decoder import Decoder
from torchft.modules.delta_net import GatedDeltaNet
from torchft.modules.encoder import Encoder
from torchft.modules.mlp import GatedMLP
from torchft.modules.norms import WholeRMSNorm
from torchft.token_shards import TokenShards

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Split:
    """How a module is split: ``columns`` give a rank its part of the heads, ``rows`` take it and give a summand."""

    columns: tuple[str, ...]  # linear layers or vectors
    rows: tuple[str, ...]  # linear layers
    parts: Callable[[Any], int]  # into how many equal ones it can be split, and every divisor of it


def _heads(attention: Attention) -> int:
    if isinstance(attention.q_norm, WholeRMSNorm):
        return 1
    return math.gcd(attention.o_proj.in_features, attention.k_proj.out_features) // attention.head_dim


_ATTENTION = Split(columns=("q_proj", "k_proj", "v_proj", "sinks"), rows=("o_proj",), parts=_heads)
_MLP = Split(columns=("gate_proj", "up_proj"), rows=("down_proj",), parts=lambda m: m.down_proj.in_features)
SPLITS: dict[type[nn.Module], Split] = {
    Attention: _ATTENTION,
    LoRAAttention: _ATTENTION,
    GatedMLP: _MLP,
    LoRAGatedMLP: _MLP,
}

# Parameters of a linear layer -> the dimension that is cut; of any other one, each rank has all.
COLUMN_CUTS = {"weight": 0, "bias": 0, "lora_b": 0, "lora_magnitude": 0}
ROW_CUTS = {"weight": 1, "lora_a": 1}


class _Decoding:
    """Whether the blocks are decoding: every rank then has all tokens, of which there may be one."""

    is_on = False


def split_blocks(model: Decoder, mesh: DeviceMesh, tokens: TokenShards) -> None:
    """Split the blocks of ``model``, which is on the meta device and has all other surgery behind it, over ``mesh``.

    A mixer whose heads do not divide, or that has no entry in SPLITS, runs whole on all ranks: right, but nothing is
    saved. An MLP then works on each rank's own tokens. With tp 1 there is nothing to split, but with cp ``model`` needs
    to know which tokens it gets. Experts that are split already stay as they are. UserError for encoders, and for what
    cp cannot do.
    """
    if tokens.count > 1 and isinstance(model, Encoder):
        raise UserError(
            "parallel.tp, parallel.cp: they are for decoders, and this model is an encoder; use shard", is_shared=True
        )
    if tokens.cp > 1:
        caps = any(sight.soft_cap for sight in model.sights)
        states = any(isinstance(module, GatedDeltaNet) for module in model.modules())
        if caps or states:
            why = "caps attention scores" if caps else "has layers whose state goes from token to token"
            ways = "which is not done for a part of a row: use shard or tp"
            raise UserError(f"parallel.cp: this model {why}, {ways}", is_shared=True)
    model.shards = tokens if tokens.count > 1 else None
    if tokens.tp == 1:
        return
    whole: list[str] = []
    decoding = _Decoding()
    for i, layer in enumerate(model.layers):
        modules = [m for m in layer.modules() if not any(isinstance(p, DTensor) for p in m._parameters.values())]
        summands: set[nn.Module] = set()
        for name, module in layer.named_children():
            split = SPLITS.get(type(module))
            if split and split.parts(module) % tokens.tp == 0:
                summands |= _split(module, split, mesh)
                module.register_forward_pre_hook(partial(_gather, tokens, decoding))
                module.register_forward_hook(partial(_sum, tokens, decoding))
                continue
            if name != "mlp" and not name.endswith("norm"):
                module.register_forward_pre_hook(partial(_gather, tokens, decoding))
                module.register_forward_hook(partial(_keep_own, tokens, decoding))
            if not name.endswith("norm"):
                whole.append(f"layers.{i}.{name}")
        for module in modules:
            for name in [n for n, p in module._parameters.items() if not isinstance(p, DTensor)]:
                place(module, name, mesh, None)
        layer.register_forward_pre_hook(partial(_note_decoding, decoding))
        layer.register_forward_pre_hook(partial(compute_with_parts, modules, summands))
    if whole:
        log.warning(
            "parallel.tp: %d mixers and MLPs cannot be split over %d ranks and run whole, such as %s",
            len(whole),
            tokens.tp,
            whole[0],
        )


def _split(module: nn.Module, split: Split, mesh: DeviceMesh) -> set[nn.Module]:
    """Cuts the parameters; returns the linear layers whose outputs are summands."""
    for name in split.columns:
        child = getattr(module, name)
        for cut, dim in COLUMN_CUTS.items() if isinstance(child, nn.Module) else ():
            place(child, cut, mesh, dim)
        if isinstance(child, nn.Parameter):
            place(module, name, mesh, 0)
    rows = {module.get_submodule(name) for name in split.rows}
    for child in rows:
        for cut, dim in ROW_CUTS.items():
            place(child, cut, mesh, dim)
        if isinstance(child, LoRALinear):
            child.row_group = mesh.get_group().group_name
    return rows


def place(module: nn.Module, name: str, mesh: DeviceMesh, dim: int | None) -> None:
    """Makes parameter ``name``, if there is one, a DTensor that is cut along ``dim``; None: of which each has all."""
    parameter = module._parameters.get(name)
    if parameter is None:
        return
    assert parameter.is_meta, f"{name} has values: split a model before it is loaded"
    part = parameter.detach()
    if dim is not None:
        shape = [n // mesh.size() if i == dim else n for i, n in enumerate(part.shape)]
        part = part.empty(shape) if isinstance(part, QuantisedWeight) else part.new_empty(shape)
    placed = DTensor.from_local(
        part,
        mesh,
        [Replicate() if dim is None else Shard(dim)],
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    module._parameters[name] = nn.Parameter(placed, requires_grad=parameter.requires_grad)


@torch.compiler.disable
def compute_with_parts(modules: Sequence[nn.Module], summands: Collection[nn.Module], *_: Any) -> None:
    """Puts this rank's plain parts in the place of the DTensors that FSDP has just gathered; FSDP puts its own back.

    A parameter that all ranks have meets other tokens or heads on each, so its gradients are summed over them. Of the
    outputs of ``summands``, which are summed, one has the bias.
    """
    for module in modules:
        for name, parameter in module._parameters.items():
            if isinstance(parameter, DTensor):
                kinds = [Partial() if p.is_replicate() else p for p in parameter.placements]
                part = parameter.to_local(grad_placements=kinds)
                if name == "bias" and module in summands:
                    part = part * (parameter.device_mesh.get_local_rank() == 0)
                module._parameters[name] = part  # no Parameter, for as long as the module runs


def _note_decoding(decoding: _Decoding, layer: nn.Module, args: tuple[Any, ...]) -> None:
    decoding.is_on = len(args) > 4 and args[4] is not None  # a cache


def _gather(tokens: TokenShards, decoding: _Decoding, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x, *others = args
    return args if decoding.is_on else (tokens.of_all_tp(x), *others)


def _sum(tokens: TokenShards, decoding: _Decoding, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    return tokens.sum_all(out) if decoding.is_on else tokens.sum_own(out)


def _keep_own(
    tokens: TokenShards, decoding: _Decoding, module: nn.Module, args: tuple[Any, ...], out: Tensor
) -> Tensor:
    return out if decoding.is_on else out.chunk(tokens.tp, dim=1)[tokens.tp_rank]
