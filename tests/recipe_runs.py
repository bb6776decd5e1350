"""Runs of a recipe on a tiny Llama, and what they leave: metrics, state, answers; transformers' reading of it."""

import contextlib
import json
import random

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM
from vocabularies import template

from torchft import models, shipped, tokenizers
from torchft.config_load import load
from torchft.generation.greedy import generate
from torchft.training.metrics import read_rows
from torchft.training.shards import TensorFolder

EXACT = (
    "step", "loss", "lr", "grad_norm", "tokens", "supervised_tokens", "eval_loss", "exact_match",
    "rewards_chosen", "rewards_rejected", "margin", "accuracy", "preferred", "eval_margin", "eval_accuracy",
    "eval_preferred",
)  # fmt: skip
WORDS = "red green blue one two three four five good day Größe 12 345 hello world".split()  # noqa: SIM905


def conversations(count, seed=0):
    """Rows of 20 to 90 tokens: a question in one or two turns, sometimes a system prompt, answers of ragged lengths."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        messages = [{"role": "system", "content": "Be brief."}] * (i % 4 == 1)
        for _ in range(1 + i % 2):
            words = rng.sample(WORDS, 1 + i % 5)
            messages += [
                {"role": "user", "content": " ".join(words)},
                {"role": "assistant", "content": " ".join(reversed(words))},
            ]
        rows.append({"messages": messages})
    return rows


def preferences(count, seed=0):
    """Rows of 60 to 150 tokens: the answer in the order asked for, and in another one, of other length."""
    rows = []
    for row in conversations(count, seed):
        *prompt, answer = row["messages"]
        wrong = {"role": "assistant", "content": f"{prompt[-1]['content']} well"}
        rows.append({"prompt": prompt, "chosen": [answer], "rejected": [wrong]})
    return rows


def write_settings(folder, base, data):
    """A config file for both recipes; returns its path."""
    settings = {
        "checkpoint_dir": str(base),
        "dataset": {"_component_": "torchft.data.datasets.chat", "source": str(data)},
        "seq_len": 128,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "epochs": 2,
        "dtype": "fp32",
        "export_dtype": "fp32",
        "device": "cpu",
        "optimizer": {"lr": 5e-3},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(settings))
    return path


def train(recipe, settings, output_dir, *overrides):
    """Run a recipe in this process as ``tune run recipe --config settings overrides...`` does; returns its folder."""
    config = load(
        recipe.Config, recipe=recipe.__name__, file=settings, overrides=[f"output_dir={output_dir}", *overrides]
    )
    recipe.main(config)
    return output_dir


def load_recipe(name):
    recipe = shipped.load_recipe(name)
    recipe.__name__ = name
    return recipe


@contextlib.contextmanager
def interrupted(monkeypatch, step):
    """The run inside fails once ``step`` steps are done."""
    monkeypatch.setenv("TORCHFT_FAULT", f"before_step:raise:*:{step}")
    with pytest.raises(RuntimeError, match="injected fault"):
        yield
    monkeypatch.delenv("TORCHFT_FAULT")


def rows(folder):
    """metrics.jsonl without what the clock says."""
    return [{k: row[k] for k in EXACT if k in row} for row in read_rows(folder / "metrics.jsonl")]


def losses(folder):
    return torch.tensor([row["loss"] for row in rows(folder) if "loss" in row])


def newest_step(folder):
    return max(folder.glob("step_*"))


def digests(folder):
    """sha256 of every file of the newest step's weights, optimizer, loader and RNG, and of the exported weights."""
    manifest = json.loads((newest_step(folder) / "manifest.json").read_text())
    files = {name: file["sha256"] for name, file in manifest["files"].items() if not name.startswith("plan/")}
    return {"step": manifest["step"], **files}


def weights(folder):
    """The trained parameters of the newest step by name."""
    saved = TensorFolder(newest_step(folder) / "model")
    return {name: saved.read(name) for name in saved.entries}


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name].detach() - other[name].detach()).abs().max().item() for name in one)


def hub_model(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def hub_batch(folder, conversations):
    """transformers' ids [b, s], labels and mask of conversations, by a template that marks what is learned."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rendered = [
        tokenizer.apply_chat_template(
            row["messages"],
            chat_template=template("llama3_training"),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        for row in conversations
    ]
    longest = max(len(r["input_ids"]) for r in rendered)
    ids = torch.zeros(len(rendered), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, r in enumerate(rendered):
        row, learned = torch.tensor(r["input_ids"]), torch.tensor(r["assistant_masks"]).bool()
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
        labels[i, : len(row)] = row.where(learned, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def hub_answers_batch(folder, rows):
    """As `hub_batch`, of prompts with one answer each, of which only that is learned."""
    batch = hub_batch(folder, [{"messages": [*prompt, *answer]} for prompt, answer in rows])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for labels, (prompt, _) in zip(batch["labels"], rows):
        kwargs = {"chat_template": template("llama3_training"), "add_generation_prompt": True, "return_dict": True}
        labels[: len(tokenizer.apply_chat_template(prompt, tokenize=True, **kwargs)["input_ids"])] = -100
    return batch


def hub_logps(model, batch):
    """Sum of transformers' log-probabilities of each row's labels, nats; and how many there are."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    mask = labels != -100
    logps = logits.float().log_softmax(-1).gather(-1, labels.where(mask, 0)[..., None])[..., 0]
    return (logps * mask).sum(1), mask.sum(1)


def hub_loss(model, batch):
    """transformers' mean over all supervised tokens of the batch, nats."""
    return model(**batch).loss


def questions(conversations):
    return [row["messages"][:-1] for row in conversations]


def hub_answers(model, folder, conversations, max_new_tokens=24):
    """What transformers answers greedily by the folder's own template, as ids without the stop token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    stops = [stops] if isinstance(stops, int) else stops
    limits = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": stops, "pad_token_id": 0}
    answers = []
    for messages in questions(conversations):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        reply = model.generate(**ids, **limits)[0, ids["input_ids"].shape[1] :].tolist()
        answers.append(reply[:-1] if reply[-1] in stops else reply)
    return answers


def our_answers(folder, conversations, max_new_tokens=24):
    """What we answer greedily, as ids without the stop token."""
    model, tokenizer = models.load(folder, dtype=torch.float32), tokenizers.load(folder)
    prompts = [tokenizer.render(q, add_generation_prompt=True).tokens for q in questions(conversations)]
    return generate(model, prompts, max_new_tokens=max_new_tokens, stop_ids=tokenizer.stop_ids)
