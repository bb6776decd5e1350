"""A tiny Llama 3 with a real tokenizer, data for it, and the recipes as modules."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import recipe_runs
import tiny
from letters import write_jsonl
from vocabularies import LLAMA3_SPECIAL, byte_level, write

from torchft.tokenizers import bpe

# head_dim apart from hidden_size / heads; every linear layer has a multiple of 16384 weights, as NF4 needs
SIZES = {"vocab_size": 1216, "hidden_size": 128, "intermediate_size": 128, "head_dim": 64, "std": 0.1}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A checkpoint like Llama 3's base: control tokens, but no chat template, and a generation_config.json."""
    folder = tmp_path_factory.mktemp("base")
    write(folder, tokenizer_config={"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"})
    tokenizer = byte_level(bpe.PATTERNS["Llama 3"], special=LLAMA3_SPECIAL, llama=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = tokenizer.token_to_id("<|end_of_text|>")
    tiny.checkpoint(folder, eos_token_id=eos, bos_token_id=tokenizer.token_to_id("<|begin_of_text|>"), **SIZES)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """13 ragged rows: with the settings' 2 x 2 rows a step, an epoch has 4 steps, the last of one row."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    write_jsonl(path, recipe_runs.conversations(13))
    return path


@pytest.fixture(scope="session")
def settings(tmp_path_factory, base, data):
    return recipe_runs.write_settings(tmp_path_factory.mktemp("settings"), base, data)


@pytest.fixture(scope="session")
def lora(settings):
    """``lora(output_dir, *overrides) -> output_dir``"""
    return partial(recipe_runs.train, recipe_runs.load_recipe("lora_finetune"), settings)


@pytest.fixture(scope="session")
def full(settings):
    return partial(recipe_runs.train, recipe_runs.load_recipe("full_finetune"), settings)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """13 ragged pairs, as many as ``data`` has rows."""
    return Path(write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", recipe_runs.preferences(13)))


@pytest.fixture(scope="session")
def dpo_settings(tmp_path_factory, base, pairs):
    path = recipe_runs.write_settings(tmp_path_factory.mktemp("settings"), base, pairs)
    settings = json.loads(path.read_text()) | {"dataset": {"source": str(pairs)}, "seq_len": 256}
    path.write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="session")
def dpo(dpo_settings):
    return partial(recipe_runs.train, recipe_runs.load_recipe("dpo"), dpo_settings)


@pytest.fixture(scope="session")
def rated(tmp_path_factory):
    """The answers of the pairs one by one, good and bad."""
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in recipe_runs.preferences(7)
        for side in ("chosen", "rejected")
    ]
    return write_jsonl(tmp_path_factory.mktemp("rated") / "rated.jsonl", rows[:13])


@pytest.fixture(scope="session")
def rewards(dpo_settings):
    return partial(recipe_runs.train, recipe_runs.load_recipe("reward_modeling"), dpo_settings)


@pytest.fixture(scope="session")
def kd_settings(tmp_path_factory, settings, teacher):
    """As ``settings``, with a teacher."""
    path = tmp_path_factory.mktemp("settings") / "kd.yaml"
    path.write_text(json.dumps(json.loads(settings.read_text()) | {"teacher_dir": str(teacher)}))
    return path


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, base):
    """As ``base``, with other weights, wider, and an embedding with some more padding."""
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    shutil.copytree(base, folder)
    tiny.checkpoint(folder, **SIZES | {"hidden_size": 192, "vocab_size": 1280, "num_hidden_layers": 3, "std": 0.07})
    return folder


@pytest.fixture(scope="session")
def distill(kd_settings):
    return partial(recipe_runs.train, recipe_runs.load_recipe("knowledge_distillation"), kd_settings)


@pytest.fixture(scope="session")
def qat_settings(tmp_path_factory, settings):
    """As ``settings``, without a dtype of the export, which is the training's."""
    path = tmp_path_factory.mktemp("settings") / "qat.yaml"
    path.write_text(json.dumps({k: v for k, v in json.loads(settings.read_text()).items() if k != "export_dtype"}))
    return path


@pytest.fixture(scope="session")
def qat(qat_settings):
    return partial(recipe_runs.train, recipe_runs.load_recipe("qat_finetune"), qat_settings)


@pytest.fixture
def no_picture(lora, full, dpo, rewards, distill, qat, monkeypatch):
    """Leaves out loss.png, whose 0.2 s at every checkpoint would be most of a test."""
    for run in (lora, full, dpo, rewards, distill, qat):
        monkeypatch.setattr(run.args[0], "draw_loss", lambda *args, **kwargs: None)
