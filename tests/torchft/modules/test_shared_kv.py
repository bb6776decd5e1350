"""Gemma 4 E2B's blocks, recomputed, compiled and sharded; the weights that released files have for nothing."""

import json

import pytest
import torch
from families import CASES
from oracles import gradients, mean_nll, shifted, supervised
from processes import run_ranks
from safetensors.torch import load_file, save_file
from tiny import edit_config, tokens, transformers_model
from torch.distributed.fsdp import fully_shard

from torchft import hub, models, ranks
from torchft.errors import UserError
from torchft.modules.decoder import init_weights
from torchft.modules.shared_kv import SharedKVAttention
from torchft.training.compile import compile_blocks
from torchft.training.distributed import SUM_IN_FP32, ParallelConfig, init


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("e2b")
    transformers_model(**(CASES["gemma4_e2b"] | {"rms_norm_eps": 1e-3}), std=0.1).save_pretrained(folder)
    return folder


def loss(model, batch):
    return mean_nll(model.train(), batch, shifted(supervised(batch)))


def test_readers_have_no_keys_of_their_own(folder):
    model = models.load(folder)
    readers = [layer.self_attn.reads for layer in model.layers]
    assert readers == [False, False, True, True] and model.sources == [0, 1, 0, 1]
    assert all(
        ("k_proj" in dict(layer.self_attn.named_children())) != reads for layer, reads in zip(model.layers, readers)
    )
    assert all(isinstance(layer.self_attn, SharedKVAttention) for layer in model.layers)


@pytest.mark.parametrize("change", ["recompute", "compile"])
def test_gradients_stay(folder, change):
    """Those of the layer whose keys are read, too."""
    model, batch = models.load(folder, dtype=torch.float32), tokens()
    want = gradients(model, loss(model, batch))
    if change == "recompute":
        model.recompute = 1.0
    else:
        compile_blocks(model, backend="aot_eager")
    got = gradients(model, loss(model, batch))
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6)


def sharded_gradients(folder):
    with init(ParallelConfig(), device="cpu") as world:
        model = models.build(models.config_json(folder))
        for layer in model.layers:
            fully_shard(layer, mesh=world.mesh, mp_policy=SUM_IN_FP32)
        fully_shard(model, mesh=world.mesh, mp_policy=SUM_IN_FP32)
        model.to_empty(device="cpu")
        hub.load_weights(model, folder)
        model.recompute = 0.5
        loss(model, tokens()).backward()
        return {name: ranks.whole(p.grad) for name, p in model.named_parameters() if p.requires_grad}


def test_gradients_of_shards(folder):
    model = models.load(folder, dtype=torch.float32)
    want = gradients(model, loss(model, tokens()))
    for got in run_ranks(sharded_gradients, 2, folder):
        assert got.keys() == want.keys()
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-6)


def test_a_model_from_scratch_tells_tokens_apart(folder):
    """A block's factor of 0 would let nothing through."""
    model = models.build(models.config_json(folder), device="cpu")
    init_weights(model)
    assert all(grad.any() for name, grad in gradients(model, loss(model, tokens())).items() if "_proj" in name)


def test_keys_learn_from_the_layers_that_read_them(folder):
    """With readers that do not answer, the gradient of what they read is another."""
    model, batch = models.load(folder, dtype=torch.float32), tokens()
    name = "layers.1.self_attn.k_proj.weight"
    want = gradients(model, loss(model, batch))[name]
    with torch.no_grad():
        model.layers[3].self_attn.o_proj.weight.zero_()
    assert (gradients(model, loss(model, batch))[name] - want).norm() > 0.1 * want.norm()


def test_weights_that_nobody_reads_are_left_out(folder, tmp_path):
    """Released files hold keys and values of the layers that read another's; and no other surplus is let in."""
    weights = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    surplus = {f"model.layers.3.self_attn.{name}.weight": torch.zeros(2, 2) for name in ("k_proj", "v_proj", "k_norm")}
    save_file(weights | surplus, tmp_path / "model.safetensors")
    want, got = models.load(folder), models.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(want.parameters(), got.parameters(), strict=True))
    save_file(weights | {"model.layers.3.self_attn.z_proj.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="z_proj"):
        models.load(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["layer_types"][1] == "full_attention"  # whose values are keys, says the next line
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_k_eq_v": True}))
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"no place for: model\.layers\.1\.self_attn\.v_proj"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lacks 1 of .*layers\.1\.self_attn\.k_proj"):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers is 4, but before these layers there must be one"),
        ({"num_kv_shared_layers": 3}, "num_kv_shared_layers is 3, but before these layers there must be one"),
        ({"num_kv_shared_layers": "2"}, "num_kv_shared_layers is '2'"),
        ({"vocab_size_per_layer_input": 90}, r"vocab_size_per_layer_input is 90, not vocab_size \(101\)"),
        ({"enable_moe_block": True}, "enable_moe_block is True"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(folder, tmp_path, changes, why):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    edit_config(tmp_path, **changes)
    with pytest.raises(UserError, match=why):
        models.sizes(tmp_path)
