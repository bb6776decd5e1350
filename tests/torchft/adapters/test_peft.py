"""PEFT folders: PEFT reads ours, we read PEFT's, and what is refused."""

import json
import logging

import peft
import pytest
import tiny
import torch
from peft_oracle import CONFIGS, adapter_parameters, each_config, merged_state, peft_model
from safetensors.torch import load_file, save_file

from torchft import models
from torchft.adapters.lora import (
    LoRAConfig,
    apply_lora,
    init_adapters,
)
from torchft.adapters.nf4 import NF4Config, apply_nf4
from torchft.adapters.peft import load_peft, peft_config, save_peft
from torchft.errors import UserError

TOKENS = tiny.tokens(length=9)
BIASED = {"attention_bias": True, "mlp_bias": True, "std": 0.1}


def hub_name(model):
    return model.hub_format.names.rename


def trained(folder, config, seed=3):
    """Our model of a checkpoint with adapters that do something."""
    model = models.load(folder, dtype=torch.float32)
    apply_lora(model, config)
    init_adapters(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def write(model, folder):
    save_peft(model, folder, hub_name=hub_name(model), base_model_name_or_path="someone/some-model")
    return folder


def read(base, folder, **options):
    """Our model of checkpoint ``base`` with the adapters of a PEFT ``folder``."""
    model = models.load(base, dtype=torch.float32)
    apply_lora(model, peft_config(model, folder, hub_name=hub_name(model)))
    load_peft(model, folder, hub_name=hub_name(model), **options)
    return model


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def base(tmp_path):
    tiny.checkpoint(tmp_path / "base", **BIASED)
    return tmp_path / "base"


@pytest.fixture
def adapter(base, tmp_path):
    return write(trained(base, LoRAConfig(rank=4, alpha=7.0, targets=["q_proj", "up_proj"])), tmp_path / "adapter")


@each_config
def test_k28_peft_reads_ours(base, tmp_path, config):
    model = trained(base, config)
    folder = write(model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny.llama(**BIASED), folder)
    adapted = {n for n, m in theirs.base_model.model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert adapted == {hub_name(model)(n.rpartition(".")[0]) for n in adapter_parameters(model)}
    assert (theirs(TOKENS).logits - model(TOKENS)).abs().max() <= 1e-4  # fp32 noise: see test_lora.py
    assert (theirs(TOKENS).logits - tiny.llama(**BIASED)(TOKENS).logits).abs().max() > 0.1


@each_config
def test_k28_we_read_pefts(base, tmp_path, config):
    if config is CONFIGS["patterns"]:  # PEFT keeps the regex as it is; ours is refused, see below
        config = LoRAConfig(rank=4, alpha=7.0, rank_pattern={"q_proj": 6}, alpha_pattern={"v_proj": 5.0})
    theirs = peft_model(tiny.llama(**BIASED), config)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ours = read(base, tmp_path / "adapter")
    assert (theirs(TOKENS).logits - ours(TOKENS)).abs().max() <= 1e-4  # fp32 noise: see test_lora.py


@each_config
def test_round_trip_is_exact(base, tmp_path, config):
    model = trained(base, config)
    again = read(base, write(model, tmp_path / "adapter"))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(again(TOKENS), model(TOKENS))


def test_the_files_are_what_peft_and_vllm_read(adapter):
    assert sorted(p.name for p in adapter.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((adapter / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "someone/some-model",
        "r": 4,
        "lora_alpha": 7,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"].shape == (4, 64)
    assert tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"].shape == (96, 4)
    assert len(tensors) == 8


def test_some_layers_only_are_named_in_full(base, tmp_path):
    """Short names would make PEFT adapt every layer."""
    model = trained(
        base, LoRAConfig(rank=4, targets=[r"layers\.1\..*q_proj", "v_proj"], rank_pattern={r".*\.0\..*": 2})
    )
    config = json.loads((write(model, tmp_path / "adapter") / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj", "v_proj"]
    assert config["rank_pattern"] == {"model.layers.0.self_attn.v_proj": 2}


@pytest.mark.parametrize("kind", ["lora", "dora", "patterns"])
def test_says_what_vllm_cannot_serve(base, tmp_path, caplog, kind):
    with caplog.at_level(logging.WARNING):
        write(trained(base, CONFIGS[kind]), tmp_path / "adapter")
    assert ("vLLM cannot serve" in caplog.text) == (kind != "lora")


def test_k18_base_of_another_size(tmp_path, adapter):
    tiny.checkpoint(tmp_path / "wider", **BIASED, intermediate_size=128)
    with pytest.raises(
        UserError, match=r"up_proj\.lora_B\.weight has shape \[96, 4\], but this model needs \[128, 4\]"
    ):
        read(tmp_path / "wider", adapter)
    tiny.checkpoint(tmp_path / "shallower", **BIASED, num_hidden_layers=1)
    with pytest.raises(UserError, match=r"2 layers that this model has not, such as \['model\.layers\.1.*another base"):
        read(tmp_path / "shallower", adapter)


def test_k18_base_of_the_same_size_with_other_weights(tmp_path, adapter):
    tiny.checkpoint(tmp_path / "other", **BIASED | {"std": 0.11})
    with pytest.raises(UserError, match="trained on another base than this model: its embedding and norms"):
        read(tmp_path / "other", adapter)
    read(tmp_path / "other", adapter, check_base=False)


def test_k27_an_adapter_is_not_merged_twice(base, tmp_path, adapter):
    merged = models.load(base, dtype=torch.float32)
    merged.load_state_dict(merged_state(read(base, adapter)))
    apply_lora(merged, peft_config(merged, adapter, hub_name=hub_name(merged)))
    with pytest.raises(UserError, match="merged into them already"):
        load_peft(merged, adapter, hub_name=hub_name(merged))


def test_k27_an_interrupted_write_leaves_the_old_adapter(base, adapter, monkeypatch):
    before = {p.name: p.read_bytes() for p in adapter.iterdir()}

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("torchft.adapters.peft.json.dumps", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(trained(base, CONFIGS["lora"]), adapter)
    assert {p.name: p.read_bytes() for p in adapter.iterdir()} == before
    assert sorted(p.name for p in adapter.parent.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_may_be_loaded_in_another_dtype_or_quantised(tmp_path, dtype):
    sizes = {"hidden_size": 256, "intermediate_size": 320, "num_key_value_heads": 1}
    tiny.checkpoint(tmp_path / "base", dtype=torch.bfloat16, **sizes)
    config = LoRAConfig(rank=4, targets=["q_proj"])
    folder = write(trained(tmp_path / "base", config), tmp_path / "adapter")
    model = models.load(tmp_path / "base", dtype=dtype)
    apply_nf4(model, NF4Config(targets=["q_proj"]))
    apply_lora(model, config)
    load_peft(model, folder, hub_name=hub_name(model))
    write(model, tmp_path / "from-nf4")
    read(tmp_path / "base", tmp_path / "from-nf4")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [5]),
        ("bias", "lora_only"),
        ("fan_in_fan_out", True),
        ("lora_bias", True),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", "experts.up_proj"),
        ("layers_to_transform", [0]),
        ("init_lora_weights", "pissa"),
        ("something_new", 3),
        ("r", 0),
        ("r", True),
        ("r", "8"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", None),
        ("lora_dropout", 1.5),
        ("alpha_pattern", {"(a+)+b": 3}),  # a regex from a file that others wrote
        ("alpha_pattern", {"q_proj": "3"}),
        ("alpha_pattern", ["q_proj"]),
        ("use_dora", "yes"),
    ],
)
def test_unsupported_settings_are_named(base, adapter, field, value):
    edit(adapter, **{field: value})
    with pytest.raises(UserError, match=f"adapter_config.json: {field} (is|has) "):
        read(base, adapter)


def test_all_problems_of_a_config_at_once(base, adapter):
    edit(adapter, peft_type="OFT", bias="all", r=-1)
    with pytest.raises(UserError) as e:
        read(base, adapter)
    assert len(e.value.problems) == 3


def test_k13_missing_and_unexpected_tensors(base, adapter):
    edit_tensors(adapter, lambda t: t.pop("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"))
    with pytest.raises(UserError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj\.lora_B"):
        read(base, adapter)
    edit_tensors(adapter, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}))
    with pytest.raises(UserError, match=r"no LoRA of a linear layer, such as \['base_model\.model\.lm_head\.weight'\]"):
        read(base, adapter)


def test_k14_rank_of_the_config_differs(base, adapter):
    model = models.load(base, dtype=torch.float32)
    apply_lora(model, LoRAConfig(rank=8, alpha=7.0, targets=["q_proj", "up_proj"]))
    with pytest.raises(UserError, match=r"has shape \[4, 64\], but this model needs \[8, 64\]: the rank"):
        load_peft(model, adapter, hub_name=hub_name(model))


def test_alpha_of_the_config_differs(base, adapter):
    model = models.load(base, dtype=torch.float32)
    apply_lora(model, LoRAConfig(rank=4, alpha=8.0, targets=["q_proj", "up_proj"]))
    init_adapters(model)
    with pytest.raises(UserError, match=r"q_proj has alpha 7, rslora False; the config says 8\.0, False"):
        load_peft(model, adapter, hub_name=hub_name(model))
    assert not model.layers[0].self_attn.q_proj.lora_b.any()  # nothing was copied


def test_k16_nan(base, adapter):
    edit_tensors(
        adapter, lambda t: t["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][0, 0].fill_(torch.nan)
    )
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.lora_B\.weight holds NaN"):
        read(base, adapter)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[: len(b) // 2], lambda b: b""])
def test_k9_truncated_file(base, adapter, damage):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is not a readable safetensors file"):
        read(base, adapter)


def test_k10_git_lfs_pointer(base, adapter):
    (adapter / "adapter_model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="a Git LFS pointer"):
        read(base, adapter)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_k12_missing_file(base, adapter, name):
    (adapter / name).unlink()
    with pytest.raises(UserError, match=name):
        read(base, adapter)
