"""The memory estimate's arithmetic; what blocks keep is measured in test_block_cost.py."""

import torch

from tests import tiny
from torchft.adapters.lora import LoRAConfig, apply_lora
from torchft.adapters.nf4 import NF4Config, apply_nf4
from torchft.training.memory import estimate_step, stored_bytes

KEPT = {"tokens": 64, "saved": 1000, "recomputed": 0, "largest": 100, "offload": False}


def test_weights_gradients_and_states_are_counted_as_they_are_stored():
    model = tiny.decoder()
    every = sum(p.numel() for p in model.parameters())
    full = estimate_step(model, **KEPT)
    assert (full.weights, full.gradients, full.optimizer) == (4 * every, 4 * every, 8 * every)
    apply_lora(model, LoRAConfig(rank=2))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lora = estimate_step(model, **KEPT)
    assert (lora.weights, lora.gradients, lora.optimizer) == (4 * (every + trained), 4 * trained, 8 * trained)
    assert estimate_step(model, **KEPT, optimizer_bytes=5).optimizer == 5


def test_gradients_come_as_activations_go():
    """The peak of the sizes that a walk through one micro-step meets, block by block."""
    model = tiny.decoder(num_hidden_layers=6)
    every = sum(p.nbytes for p in model.parameters())
    block = sum(p.nbytes for p in model.layers[0].parameters())
    table = model.lm_head.weight.nbytes
    for saved, recomputed in [(10, 0), (10, 7 * every), (block // 2, 0), (block * 2, 50), (3 * every, every)]:
        for gradients in ("new", "added", "freed"):
            sizes = {"tokens": 64, "saved": saved, "recomputed": recomputed, "largest": 100, "gradients": gradients}
            got = estimate_step(model, **sizes)
            here = {"new": 0, "added": every, "freed": 0}[gradients]
            hidden = 64 * model.config.dim * 4
            met = [here + 6 * saved + 64 * model.config.vocab_size * 4 + 3 * hidden + 2 * table]
            here += table if gradients == "new" else 0
            for left in range(6, 0, -1):
                met.append(here + left * saved + block + recomputed + 300)
                here += block if gradients == "new" else 0
            met.append(every if gradients != "freed" else 0)
            most = got.total - got.weights - got.optimizer
            assert max(met) <= most <= max(met) + every - 6 * block, (saved, recomputed, gradients)
            assert got.gradients == (max(block, table) if gradients == "freed" else every)
    few = estimate_step(model, **KEPT, optimizer_bytes=0)
    assert few.total < few.weights + few.gradients + few.activations + few.working


def test_activations_are_those_of_all_blocks_or_of_two_if_the_host_keeps_the_rest():
    model = tiny.decoder(num_hidden_layers=5)
    assert estimate_step(model, **KEPT).activations == 5 * 1000
    for share, blocks in [(1.0, 2), (0.8, 1 + 1.6), (0.4, 3 + 0.8), (0.2, 4 + 0.4)]:
        assert estimate_step(model, **{**KEPT, "offload": share}).activations == blocks * 1000


def test_a_quantised_weight_counts_what_it_is_made_of():
    linear = torch.nn.Sequential(torch.nn.Linear(128, 128, bias=False))
    apply_nf4(linear, NF4Config())
    assert 128 * 128 / 2 < stored_bytes(linear[0].weight) < 0.53 * 128 * 128


def test_lines_end_with_the_total():
    lines = estimate_step(tiny.decoder(), **KEPT).lines()
    assert list(lines)[-1] == "total" and all(size.endswith(" GiB") for size in lines.values())
