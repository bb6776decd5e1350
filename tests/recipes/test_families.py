"""The recipes on families that differ most from Llama: transformers and PEFT read and compute what they export."""

import peft
import pytest
import recipe_runs
import torch
import transformers
from families import CASES
from oracles import violations
from safetensors.torch import load_file
from tiny import tokens, transformers_model
from vocabularies import LLAMA3_SPECIAL, byte_level, write

from torchft import models
from torchft.tokenizers import bpe

# Fused names; windows and capped scores; heads by layer, a factor that is not trained; keys that other layers read too;
# side by side; no positions.
FAMILIES = ("phi3", "gemma2", "gemma4", "gemma4_e2b", "command_r7b", "smollm3")
STEPS = ("max_steps=2", "packed=true", "save_every=100")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write(folder, tokenizer_config={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"})
    byte_level(bpe.PATTERNS["Llama 3"], special=LLAMA3_SPECIAL, llama=True).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def checkpoint(tokenizer_folder, tmp_path):
    def make(family):
        folder = tmp_path / "base"
        rows = {"vocab_size": 1216}
        if "vocab_size_per_layer_input" in CASES[family]:
            rows["vocab_size_per_layer_input"] = 1216
        transformers_model(**(CASES[family] | rows), std=0.1).save_pretrained(folder)
        for file in tokenizer_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        return folder

    return make


def hub_model(folder):
    architecture = models.config_json(folder)["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora(family, checkpoint, data, tmp_path, monkeypatch):
    recipe = recipe_runs.load_recipe("lora_finetune")
    monkeypatch.setattr(recipe, "draw_loss", lambda *args, **kwargs: None)
    base = checkpoint(family)
    settings = recipe_runs.write_settings(tmp_path, base, data)
    out = recipe_runs.train(recipe, settings, tmp_path / "out", *STEPS, "lora.targets=[q_proj,o_proj,up_proj]")
    batch = tokens(vocab_size=1216)
    with torch.no_grad():
        ours = models.load(out / "export", dtype=torch.float32)(batch)
        assert violations({"merged": (hub_model(out / "export")(batch).logits, ours)}) == {}
        adapted = peft.PeftModel.from_pretrained(hub_model(base), out / "export" / "adapter")
        assert violations({"adapter": (adapted(batch).logits, ours)}) == {}
        assert violations({"base": (hub_model(base)(batch).logits, ours)}) != {}


@pytest.mark.parametrize("family", FAMILIES)
def test_full(family, checkpoint, data, tmp_path, monkeypatch):
    recipe = recipe_runs.load_recipe("full_finetune")
    monkeypatch.setattr(recipe, "draw_loss", lambda *args, **kwargs: None)
    base = checkpoint(family)
    settings = recipe_runs.write_settings(tmp_path, base, data)
    out = recipe_runs.train(recipe, settings, tmp_path / "out", *STEPS, "recompute=full")
    before, after = load_file(base / "model.safetensors"), load_file(out / "export" / "model.safetensors")
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if name.endswith("layer_scalar")}
    batch = tokens(vocab_size=1216)
    with torch.no_grad():
        ours = models.load(out / "export", dtype=torch.float32)(batch)
        assert violations({"logits": (hub_model(out / "export")(batch).logits, ours)}) == {}
