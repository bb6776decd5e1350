"""The fast path of LoRA through a gated MLP: the three adapters' wide work in one kernel (kernels/swiglu.py)."""

import torch.nn.functional as F
from torch import Tensor, nn

from torchft.adapters.lora import LoRALinear
from torchft.kernels.swiglu import MAX_RANK, lora_swiglu
from torchft.modules.mlp import GatedMLP


class LoRAGatedMLP(GatedMLP):
    """A ``GatedMLP`` with silu and three adapters of one rank, same parameters, same names, same function."""

    def __init__(self, mlp: GatedMLP) -> None:
        nn.Module.__init__(self)
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act = mlp.act

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        assert isinstance(gate, LoRALinear) and isinstance(up, LoRALinear) and isinstance(down, LoRALinear)
        if not (gate.enabled and up.enabled and down.enabled):
            return super().forward(x)
        flat = x.reshape(-1, x.shape[-1])  # [t, d]
        inner = (gate.scaling * gate.inner(flat), up.scaling * up.inner(flat))  # [t, r] each
        weights = (w.to(x.dtype) for w in (gate.lora_b, up.lora_b, down.lora_a))
        h, down_inner = lora_swiglu(gate.base(flat), up.base(flat), *inner, *weights)  # [t, f], [t, r]
        out = down.base(h) + down.scaling * F.linear(down_inner, down.lora_b.to(x.dtype))
        return out.view(x.shape)


def fuse_lora(model: nn.Module) -> list[str]:
    """Give every gated MLP that the kernel can compute the fast path; returns their names, in the model's order.

    Call it after ``apply_lora``, before compile. The kernel knows silu, plain LoRA without dropout on all three
    projections, one rank up to 64; other MLPs stay as they are. Parameters and their names do not change.
    """
    names = [name for name, module in model.named_modules() if type(module) is GatedMLP and _fits(module)]
    for name in names:
        mlp = model.get_submodule(name)
        assert isinstance(mlp, GatedMLP)
        model.set_submodule(name, LoRAGatedMLP(mlp))
    return names


def _fits(mlp: GatedMLP) -> bool:
    layers = [x for x in (mlp.gate_proj, mlp.up_proj, mlp.down_proj) if isinstance(x, LoRALinear)]
    plain = all(layer.lora_magnitude is None and not layer.dropout for layer in layers)
    ranks = {layer.rank for layer in layers}
    return mlp.act is F.silu and len(layers) == 3 and plain and len(ranks) == 1 and max(ranks) <= MAX_RANK
