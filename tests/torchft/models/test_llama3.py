"""Every Llama generation against transformers in fp32: logits, loss, all gradients; and that the bars see mistakes."""

import pytest
import torch
from oracles import against_transformers, violations
from tiny import LLAMA3_ROPE, checkpoint, edit_config, rope, tokens
from transformers import LlamaForCausalLM

from torchft import models
from torchft.modules import attention
from torchft.modules.attend import attend
from torchft.modules.masks import Visible

GENERATIONS = {
    "llama2_mha": {"num_key_value_heads": 4, "rope_parameters": rope()},
    "llama2_70b_gqa": {"num_attention_heads": 8, "num_key_value_heads": 2, "rope_parameters": rope()},
    "llama3": {"rope_parameters": rope(base=500_000.0)},
    "llama3.1": {"rope_parameters": LLAMA3_ROPE},
    "llama3.2_tied": {"rope_parameters": LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True},
    "llama3.3_mqa": {"num_key_value_heads": 1, "rope_parameters": LLAMA3_ROPE},
    "linear_rope": {"rope_parameters": rope("linear", factor=4.0)},
    "biases": {"rope_parameters": rope(), "attention_bias": True, "mlp_bias": True},
    "wide_heads": {"rope_parameters": rope(), "head_dim": 24},
    "prime_sizes": {"rope_parameters": rope(), "vocab_size": 97, "intermediate_size": 89, "tie_word_embeddings": True},
}


def pair(folder, **changes):
    theirs = checkpoint(folder, **changes)
    return models.load(folder, dtype=torch.float32), theirs


@pytest.mark.parametrize("changes", GENERATIONS.values(), ids=GENERATIONS)
def test_parity(tmp_path, changes):
    ours, theirs = pair(tmp_path, **changes)
    batch = tokens(vocab_size=changes.get("vocab_size", 101))  # 100 tokens: past the 64 of the scaled RoPE
    assert violations(against_transformers(ours, theirs, batch)) == {}


def no_causal_mask(q, k, v, seen, **_):
    return attend(q, k, v, Visible(mask=torch.ones(q.shape[1], q.shape[1], dtype=torch.bool)))


def heads_in_wrong_order(q, k, v, seen, **_):
    groups = q.shape[2] // k.shape[2]
    return attend(q, k.repeat(1, 1, groups, 1), v.repeat(1, 1, groups, 1), seen)


def unscaled_scores(q, k, v, seen, **_):
    return attend(q, k, v, seen, scale=1.0)


def interleaved_rope(x, cos, sin):
    x1, x2 = x[..., ::2], x[..., 1::2]
    return torch.stack((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).flatten(-2)


def swapped_gate(ours):
    for layer in ours.layers:
        layer.mlp.gate_proj, layer.mlp.up_proj = layer.mlp.up_proj, layer.mlp.gate_proj


def swapped_norms(ours):
    for layer in ours.layers:
        layer.attn_norm, layer.mlp_norm = layer.mlp_norm, layer.attn_norm


@pytest.mark.parametrize(
    "config",
    [
        {"rms_norm_eps": 1e-6},
        {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 10_000.0}},
        {"rope_parameters": rope(base=500_000.0)},
        {"rope_parameters": LLAMA3_ROPE | {"factor": 32.0}},
        {"rope_parameters": LLAMA3_ROPE | {"original_max_position_embeddings": 128}},
        {"rope_parameters": LLAMA3_ROPE | {"high_freq_factor": 5.0}},
        {"rope_parameters": rope("linear", 500_000.0, factor=8.0)},
    ],
    ids=["eps", "base", "no_scaling", "factor", "original_length", "ramp", "linear"],
)
def test_bars_see_a_wrong_config(tmp_path, config):
    theirs = checkpoint(tmp_path, rope_parameters=LLAMA3_ROPE)
    edit_config(tmp_path, **config)
    ours = models.load(tmp_path, dtype=torch.float32)
    assert "logits" in violations(against_transformers(ours, theirs, tokens()))


@pytest.mark.parametrize("function", [no_causal_mask, heads_in_wrong_order, unscaled_scores, interleaved_rope])
def test_bars_see_a_wrong_attention(tmp_path, monkeypatch, function):
    ours, theirs = pair(tmp_path, rope_parameters=LLAMA3_ROPE)
    monkeypatch.setattr(attention, "apply_rope" if function is interleaved_rope else "attend", function)
    assert "logits" in violations(against_transformers(ours, theirs, tokens()))


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
    assert "loss" in violations(against_transformers(ours, theirs, tokens()))


def test_bf16_is_as_near_to_exact_as_transformers(tmp_path):
    theirs = checkpoint(tmp_path, rope_parameters=LLAMA3_ROPE)
    batch = tokens()
    exact = theirs.double()(batch).logits
    ours = models.load(tmp_path, dtype=torch.bfloat16)(batch)
    peer = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")(batch).logits
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() <= 1.5 * (peer - exact).norm()
