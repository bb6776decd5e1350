"""Every row of CONFIGS against the numbers that its Hub repository publishes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from torchft import models

# From each repository's config.json, and the parameter count of its safetensors metadata.
# Hub repository, layers, dim, hidden, heads, kv heads, vocab, context, rope base, rope factor, tied, parameters
PUBLISHED = [
    ("meta-llama/Llama-2-7b-hf", 32, 4096, 11008, 32, 32, 32000, 4096, 1e4, None, False, 6_738_415_616),
    ("meta-llama/Llama-2-13b-hf", 40, 5120, 13824, 40, 40, 32000, 4096, 1e4, None, False, 13_015_864_320),
    ("meta-llama/Llama-2-70b-hf", 80, 8192, 28672, 64, 8, 32000, 4096, 1e4, None, False, 68_976_648_192),
    ("meta-llama/Meta-Llama-3-8B", 32, 4096, 14336, 32, 8, 128256, 8192, 5e5, None, False, 8_030_261_248),
    ("meta-llama/Meta-Llama-3-70B", 80, 8192, 28672, 64, 8, 128256, 8192, 5e5, None, False, 70_553_706_496),
    ("meta-llama/Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128256, 131072, 5e5, 8.0, False, 8_030_261_248),
    ("meta-llama/Llama-3.1-70B", 80, 8192, 28672, 64, 8, 128256, 131072, 5e5, 8.0, False, 70_553_706_496),
    ("meta-llama/Llama-3.1-405B", 126, 16384, 53248, 128, 8, 128256, 131072, 5e5, 8.0, False, 405_853_388_800),
    ("meta-llama/Llama-3.2-1B", 16, 2048, 8192, 32, 8, 128256, 131072, 5e5, 32.0, True, 1_235_814_400),
    ("meta-llama/Llama-3.2-3B", 28, 3072, 8192, 24, 8, 128256, 131072, 5e5, 32.0, True, 3_212_749_824),
    ("meta-llama/Llama-3.3-70B-Instruct", 80, 8192, 28672, 64, 8, 128256, 131072, 5e5, 8.0, False, 70_553_706_496),
]
ROWS = {name: (module, row) for module in models.FAMILIES.values() for name, row in module.CONFIGS.items()}


def published_config(layers, dim, hidden, heads, kv_heads, vocab, context, base, factor, tied):
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": dim,
        "intermediate_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": base,
        "rope_scaling": None if factor is None else {"rope_type": "llama3", "factor": factor, **scaling},
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
    }


def test_every_row_is_published():
    assert {repo.split("/")[1] for repo, *_ in PUBLISHED} == set(ROWS)


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda p: p[0])
def test_row(published):
    repo, *numbers, num_parameters = published
    name = repo.split("/")[1]
    module, row = ROWS[name]
    json = published_config(*numbers)
    assert module.from_hub(json) == row
    assert module.from_hub(module.to_hub(row)) == row

    family = next(f for f, m in models.FAMILIES.items() if m is module)
    model = models.build(f"{family}/{name}")
    assert sum(p.numel() for p in model.parameters()) == num_parameters
    assert {p.device.type for p in model.parameters()} == {"meta"}
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(LlamaConfig.from_dict(json | {"num_hidden_layers": 1}))
    ours = models.build(json | {"num_hidden_layers": 1})
    rename = ours.hub_format.names.rename
    assert {rename(n): p.shape for n, p in ours.named_parameters()} == {
        n: p.shape for n, p in theirs.named_parameters()
    }
