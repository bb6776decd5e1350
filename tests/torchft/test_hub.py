"""Hub folders: bit-exact round trips, and every mismatch between config.json and weights refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import LLAMA3_ROPE, checkpoint, decoder, edit_config, tokens
from transformers import LlamaForCausalLM

from torchft import hub, models
from torchft.errors import UserError
from torchft.files import read_json
from torchft.hub import HubFormat, HubNames
from torchft.weights import INDEX


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    checkpoint(folder, rope_parameters=LLAMA3_ROPE)
    return folder


@pytest.fixture
def folder(source, tmp_path):
    return shutil.copytree(source, tmp_path / "checkpoint")


def tensors(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def rewrite(folder, change):
    """Change the dictionary of tensors in a folder's only file."""
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def equal(a, b):
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in b)


SHARDS = [(torch.float32, hub.SHARD_BYTES), (torch.bfloat16, 20_000), (torch.float16, 1)]


@pytest.mark.parametrize(("dtype", "shard_bytes"), SHARDS, ids=str)
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "attention_bias": True}], ids=["untied", "tied"])
def test_round_trip_is_bit_exact(tmp_path, dtype, shard_bytes, changes):
    before, after = tmp_path / "before", tmp_path / "after"
    checkpoint(before, dtype=dtype, max_shard_size=20_000, rope_parameters=LLAMA3_ROPE, **changes)
    hub.save(models.load(before, dtype=dtype), after, shard_bytes=shard_bytes)
    want = tensors(before)
    assert equal(tensors(after), want)
    assert read_json(after / "config.json") == read_json(before / "config.json")

    files = sorted(f.name for f in after.glob("*.safetensors"))
    if shard_bytes == hub.SHARD_BYTES:
        assert files == ["model.safetensors"] and not (after / INDEX).exists()
    else:
        index = read_json(after / INDEX)
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in want.values())
        assert {n: f for f in files for n in load_file(after / f)} == index["weight_map"]
        assert shard_bytes > 1 or len(files) == len(want)

    options = {"dtype": "auto", "output_loading_info": True, "attn_implementation": "eager"}
    (theirs, _), (again, info) = (LlamaForCausalLM.from_pretrained(f, **options) for f in (before, after))
    assert not any(info.values())
    assert again.dtype == dtype
    assert torch.equal(again(tokens()).logits, theirs(tokens()).logits)


def test_save_in_another_dtype(folder, tmp_path):  # K15
    hub.save(models.load(folder, dtype=torch.float32), tmp_path / "out", dtype=torch.bfloat16)
    assert equal(tensors(tmp_path / "out"), {k: v.bfloat16() for k, v in tensors(folder).items()})
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "bfloat16"


def test_load_casts_to_the_asked_dtype(folder):  # K15
    wide, narrow = (models.load(folder, dtype=dtype).state_dict() for dtype in (torch.float32, torch.bfloat16))
    assert equal(narrow, {k: v.bfloat16() for k, v in wide.items()})


def test_older_spelling_of_dtype_is_kept(folder, tmp_path):
    edit_config(folder, "dtype", torch_dtype="float32")
    hub.save(models.load(folder), tmp_path / "out")
    config = read_json(tmp_path / "out" / "config.json")
    assert config["torch_dtype"] == "bfloat16" and "dtype" not in config


def test_model_from_scratch_loads_in_transformers(tmp_path):
    ours = decoder(rope_parameters=LLAMA3_ROPE, model_type="llama").eval()
    hub.save(ours, tmp_path / "out")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    torch.testing.assert_close(ours(tokens()), theirs(tokens()).logits)


def test_save_over_its_own_source(folder):
    model = models.load(folder, dtype=torch.float32)
    before = tensors(folder)
    hub.save(model, folder)
    assert equal(tensors(folder), before)


def test_save_refuses_to_replace_what_is_no_checkpoint(folder, tmp_path):
    model = models.load(folder)
    (tmp_path / "home").mkdir()
    hub.save(model, tmp_path / "home")  # empty: fine
    (tmp_path / "home" / "config.json").unlink()
    for target in (tmp_path / "home", tmp_path / "home" / "model.safetensors"):
        with pytest.raises(UserError, match="exists and is not a checkpoint"):
            hub.save(model, target)
    assert (tmp_path / "home" / "model.safetensors").is_file()


def test_failed_save_keeps_the_old_folder(folder, monkeypatch):
    model = models.load(folder)
    before = tensors(folder)
    monkeypatch.setattr(json, "dumps", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hub.save(model, folder)
    assert equal(tensors(folder), before)


def remove(*names):
    return lambda held: [held.pop(n) for n in names]


def put(tensors):
    return lambda held: held.update(tensors)


def poison(name, value):
    return lambda held: held[name].flatten()[7:8].fill_(value)


K_PROJ = "model.layers.1.self_attn.k_proj.weight"
WEIGHT_FAULTS = {
    "K13_missing": (remove(K_PROJ), f"lacks 1 of 21 tensors: {K_PROJ}"),
    "K13_unexpected": (
        put({"model.a.weight": torch.ones(2)}),
        "1 tensors that the model has no place for: model.a.weight",
    ),
    "K14_gqa_heads": (put({K_PROJ: torch.ones(64, 64)}), rf"{K_PROJ} has shape \[64, 64\], .* asks for \[32, 64\]"),
    "K14_vocab": (put({"lm_head.weight": torch.ones(99, 64)}), r"lm_head.weight has shape \[99, 64\].*\[101, 64\]"),
    "K14_rank": (put({"model.norm.weight": torch.ones(64, 1)}), r"model.norm.weight has shape \[64, 1\].*\[64\]"),
    "K15_int8": (put({K_PROJ: torch.ones(32, 64, dtype=torch.int8)}), f"{K_PROJ} is stored as I8"),
    "K15_float8": (put({K_PROJ: torch.ones(32, 64).to(torch.float8_e4m3fn)}), f"{K_PROJ} is stored as F8_E4M3"),
    "K16_nan": (poison(K_PROJ, torch.nan), rf"1 tensors hold NaN or infinity, such as \['{K_PROJ}'\]"),
    "K16_inf": (poison("model.norm.weight", -torch.inf), "hold NaN or infinity.*model.norm.weight"),
}


@pytest.mark.parametrize(("change", "message"), WEIGHT_FAULTS.values(), ids=WEIGHT_FAULTS)
def test_weights_that_do_not_fit(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(UserError, match=message) as error:
        models.load(folder)
    assert str(folder) in str(error.value) and "download" in str(error.value)


CONFIG_FAULTS = {
    "more_layers": ({"num_hidden_layers": 4}, r"lacks 18 of 39 tensors: model.layers.2.*\(8 more\)"),
    "fewer_layers": ({"num_hidden_layers": 1}, "9 tensors that the model has no place for: model.layers.1"),
    "kv_heads": (
        {"num_key_value_heads": 4},
        r"k_proj.weight has shape \[32, 64\], but config.json asks for \[64, 64\]",
    ),
    "vocab": ({"vocab_size": 128}, r"model.embed_tokens.weight has shape \[101, 64\].*\[128, 64\]"),
    "tied": (
        {"tie_word_embeddings": True},
        "ties the embeddings, but lm_head.weight differs.*tie_word_embeddings to false",
    ),
    "bias": ({"attention_bias": True}, "lacks 8 of 29 tensors: .*q_proj.bias"),
}


@pytest.mark.parametrize(("changes", "message"), CONFIG_FAULTS.values(), ids=CONFIG_FAULTS)
def test_config_that_does_not_fit(folder, changes, message):  # K17
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=message) as error:
        models.load(folder)
    assert str(folder) in str(error.value)


def test_untied_config_of_tied_weights(folder):  # K17
    rewrite(folder, remove("lm_head.weight"))
    with pytest.raises(UserError, match=r"lacks 1 of 21 tensors: lm_head\.weight"):
        models.load(folder)


def test_tied_checkpoint_may_repeat_its_embedding(folder):
    rewrite(folder, lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()}))
    edit_config(folder, tie_word_embeddings=True)
    assert models.load(folder).lm_head is None


def test_old_checkpoints_hold_rope_frequencies(folder):
    rewrite(folder, put({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    models.load(folder)


def test_many_faults_are_counted_not_listed(folder):
    edit_config(folder, hidden_size=32, head_dim=16)
    with pytest.raises(UserError, match="11 problems") as error:
        models.load(folder)
    assert "... and 11 more such tensors" in str(error.value)


def test_nothing_is_copied_before_all_names_are_checked(folder):  # K22
    rewrite(folder, remove("model.norm.weight"))
    model = decoder()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match="lacks 1 of 21"):
        hub.load_weights(model, folder)
    assert equal(model.state_dict(), before)


def test_check_for_nan_can_be_left_out(folder):
    rewrite(folder, WEIGHT_FAULTS["K16_nan"][0])
    model = decoder()
    hub.load_weights(model, folder, check_finite=False)
    assert model.layers[1].self_attn.k_proj.weight.isnan().sum() == 1


@pytest.mark.parametrize(("stop_ids", "eos"), [((7,), 7), ((2, 7), [2, 7])])
def test_side_files(tmp_path, stop_ids, eos):  # S10: no code travels
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "generation_config.json").write_text('{"eos_token_id": 2, "temperature": 0.6}')
    (source / "LICENSE").write_text("licence")
    (source / "modeling_evil.py").write_text("raise SystemExit")
    hub.save_side_files(source, out, stop_ids=stop_ids)
    assert sorted(f.name for f in out.iterdir()) == ["LICENSE", "generation_config.json"]
    assert read_json(out / "generation_config.json") == {"eos_token_id": eos, "temperature": 0.6}
    (source / "generation_config.json").unlink()
    hub.save_side_files(source, out, stop_ids=stop_ids)
    assert read_json(out / "generation_config.json") == {"eos_token_id": eos}


class Toy(torch.nn.Module):
    """Names as of a family with fused projections (Phi 3) and one Hub tensor per expert (Mixtral)."""

    def __init__(self):
        super().__init__()
        self.q, self.kv, self.other = torch.nn.Linear(4, 6), torch.nn.Linear(4, 2), torch.nn.Linear(4, 4)
        self.experts = torch.nn.Module()
        self.experts.up = torch.nn.Parameter(torch.randn(3, 5, 4))
        self.layers = torch.nn.ModuleDict({"attn": torch.nn.ModuleDict({"q": self.q, "kv": self.kv})})
        del self.q, self.kv
        names = HubNames({"^": "model."}, fused={"qkv": ("q", "kv")}, per_expert=r"\bexperts")
        self.hub_format = HubFormat(names, {})


def test_fused_and_per_expert_names_round_trip(tmp_path):
    torch.manual_seed(0)
    toy = Toy()
    hub.save(toy, tmp_path / "out")
    attn = toy.layers["attn"]
    want = {
        "model.layers.attn.qkv.weight": torch.cat((attn["q"].weight, attn["kv"].weight)),
        "model.layers.attn.qkv.bias": torch.cat((attn["q"].bias, attn["kv"].bias)),
        "model.other.weight": toy.other.weight,
        "model.other.bias": toy.other.bias,
        **{f"model.experts.{e}.up": toy.experts.up[e] for e in range(3)},
    }
    assert equal(tensors(tmp_path / "out"), want)
    again = Toy()
    hub.load_weights(again, tmp_path / "out")
    assert equal(again.state_dict(), toy.state_dict())
