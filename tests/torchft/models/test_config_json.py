"""config.json as data: both spellings of RoPE, defaults, and one clear error for each thing that can be wrong."""

from dataclasses import replace

import pytest
import torch
from released import RELEASED
from tiny import LLAMA3_ROPE, SIZES, edit_config, llama, rope, tokens
from transformers import LlamaConfig

from torchft import models
from torchft.errors import UserError
from torchft.models import ARCHITECTURES, FAMILIES, REFUSED, llama3
from torchft.models.multimodal import TEXT_MODELS
from torchft.modules.rope import LinearRope, Llama3Rope, Rope

GOOD = {k: v for k, v in SIZES.items() if k != "eos_token_id"} | {"architectures": ["LlamaForCausalLM"]}
SCALING = {k: v for k, v in LLAMA3_ROPE.items() if k not in ("rope_theta", "rope_type")}
SCALED = Llama3Rope(base=500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=64)


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ({}, Rope(base=10_000.0)),
        ({"rope_theta": 500_000}, Rope(base=500_000.0)),
        ({"rope_theta": 500_000.0, "rope_scaling": None}, Rope(base=500_000.0)),
        ({"rope_parameters": rope(base=500_000.0)}, Rope(base=500_000.0)),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}}, Rope(base=500_000.0)),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, LinearRope(base=10_000.0, factor=4.0)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4}}, LinearRope(base=10_000.0, factor=4.0)),
        ({"rope_parameters": rope("linear", factor=4.0)}, LinearRope(base=10_000.0, factor=4.0)),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}}, SCALED),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}}, SCALED),
        ({"rope_theta": 5e5, "rope_parameters": {"rope_type": "llama3", **SCALING}}, SCALED),
        ({"rope_parameters": LLAMA3_ROPE}, SCALED),
        ({"rope_parameters": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, replace(SCALED, high_freq_factor=1.0)),
    ],
)
def test_rope_spellings_of_transformers_4_and_5(spelling, expected):
    assert llama3.from_hub(GOOD | spelling).rope == expected
    theirs = llama(
        **{
            k: v
            for k, v in LlamaConfig.from_dict(GOOD | spelling).to_dict().items()
            if k in (*SIZES, "rope_parameters")
        }
    )
    torch.testing.assert_close(expected.frequencies(16, torch.device("cpu")), theirs.model.rotary_emb.inv_freq)


def test_absent_fields_mean_what_they_mean_to_transformers():
    few = {k: v for k, v in GOOD.items() if k not in ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings")}
    ours, theirs = llama3.from_hub(few), LlamaConfig.from_dict(few)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.max_seq_len == theirs.max_position_embeddings
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.head_dim == theirs.head_dim


LLAMA3_TYPE = {"rope_type": "llama3"}
BAD = {
    "unknown_architecture": (
        {"architectures": ["LlamaForCausalML"]},
        r"does not train; the nearest is LlamaForCausalLM. It trains BertModel, Cohere2ForCausalLM, ",
    ),
    "one_that_is_near_none": ({"architectures": ["GPT2LMHeadModel"]}, r"does not train\. It trains BertModel, "),
    "two_architectures": ({"architectures": ["A", "B"]}, r"architectures is \['A', 'B'\]"),
    "architectures_not_a_list": ({"architectures": "LlamaForCausalLM"}, "architectures is LlamaForCausalLM"),
    "architectures_of_objects": ({"architectures": [{}]}, "architectures is"),
    "no_architecture": ({"architectures": None}, "architectures is None"),
    "missing_field": ({"hidden_size": None}, "lacks 'hidden_size'"),
    "text_for_int": ({"num_hidden_layers": "2"}, "num_hidden_layers is '2', expected a positive int"),
    "float_for_int": ({"vocab_size": 101.0}, "vocab_size is 101.0, expected a positive int"),
    "bool_for_int": ({"vocab_size": True}, "vocab_size is True, expected a positive int"),
    "zero": ({"intermediate_size": 0}, "intermediate_size is 0, expected a positive int"),
    "negative": ({"num_attention_heads": -4}, "num_attention_heads is -4, expected a positive int"),
    "nan": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected a positive float"),
    "infinite": ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf, expected a positive float"),
    "int_for_bool": ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
    "kv_heads": (
        {"num_key_value_heads": 3},
        r"num_attention_heads \(4\) is not a multiple of num_key_value_heads \(3\)",
    ),
    "heads": ({"hidden_size": 66}, r"hidden_size \(66\) is not a multiple of num_attention_heads \(4\)"),
    "odd_head": ({"head_dim": 15}, "head_dim is 15.*even"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'.*'silu'"),
    "rope_type": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported; known are"),
    "rope_not_an_object": ({"rope_scaling": 2.0}, "rope_scaling is 2.0, expected an object"),
    "rope_factor_missing": ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
    "rope_original_length": (
        {"rope_scaling": LLAMA3_TYPE | SCALING | {"original_max_position_embeddings": None}},
        "lacks 'original_max_position_embeddings'",
    ),
    "rope_ramp": (
        {"rope_scaling": LLAMA3_TYPE | SCALING | {"low_freq_factor": 5}},
        "low_freq_factor.*must not be more than",
    ),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised weights.*'gptq'.*original"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_error_names_the_file(tmp_path, changes, message):
    (tmp_path / "config.json").write_text("{}")
    edit_config(tmp_path, **(GOOD | changes))
    with pytest.raises(UserError, match=message) as error:
        models.load(tmp_path)
    assert str(tmp_path) in str(error.value)


STRANGE = {
    "num_experts": (8, "num_experts is 8"),
    "rope_scaling": ({"rope_type": "linear", "factor": 2.0, "beta": 3}, "rope_scaling.beta is 3"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_field_that_may_change_the_maths_is_refused(name):
    value, message = STRANGE[name]
    with pytest.raises(UserError, match=message):
        models.build(GOOD | {name: value})


FIRST = {  # a released config.json of each family
    family: next(json for repo, (json, _) in RELEASED.items() if repo.split("/")[1] in module.CONFIGS)
    for family, module in FAMILIES.items()
}


IMPOSSIBLE = {
    "more experts than there are": (
        "mixtral",
        {"num_experts_per_tok": 9},
        "num_experts_per_tok is 9, but there are 8 exp",
    ),
    "groups of one": (
        "deepseek_v3",
        {"n_group": 256},
        "n_group is 256 and topk_group 4 of 256 experts: groups must be",
    ),
    "unequal groups": ("glm4_moe", {"n_group": 7}, "n_group is 7 and topk_group 1 of 128 experts"),
    "too many groups": ("deepseek_v3", {"topk_group": 9}, "n_group is 8 and topk_group 9 of 256"),
    "dense layers": (
        "glm4_moe",
        {"first_k_dense_replace": 99},
        "first_k_dense_replace is 99, expected how many of 46 lay",
    ),
    "DeltaNet's heads": (
        "qwen3_next",
        {"linear_num_key_heads": 5},
        r"linear_num_value_heads \(32\) is not a multiple of",
    ),
    "nothing rotates": (
        "glm4",
        {"partial_rotary_factor": 0.001},
        "partial_rotary_factor is 0.001, with which no channel",
    ),
    "a list for RoPE": ("ministral3", {"rope_parameters": [1]}, r"rope_parameters is \[1\], expected an object"),
    "a list for RoPE, too": ("qwen3_5", {"rope_parameters": [1]}, r"rope_parameters is \[1\], expected an object"),
    "lists for layers": ("llama4", {"moe_layers": [[1]]}, r"moe_layers is \[\[1\]\], expected numbers of 48 layers"),
    "lists for RoPE's": ("smollm3", {"no_rope_layers": [[1]] * 36}, r"no_rope_layers is \[\[1\], .*expected a 0 or 1"),
    "lists for kinds": (
        "qwen3_next",
        {"layer_types": [["full_attention"]] * 48},
        "layer_types is .*expected 'linear_att",
    ),
    "caps": ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    "heads of full layers": (
        "gemma4",
        {"num_global_key_value_heads": 3, "attention_k_eq_v": True},
        "num_global_key_value",
    ),
    "vLLM's word": (
        "qwen3",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attn_factor": 0.8782488562869419}},
        r"attn_factor is 0.878.*attention_factor: 1.13863, as transformers computes it, or 1, as vLLM does",
    ),
}


@pytest.mark.parametrize(("family", "changes", "message"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_numbers_that_do_not_go_together(family, changes, message):
    with pytest.raises(UserError, match=message):
        models.build(FIRST[family] | changes)


def test_a_factor_of_one_is_the_same_to_all():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    plain, one = (
        models.build(FIRST["qwen3"] | {"rope_scaling": s}).config for s in (yarn, yarn | {"attn_factor": 1.0})
    )
    assert plain == one


def test_a_growth_of_nothing():
    """Devstral 2 is a Ministral 3 whose queries do not grow."""
    json = FIRST["ministral3"]
    model = models.build(json | {"rope_parameters": json["rope_parameters"] | {"llama_4_scaling_beta": 0.0}})
    assert model.config.growth.beta == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_refuses_what_it_does_not_have(family):
    """By the field's name and its value: an activation, a RoPE, a field that nobody knows; and what its class lacks."""
    json = FIRST[family]
    acts = {key: "relu2" for key in ("hidden_act", "hidden_activation") if key in json}
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    ropes = json.get("rope_parameters") or {}
    by_kind = {kind: dynamic for kind, section in ropes.items() if isinstance(section, dict)}
    for changes, why in (
        (acts, "hidden_act(ivation)? is 'relu2'"),
        (
            {"rope_scaling": None, "rope_parameters": by_kind or dynamic},
            "RoPE type 'dynamic' is not|rope_parameters is .*dynamic",
        ),
        ({"residual_gate": 0.5}, r"residual_gate is 0\.5"),
        ({"attention_dropout": 0.3}, r"attention_dropout is 0\.3"),
    ):
        with pytest.raises(UserError, match=why):
            models.build(json | changes)


def test_gemma4_layers_that_do_not_differ():
    """As transformers 5.24 writes them: no layer has a setting of its own, so that all have the one head_dim."""
    json = {k: v for k, v in FIRST["gemma4"].items() if k not in ("global_head_dim", "num_global_key_value_heads")}
    assert models.build(json | {"per_layer_config": {}}).config.full_head_dim == json["head_dim"]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"),
        ("Gemma3nForConditionalGeneration", "Gemma3ForCausalLM"),
        ("Phi3SmallForCausalLM", "Phi3ForCausalLM"),
        ("Olmo2ForSequenceClassification", "Olmo2ForCausalLM"),
        ("MinistralForCausalLM", "Ministral3ForCausalLM"),
    ],
)
def test_the_nearest_architecture_is_named(name, nearest):
    with pytest.raises(UserError, match=f"the nearest is {nearest}"):
        models.build({"architectures": [name]})


def test_what_keeps_an_architecture_out_is_said():
    with pytest.raises(
        UserError, match=r"does not train: it has block-sparse attention .*; the nearest is Phi3ForCausalLM"
    ):
        models.build({"architectures": ["Phi3SmallForCausalLM"]})
    assert not REFUSED.keys() & {*ARCHITECTURES, *TEXT_MODELS}


def test_no_such_model():
    with pytest.raises(UserError, match=r"no model 'llama3/Llama-3.2-1b'.*did you mean 'llama3/Llama-3.2-1B'"):
        models.build("llama3/Llama-3.2-1b")


@pytest.mark.parametrize("name", ["auto_map", "_attn_implementation", "trust_remote_code"])
def test_fields_that_could_run_code_are_not_read(tmp_path, name):  # S10
    model = models.build(GOOD | {name: {"AutoModelForCausalLM": "evil.Model"}}, device="cpu")
    assert model(tokens(1, 4)).shape == (1, 4, 101)
