"""LongRoPE by document, at the border of the old context, against transformers; other kinds are in the parity suite."""

import pytest
import torch
from families import CASES
from oracles import distance
from tiny import SIZES
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from torchft import models
from torchft.modules.rope import rope_cos_sin

OLD = 40  # tokens, as in the suite's Phi 4 mini


def theirs(positions):
    """transformers' cos, [b, s, r / 2]: of a tensor of positions it looks at the largest."""
    case = {k: v for k, v in (SIZES | CASES["phi4_mini"]).items() if k != "architectures"}
    cos, _ = Phi3RotaryEmbedding(Phi3Config(**case))(torch.zeros(1), positions)
    return cos[..., : cos.shape[-1] // 2]


def ours(positions, reach=None):
    config = models.build(SIZES | CASES["phi4_mini"]).config
    return rope_cos_sin(config.rope, positions, config.head_dim, reach)[0][:, :, 0]


@pytest.mark.parametrize("length", [OLD - 1, OLD, OLD + 1])
def test_the_old_context_ends_where_transformers_says(length):
    positions = torch.arange(length)[None]
    assert distance(ours(positions), theirs(positions))[0] < 1e-5
    assert distance(ours(positions, reach=length), theirs(positions))[0] < 1e-5
    other = torch.arange(OLD + 1 if length <= OLD else OLD)[None]
    assert distance(ours(positions)[:, :OLD], theirs(other)[:, :length][:, :OLD])[0] > 0.1


def test_each_packed_document_has_its_own_length():
    lengths = (OLD, 3, OLD + 1, OLD)
    packed = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    alone = torch.cat([theirs(torch.arange(n)[None]) for n in lengths], dim=1).expand(2, -1, -1)
    assert distance(ours(packed), alone)[0] < 1e-5
