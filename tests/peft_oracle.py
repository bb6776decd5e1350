"""PEFT's adapters on a model of transformers, and ours on a copy with the same numbers."""

import copy

import peft
import pytest
import torch

from torchft.adapters.lora import LoRAConfig, apply_lora, lora_layers, merged_tensor
from torchft.hub import base_parameters

CONFIGS = {
    "lora": LoRAConfig(rank=4, alpha=7.0),
    "rslora": LoRAConfig(rank=4, alpha=7.0, rslora=True),
    "dora": LoRAConfig(rank=4, alpha=7.0, dora=True),
    "dora-rslora": LoRAConfig(rank=4, alpha=7.0, dora=True, rslora=True),
    "patterns": LoRAConfig(
        rank=4,
        alpha=7.0,
        targets=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"layers.0.self_attn.q_proj": 6, "down_proj": 3},
        alpha_pattern={"v_proj": 5.0, r".*layers\.1\.mlp\.down_proj": 2.0},
    ),
    "with-head": LoRAConfig(rank=4, alpha=7.0, targets=["o_proj", "lm_head"]),
}


def adapter_parameters(model):
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def merged_state(model, dtype=None):
    """The state that ``model`` had before surgery, with its adapters merged in."""
    return {name: merged_tensor(model, name, dtype) for name in base_parameters(model)}


each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def peft_model(base, config):
    """PEFT's own model for one of our configs, on a copy of ``base``, with random A, B and magnitudes."""
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    theirs = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=targets,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.dora,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
    )
    model = peft.get_peft_model(copy.deepcopy(base), theirs)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model.eval()


def their_parameters(model):
    """PEFT's adapter parameters by our names."""
    renamed = {"lora_A.default.weight": "lora_a", "lora_B.default.weight": "lora_b"}
    renamed["lora_magnitude_vector.default.weight"] = "lora_magnitude"
    found = {}
    for name, parameter in model.named_parameters():
        for theirs, ours in renamed.items():
            if name.endswith(theirs):
                found[name.removeprefix("base_model.model.").removesuffix(theirs) + ours] = parameter
    return found


def our_model(base, config, theirs):
    """Our surgery on a copy of ``base``, with the adapter's numbers of the PEFT model ``theirs``."""
    model = copy.deepcopy(base)
    apply_lora(model, config)
    numbers = their_parameters(theirs)
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            for child, parameter in layer.named_parameters(recurse=False):
                if child.startswith("lora_"):
                    parameter.copy_(numbers.pop(f"{name}.{child}"))
    assert not numbers, "PEFT adapts layers that we do not"
    return model
