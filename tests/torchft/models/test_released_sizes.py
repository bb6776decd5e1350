"""Every row of CONFIGS against the numbers that its Hub repository publishes."""

import pytest
import torch
import transformers
from released import RELEASED

from torchft import models
from torchft.hub_names import hub_shapes, pieces

ROWS = {name: (family, row) for family, module in models.FAMILIES.items() for name, row in module.CONFIGS.items()}


def test_every_row_is_published():
    assert sorted(repo.split("/")[1] for repo in RELEASED) == sorted(ROWS)


@pytest.mark.parametrize("repo", RELEASED)
def test_row(repo):
    json, num_parameters = RELEASED[repo]
    name = repo.split("/")[1]
    family, row = ROWS[name]
    module = models.FAMILIES[family]
    assert models.architecture(json) is module or module.HUB is models.architecture(json).HUB  # llama2 reads as llama3
    assert module.from_hub(json) == row
    model = models.build(json)  # refuses fields that it does not know
    numel = sum(p.numel() for p in model.parameters())
    assert numel == num_parameters if isinstance(num_parameters, int) else abs(numel / num_parameters - 1) < 0.01
    assert {p.device.type for p in model.parameters()} == {"meta"}
    again = models.build(f"{family}/{name}")
    assert again.config == row
    assert models.build(again.hub_format.config_json).config == row


@pytest.mark.parametrize("repo", RELEASED)
def test_names_and_shapes_are_transformers(repo):
    json = RELEASED[repo][0]
    json = {k: v[:2] if k in ("layer_types", "no_rope_layers") else v for k, v in json.items()}
    two = {"num_hidden_layers": 2, "first_k_dense_replace": 1, "moe_layers": None, "attn_temperature_tuning": True}
    two["num_kv_shared_layers"] = 0
    json |= {k: v for k, v in two.items() if k in json}
    with torch.device("meta"):
        cls = getattr(transformers, json["architectures"][0])
        theirs = cls(cls.config_class.from_dict(json))
    ours = models.build(json)
    names = ours.hub_format.names
    got = hub_shapes(pieces(dict(ours.named_parameters()), names.stacked or names))
    want = {n: list(t.shape) for n, t in theirs.state_dict().items()}
    if theirs.config.tie_word_embeddings:
        del want["lm_head.weight"]
    assert got == want
