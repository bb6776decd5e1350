"""Which layers a pattern picks, and what the user is told when it picks none."""

import pytest
from families import dense
from tiny import SIZES
from torch import nn

from torchft import models
from torchft.adapters.targets import ALL_LINEAR, by_pattern, find_linears
from torchft.errors import UserError

ATTENTION = ["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"]


def build():
    def block():
        attention = nn.ModuleDict({"q_proj": nn.Linear(2, 2), "v_proj": nn.Linear(2, 2)})
        mlp = nn.ModuleDict({"up_proj": nn.Linear(2, 2), "sup_proj": nn.Linear(2, 2)})
        return nn.ModuleDict({"self_attn": attention, "mlp": mlp, "norm": nn.LayerNorm(2)})

    layers = nn.ModuleList([block() for _ in range(11)])
    return nn.ModuleDict({"embed_tokens": nn.Embedding(3, 2), "layers": layers, "lm_head": nn.Linear(2, 3)})


def picked(targets):
    return list(find_linears(build(), targets, key="lora.targets"))


def test_last_words_match_whole_words_only():
    assert picked(["up_proj"]) == [f"layers.{i}.mlp.up_proj" for i in range(11)]
    assert picked(["layers.1.mlp.up_proj"]) == ["layers.1.mlp.up_proj"]  # not layers.10
    assert picked("up_proj") == picked(["up_proj"])


def test_regex_matches_the_whole_name():
    assert picked(r"layers\.0\.self_attn\..*") == ATTENTION
    assert picked([r"layers\.(0|10)\..*up_proj|lm_head", "layers.0.self_attn.q_proj"]) == [
        "layers.0.self_attn.q_proj",
        "layers.0.mlp.up_proj",
        "layers.0.mlp.sup_proj",
        "layers.10.mlp.up_proj",
        "layers.10.mlp.sup_proj",
        "lm_head",
    ]


def test_all_linear_leaves_the_output_head_out():
    assert picked("all-linear") == [name for name in picked(".*") if name != "lm_head"]
    assert len(picked(".*")) == 45


def test_order_is_the_models():
    assert picked(["v_proj", "q_proj"])[:2] == ATTENTION


@pytest.mark.parametrize("targets", [["up_prj"], ["norm"], "proj", ["q_proj", "self_atn.*"]])
def test_a_pattern_that_matches_nothing_is_named_with_what_there_is(targets):
    with pytest.raises(UserError, match=r"lora\.targets: .* matches no linear layer.*layers\.\*\.self_attn\.q_proj"):
        picked(targets)


def test_all_bad_patterns_are_reported_at_once():
    with pytest.raises(UserError) as e:
        picked(["up_prj", "(", "q_proj"])
    assert len(e.value.problems) == 2
    assert "did you mean 'up_proj'?" in e.value.problems[0]
    assert "'(' is not a valid regular expression" in e.value.problems[1]


def test_no_targets():
    with pytest.raises(UserError, match=r"lora\.targets is empty"):
        picked([])


def test_by_pattern_takes_the_first_match():
    values = by_pattern(ATTENTION, {"v_proj": 3, r"layers\..*": 5}, default=9, key="lora.rank_pattern")
    assert values == dict(zip(ATTENTION, [5, 3]))
    assert by_pattern(ATTENTION, {"q_proj": 2}, default=9, key="k") == dict(zip(ATTENTION, [2, 9]))
    with pytest.raises(UserError, match=r"lora\.rank_pattern: 'up_proj' matches no linear"):
        by_pattern(ATTENTION, {"up_proj": 3}, default=9, key="lora.rank_pattern")


WITHOUT = {  # Gemma 4's layers whose keys are the values, and those that read another layer's
    "gemma4": {"v_proj": 1},
    "gemma4_12b": {"v_proj": 1},
    "gemma4_e2b": {"k_proj": 2, "v_proj": 2},
    "gemma4_e4b": {"k_proj": 1, "v_proj": 1},
}


@pytest.mark.parametrize("case", dense.CASES)
def test_short_names_mean_the_same_in_every_dense_family(case):
    """Also where the Hub has fused them."""
    model = models.build(SIZES | dense.CASES[case])
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    found = {name: list(find_linears(model, [name], key="lora.targets")) for name in names}
    wanted = {name: len(model.layers) - WITHOUT.get(case, {}).get(name, 0) for name in names}
    assert {name: len(linears) for name, linears in found.items()} == wanted
    picked_one_by_one = [name for linears in found.values() for name in linears]
    every = find_linears(model, ALL_LINEAR, key="lora.targets")
    assert sorted(picked_one_by_one) == sorted(name for name in every if "per_layer" not in name)
