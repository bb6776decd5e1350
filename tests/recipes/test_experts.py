"""The recipes on a mixture of experts: what they report, train, resume and export, read by transformers and PEFT."""

import json
import shutil

import peft
import pytest
import recipe_runs
import torch
from families import experts
from processes import run_ranks
from tiny import tokens, transformers_model
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

from torchft import models
from torchft.modules import moe
from torchft.training.metrics import read_rows
from torchft.training.routing import Routing

SIZES = {"vocab_size": 1216, "num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 128, "head_dim": 64}
QUIET = ("packed=true", "epochs=1", "save_every=null")


@pytest.fixture(scope="module")
def moe_settings(tmp_path_factory, base, data):
    """A Qwen 3 MoE with the tokenizer of the tiny Llama."""
    folder = tmp_path_factory.mktemp("moe")
    for file in base.iterdir():
        if file.suffix == ".json" and file.name != "config.json":
            shutil.copyfile(file, folder / file.name)
    theirs = transformers_model(**(experts.QWEN3_MOE | SIZES | {"moe_intermediate_size": 128, "eos_token_id": 3}))
    with torch.no_grad():
        for p in theirs.parameters():
            p.mul_(0.4)
    theirs.save_pretrained(folder)
    return recipe_runs.write_settings(tmp_path_factory.mktemp("settings"), folder, data)


def run(recipe, settings, folder, *overrides):
    return recipe_runs.train(recipe_runs.load_recipe(recipe), settings, folder, *QUIET, *overrides)


def losses(folder):
    return [row["loss"] for row in read_rows(folder / "metrics.jsonl")]


@pytest.mark.parametrize("section", ["lora.rank=8", "nf4.targets=all-linear", "fp8.targets=all-linear"])
def test_lora(moe_settings, tmp_path, section):
    """Every linear layer, those of experts too; the merged export computes what PEFT's reading of the adapter does."""
    folder = run("lora_finetune", moe_settings, tmp_path / "out", section, "optimizer.lr=5e-3", "epochs=4")
    rows = read_rows(folder / "metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.2
    assert all(1.0 <= row["expert_load"] <= 2.0 and 0 <= row["idle_experts"] < 1 for row in rows)
    merged = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)
    batch = tokens(vocab_size=1216)
    ours = models.load(folder / "export", dtype=torch.float32)
    torch.testing.assert_close(ours(batch), merged(batch).logits, rtol=1e-4, atol=1e-4)
    if section == "lora.rank=8":  # on a quantised base the merged weights have its rounding
        base = AutoModelForCausalLM.from_pretrained(ours_base(moe_settings), dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(base, folder / "export" / "adapter")
        torch.testing.assert_close(theirs(batch).logits, merged(batch).logits, rtol=1e-4, atol=1e-4)


def ours_base(settings):

    return json.loads(settings.read_text())["checkpoint_dir"]


def test_full(moe_settings, tmp_path):
    """The load-balancing loss evens the load out; without it the same run leaves it as it is. Router included."""
    plain, even = (
        run("full_finetune", moe_settings, tmp_path / name, "optimizer.lr=2e-3", "epochs=3", *more)
        for name, more in (("plain", ()), ("even", ("routing.balance=1.0",)))
    )
    assert losses(plain)[0] == losses(even)[0]
    loads = [read_rows(folder / "metrics.jsonl")[-1]["expert_load"] for folder in (plain, even)]
    assert loads[1] < loads[0] - 0.1
    before, after = (models.load(f, dtype=torch.float32) for f in (ours_base(moe_settings), plain / "export"))
    name = "layers.0.mlp.router.weight"
    moved = [m.get_parameter(name).flatten() for m in (before, after)]
    assert cosine_similarity(*moved, dim=0) < 0.99999


def test_a_run_that_resumes_is_the_same_run(moe_settings, tmp_path, monkeypatch):
    options = ("save_every=1", "routing.balance=0.1", "epochs=2")
    whole = run("lora_finetune", moe_settings, tmp_path / "whole", *options)
    with recipe_runs.interrupted(monkeypatch, step=2):
        run("lora_finetune", moe_settings, tmp_path / "cut", *options)
    cut = run("lora_finetune", moe_settings, tmp_path / "cut", *options)
    assert losses(cut) == losses(whole)


def test_bias_speed_is_refused_where_the_base_is_frozen(moe_settings, tmp_path):
    with pytest.raises(Exception, match=r"routing.bias_speed: it changes the base, which LoRA freezes"):
        run("lora_finetune", moe_settings, tmp_path / "out", "routing.bias_speed=0.001")


@pytest.mark.parametrize("recipe", ["dpo", "reward_modeling", "knowledge_distillation", "grpo", "ppo"])
def test_routing_after_sft(moe_settings, pairs, tmp_path, monkeypatch, recipe):
    """Over the micro-steps of a step the loss has its weight once, and what is counted is the tokens that are trained:
    not those that a reference, a teacher, the critic's first look or the generator read."""
    source, base = {"source": str(pairs)}, ours_base(moe_settings)
    rollout = {"prompts_per_step": 4, "group_size": 2, "sampling": {"max_new_tokens": 8}}
    rollout["rewards"] = [{"reward": {"_component_": "torchft.rl.rewards.length", "high": 4}}]
    own = {name: {"prompts": source, "rollout": rollout, "kl_coef": 0.1} for name in ("grpo", "ppo")}
    own |= {name: {"dataset": source} for name in ("dpo", "reward_modeling")}
    own["knowledge_distillation"] = {"teacher_dir": base}
    settings = json.loads(moe_settings.read_text()) | {"seq_len": 256, "recompute": "none"} | own[recipe]
    if "rollout" in settings:
        del settings["dataset"], settings["gradient_accumulation_steps"]
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(settings))
    calls, weights, counts, end = [], [], [], Routing.end_of_step
    monkeypatch.setattr(moe, "balance_loss", lambda *args: calls.append(1) or args[0].sum())

    def seen(self):
        weights.append(len(calls) * self._layers[0].balance)
        counts.append(int(self._step.sum()))
        calls.clear()
        end(self)

    monkeypatch.setattr(Routing, "end_of_step", seen)
    options = ("max_steps=2", "save_every=null", "routing.balance=0.3")
    folder = recipe_runs.train(recipe_runs.load_recipe(recipe), file, tmp_path / "out", *options)
    assert weights == pytest.approx([0.3] * len(weights)) and len(weights) == (4 if recipe == "ppo" else 2)
    rows = read_rows(folder / "metrics.jsonl")
    num_layers = len(models.load(base).layers)
    assert sum(counts) == sum(row["tokens"] for row in rows) * 2 * num_layers and rows[-1]["expert_load"] >= 1


def part_of(settings, folder, overrides):
    run("lora_finetune", settings, folder, *overrides)


def test_two_ranks_train_as_one_process(moe_settings, tmp_path):
    """Stacked weights are cut between experts, quantised ones too; counts and losses are those of all ranks."""
    options = [
        "nf4.targets=[gate_up_proj, down_proj]",
        "gradient_accumulation_steps=1",
        "clip_grad_norm=0.5",
        "routing.balance=0",
        "max_steps=4",
    ]
    alone = run("lora_finetune", moe_settings, tmp_path / "alone", *options, "batch_size=4")
    run_ranks(part_of, 2, moe_settings, tmp_path / "together", [*options, "batch_size=2"])
    together = tmp_path / "together"
    assert losses(together) == pytest.approx(losses(alone), abs=1e-5)
    for row, want in zip(*(read_rows(f / "metrics.jsonl") for f in (together, alone)), strict=True):
        assert row["expert_load"] == pytest.approx(want["expert_load"], abs=0.15)  # padding differs
    ours, theirs = (models.load(f / "export", dtype=torch.float32) for f in (together, alone))
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert max((p - q).abs().max().item() for p, q in pairs) < 1e-4
