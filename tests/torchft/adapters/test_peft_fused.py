"""Adapters of layers that are one on the Hub: PEFT computes with ours what we do, and we with PEFT's."""

import peft
import pytest
import torch
from families import CASES
from oracles import violations
from peft_oracle import CONFIGS, adapter_parameters, peft_model
from safetensors.torch import load_file
from tiny import tokens, transformers_model

from torchft import models
from torchft.adapters.lora import LoRAConfig, apply_lora, init_adapters
from torchft.adapters.peft import load_peft, peft_config, save_peft

BATCH = tokens(length=9)
CHOICES = {name: CONFIGS[name] for name in ("lora", "rslora", "dora")} | {
    "some parts": LoRAConfig(rank=4, alpha=7.0, targets=["q_proj", "v_proj", "up_proj"]),
    "ranks and alphas": LoRAConfig(rank=4, alpha=7.0, rank_pattern={"k_proj": 2}, alpha_pattern={"up_proj": 3.0}),
    "dora of some parts": LoRAConfig(rank=4, alpha=7.0, dora=True, targets=["q_proj", "gate_proj"]),
}


@pytest.fixture(scope="module", params=["phi3", "glm4_0414"])
def base(request, tmp_path_factory):
    """(folder, transformers' model)"""
    folder = tmp_path_factory.mktemp("base")
    theirs = transformers_model(**CASES[request.param])
    theirs.save_pretrained(folder)
    return folder, theirs


def names_of(model):
    names = model.hub_format.names
    return {"hub_name": names.peft_name, "fused": names.fused}


def read(folder, adapter):
    model = models.load(folder, dtype=torch.float32)
    apply_lora(model, peft_config(model, adapter, **names_of(model)))
    load_peft(model, adapter, **names_of(model))
    return model


@pytest.mark.parametrize("config", CHOICES.values(), ids=CHOICES)
def test_peft_computes_what_we_do(base, tmp_path, config):
    folder, theirs = base
    ours = models.load(folder, dtype=torch.float32)
    apply_lora(ours, config)
    init_adapters(ours)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in adapter_parameters(ours).values():
            p.add_(0.3 * torch.randn(p.shape))
        save_peft(ours, tmp_path / "adapter", base_model_name_or_path="a/b", **names_of(ours))
        peft_own = peft.PeftModel.from_pretrained(transformers_model(**config_of(theirs)), tmp_path / "adapter")
        want = ours(BATCH)
        assert not torch.equal(want, theirs(BATCH).logits)
        assert violations({"logits": (peft_own(BATCH).logits, want)}) == {}
        assert violations({"again": (read(folder, tmp_path / "adapter")(BATCH), want)}) == {}


def config_of(theirs):
    return next(case for case in CASES.values() if case["architectures"] == [type(theirs).__name__])


@pytest.mark.parametrize("name", ["lora", "rslora", "dora"])
def test_we_compute_what_peft_does_and_give_it_back(base, tmp_path, name):
    folder, theirs = base
    fused = ["qkv_proj", "gate_up_proj"] if hasattr(theirs.model.layers[0].self_attn, "qkv_proj") else ["gate_up_proj"]
    config = LoRAConfig(**(vars(CONFIGS[name]) | {"targets": [*fused, "o_proj"]}))
    peft_own = peft_model(theirs, config)
    peft_own.save_pretrained(tmp_path / "adapter")
    ours = read(folder, tmp_path / "adapter")
    with torch.no_grad():
        assert violations({"logits": (ours(BATCH), peft_own(BATCH).logits)}) == {}
    save_peft(ours, tmp_path / "back", base_model_name_or_path="a/b", **names_of(ours))
    got, want = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("back", "adapter"))
    assert got.keys() == want.keys() and all(torch.equal(got[key], want[key]) for key in want)
