"""The parity suite's bars see mistakes of structure; and bf16 is as near to exact as transformers'."""

import pytest
import torch
from oracles import against_transformers, violations
from tiny import LLAMA3_ROPE, checkpoint, tokens
from transformers import LlamaForCausalLM

from torchft import models
from torchft.modules import attention
from torchft.modules.attend import attend
from torchft.modules.masks import Visible


def pair(folder, **changes):
    theirs = checkpoint(folder, **changes)
    return models.load(folder, dtype=torch.float32), theirs


def no_causal_mask(q, k, v, seen, **_):
    return attend(q, k, v, Visible(mask=torch.ones(q.shape[1], q.shape[1], dtype=torch.bool)))


def heads_in_wrong_order(q, k, v, seen, **_):
    groups = q.shape[2] // k.shape[2]
    return attend(q, k.repeat(1, 1, groups, 1), v.repeat(1, 1, groups, 1), seen)


def unscaled_scores(q, k, v, seen, **_):
    return attend(q, k, v, seen, scale=1.0)


def interleaved_rope(x, cos, sin, **_):
    x1, x2 = x[..., ::2], x[..., 1::2]
    return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2)


def swapped_gate(ours):
    for layer in ours.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj


def swapped_norms(ours):
    for layer in ours.layers:
        layer.attn_norm, layer.mlp_norm = layer.mlp_norm, layer.attn_norm


@pytest.mark.parametrize("function", [no_causal_mask, heads_in_wrong_order, unscaled_scores, interleaved_rope])
def test_bars_see_a_wrong_attention(tmp_path, monkeypatch, function):
    ours, theirs = pair(tmp_path, rope_parameters=LLAMA3_ROPE)
    monkeypatch.setattr(attention, "apply_rope" if function is interleaved_rope else "attend", function)
    assert "logits" in violations({"logits": (ours(tokens()), theirs(tokens()).logits)})


@pytest.mark.parametrize("mistake", [swapped_gate, swapped_norms])
def test_bars_see_wrong_wiring(tmp_path, mistake):
    ours, theirs = pair(tmp_path, rope_parameters=LLAMA3_ROPE)
    batch = tokens()
    assert violations({"logits": (ours(batch), theirs(batch).logits)}) == {}
    mistake(ours)
    assert "logits" in violations({"logits": (ours(batch), theirs(batch).logits)})


def test_bars_see_unshifted_labels(tmp_path, monkeypatch):
    ours, theirs = pair(tmp_path, rope_parameters=LLAMA3_ROPE)
    monkeypatch.setattr("oracles.shifted", lambda labels: labels)
    assert "loss" in violations(against_transformers(ours, theirs, tokens(), tmp_path / "gradients"))


def test_bf16_is_as_near_to_exact_as_transformers(tmp_path):
    theirs = checkpoint(tmp_path, rope_parameters=LLAMA3_ROPE)
    batch = tokens()
    exact = theirs.double()(batch).logits
    ours = models.load(tmp_path, dtype=torch.bfloat16)(batch)
    peer = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")(batch).logits
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() <= 1.5 * (peer - exact).norm()
