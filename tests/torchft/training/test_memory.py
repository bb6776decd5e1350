"""The memory estimate against bytes that autograd really keeps."""

import torch
import torch.nn.functional as F
from torch import nn

from torchft.training.memory import estimate

DIM, MLP, LAYERS, VOCAB = 64, 160, 3, 500


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.o = nn.Linear(DIM, DIM, bias=False)
        self.gate, self.up = nn.Linear(DIM, MLP, bias=False), nn.Linear(DIM, MLP, bias=False)
        self.down = nn.Linear(MLP, DIM, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(DIM) for _ in range(2))

    def forward(self, x):
        b, s, _ = x.shape
        h = self.norms[0](x)
        q, k, v = (p(h).view(b, s, 4, DIM // 4).transpose(1, 2) for p in self.qkv)
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, s, DIM))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def kept_by_autograd():
    """Bytes that one forward keeps for backward, each storage once, weights left out."""
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block() for _ in range(LAYERS))
    weights = {p.untyped_storage().data_ptr() for p in blocks.parameters()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    x = torch.randn(2, 32, DIM, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        for block in blocks:
            x = block(x)
    return sum(kept.values())


def numbers(**changed):
    given = {
        "weight_bytes": 1000,
        "trainable_bytes": 1000,
        "optimizer_bytes": 2000,
        "tokens": 64,
        "dim": DIM,
        "mlp_dim": MLP,
        "num_layers": LAYERS,
        "vocab": VOCAB,
        "chunk": 16,
        "recompute": False,
        "activation_bytes": 4,
    }
    return estimate(**{**given, **changed})


def test_activations_within_20_percent_of_autograds():
    ratio = numbers().activations / kept_by_autograd()
    assert 0.8 < ratio < 1.2, ratio


def test_closed_forms():
    e = numbers(recompute=True)
    layer = 64 * (10 * DIM + 4 * MLP) * 4
    assert e.activations == LAYERS * 64 * DIM * 4 + layer
    assert e.working == 2 * 16 * VOCAB * 4 and numbers(chunk=None).working == 2 * 64 * VOCAB * 4
    assert e.total == 1000 + 1000 + 2000 + e.activations + e.working


def test_lines_end_with_the_total():
    lines = numbers(weight_bytes=3 << 30).lines()
    assert lines["weights"] == "3.00 GiB" and list(lines)[-1] == "total"
