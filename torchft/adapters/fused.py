"""The fast path of LoRA: layers that read the same tensor read it once for all their adapters, forward and backward,
and gated MLPs and experts do their adapters' wide work in one kernel (kernels/swiglu.py, kernels/expert_swiglu.py)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchft.adapters.lora import LoRALinear
from torchft.adapters.stacked import StackedLoRA
from torchft.kernels.expert_spread import expert_spread
from torchft.kernels.expert_swiglu import expert_swiglu
from torchft.kernels.narrow_outer import narrow_outer
from torchft.kernels.rows import collect_rows
from torchft.kernels.swiglu import MAX_RANK, lora_swiglu
from torchft.modules.attention import Attention
from torchft.modules.grouped import Routes, pick
from torchft.modules.kept import kept
from torchft.modules.mlp import GatedMLP
from torchft.modules.moe import Experts, swiglu

MAX_NARROW = 4096  # experts x rank: products for all of them at once cost more beyond


class LoRAGatedMLP(GatedMLP):
    """A ``GatedMLP`` with silu and three adapters of one rank, same parameters, same names, same function."""

    def __init__(self, mlp: GatedMLP) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(vars(mlp))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        assert isinstance(gate, LoRALinear) and isinstance(up, LoRALinear) and isinstance(down, LoRALinear)
        if not (gate.enabled and up.enabled and down.enabled):
            return super().forward(x)
        flat = x.reshape(-1, x.shape[-1])  # [t, d]
        inner = (layer.scaling * y for layer, y in zip((gate, up), inners(flat, (gate, up))))  # [t, r] each
        weights = (w.to(x.dtype) for w in (gate.lora_b, up.lora_b, down.lora_a))
        h, down_inner = lora_swiglu(gate.base(flat), up.base(flat), *inner, *weights)  # [t, f], [t, r]
        out = down.base(h) + down.outer(down_inner)
        return out.view(x.shape)


class LoRAAttention(Attention):
    """An ``Attention`` with adapters on two or all of q, k and v, same parameters, same names, same function."""

    def __init__(self, attention: Attention) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(vars(attention))

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        adapted = [layer for layer in layers if isinstance(layer, LoRALinear) and layer.enabled]
        inner = dict(zip(adapted, inners(x, adapted))) if adapted else {}
        q, k, v = (layer.base(x) + layer.outer(inner[layer]) if layer in inner else layer(x) for layer in layers)
        return q, k, v


class LoRAExperts(Experts):
    """``Experts`` with silu, no biases and adapters of one rank on both layers, same parameters, names and function.

    A x comes with the rows that are spread, in one pass. What is added to them is computed for all experts at once,
    [t, e r] by [e r, d]: e / k times the arithmetic, but that of one dense product and of t rows, not of n = t k.
    The inner products, a hundredth of what a block may keep, are kept: backward then repeats neither them nor the
    kernel between the wide products.
    """

    def __init__(self, experts: Experts) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(vars(experts))

    def forward(self, x: Tensor, weights: Tensor, routes: Routes) -> Tensor:
        first, second = self.gate_up_proj, self.down_proj
        assert isinstance(first, StackedLoRA) and isinstance(second, StackedLoRA)
        if routes.experts is None or not (first.enabled and second.enabled):
            return super().forward(x, weights, routes)
        num_tokens, offsets = len(x), routes.offsets
        cells = routes.order // weights.shape[1] * first.num_experts + routes.experts  # [n]: of the t e pairs, a row's
        places = routes.order, routes.place, cells, offsets
        rows, inner = _Spread.apply(x, first.lora_a.to(x.dtype), *places)  # [n, d], [n, r]
        gate_up = first.multiply(rows, first.weight, offsets)  # [n, 2 f]
        scale = pick(weights.reshape(-1, 1), routes.order)  # [n, 1]
        adapters = first.lora_b.to(x.dtype), second.lora_a.to(x.dtype)
        h, inner = expert_swiglu(gate_up, kept(first.scaling * inner), *adapters, scale, offsets)
        rows, inner = second.multiply(h, second.weight, offsets), second.scaling * kept(inner)
        return _Collect.apply(rows, inner, second.lora_b.to(x.dtype).mT, num_tokens, *places)


class _Spread(torch.autograd.Function):
    """x [t, d], a [e, r, d] -> x's rows sorted by expert, [n, d], and a x of their expert, [n, r]."""

    @staticmethod
    def forward(ctx, x, a, order, place, cells, offsets):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, a, place, cells)
        return expert_spread(x, a, order, offsets)

    @staticmethod
    def backward(ctx, d_rows, d_inner):  # type: ignore[no-untyped-def]
        x, a, place, cells = ctx.saved_tensors
        d_inner = _by_token(d_inner, cells, len(x), len(a))  # [t, e r]
        d_x = collect_rows(d_rows, place, len(x)) + d_inner @ a.flatten(0, 1)
        return d_x, (d_inner.mT @ x).view_as(a), None, None, None, None


class _Collect(torch.autograd.Function):
    """Rows [n, d], inner [n, r], b [e, r, d] -> each token's sum of rows + inner b, [t, d]: `_Spread` transposed."""

    @staticmethod
    def forward(ctx, rows, inner, b, num_tokens, order, place, cells, offsets):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inner, b, order, offsets)
        wide = _by_token(inner, cells, num_tokens, len(b))  # [t, e r]
        return collect_rows(rows, place, num_tokens) + wide @ b.flatten(0, 1)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        inner, b, order, offsets = ctx.saved_tensors
        d_rows, d_inner = expert_spread(grad, b, order, offsets)
        return d_rows, d_inner, narrow_outer(d_rows, inner, offsets).mT, None, None, None, None, None


def _by_token(inner: Tensor, cells: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    """[n, r] -> [t, e r], zeros for experts that a token has not chosen."""
    out = inner.new_zeros(num_tokens * num_experts, inner.shape[1]).index_put((cells,), inner)
    return out.view(num_tokens, -1)


def inners(x: Tensor, layers: Sequence[LoRALinear]) -> tuple[Tensor, ...]:
    """A x of each layer, [..., in] -> [..., rank], by one product.

    Backward is one product for all gradients of A, and one for x. For LoRA of 8B in micro-steps of 2048 tokens it gave
    16,048 tokens/s for 15,524 (H200, benchmarks/train_step.py --batch-size 1 --accumulate 8 --recompute none).
    """
    a = torch.cat([layer.lora_a for layer in layers]).to(x.dtype)  # [sum of ranks, in]
    return F.linear(x, a).split([layer.rank for layer in layers], dim=-1)


def fuse_lora(model: nn.Module) -> list[str]:
    """Give all attention, gated MLPs and experts that it can the fast path; returns their names, in the model's order.

    Call it after ``apply_lora``, before compile. It is for plain LoRA without dropout; in MLPs and experts the kernel
    wants silu and adapters on all projections, of one rank up to 64. What it cannot do stays as it is. Parameters and
    their names do not change.
    """
    fast: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if type(module) is GatedMLP and _fits(module):
            fast[name] = LoRAGatedMLP(module)
        elif type(module) is Attention and len(_adapted(module.q_proj, module.k_proj, module.v_proj)) > 1:
            fast[name] = LoRAAttention(module)
        elif type(module) is Experts and _fit(module):
            fast[name] = LoRAExperts(module)
    for name, module in fast.items():
        model.set_submodule(name, module)
    return list(fast)


def _fits(mlp: GatedMLP) -> bool:
    layers = _adapted(mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    ranks = {layer.rank for layer in layers}
    return mlp.act is F.silu and len(layers) == 3 and len(ranks) == 1 and max(ranks) <= MAX_RANK


def _fit(experts: Experts) -> bool:
    first, second = experts.gate_up_proj, experts.down_proj
    if not (isinstance(first, StackedLoRA) and isinstance(second, StackedLoRA) and first.rank == second.rank):
        return False
    is_plain = experts.act is swiglu and not experts.weighs_input
    is_plain &= all(layer.bias is None and not layer.dropout for layer in (first, second))
    return is_plain and first.rank <= MAX_RANK and first.rank * first.num_experts <= MAX_NARROW


def _adapted(*layers: nn.Module) -> list[LoRALinear]:
    """Those with an adapter; none if one of them has dropout or is DoRA."""
    found = [layer for layer in layers if isinstance(layer, LoRALinear)]
    return found if all(layer.lora_magnitude is None and not layer.dropout for layer in found) else []
