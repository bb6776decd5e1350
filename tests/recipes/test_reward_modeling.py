"""Reward models from end to end: against transformers in training and after export, packed, resumed, on ranks."""

import json
import re
import shutil

import pytest
import torch
from letters import write_jsonl
from processes import run_ranks
from recipe_runs import (
    digests,
    hub_answers_batch,
    interrupted,
    largest_difference,
    load_recipe,
    losses,
    preferences,
    rows,
    train,
    weights,
)
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from torchft import shipped, tokenizers
from torchft.errors import UserError
from torchft.training.metrics import read_rows

PAIRS = preferences(13)
SGD = "optimizer={_component_: torch.optim.SGD, lr: 0.02}"
CONSTANT = "lr_schedule={_component_: torchft.training.schedules.constant}"
EPOCH = ["batch_size=13", "gradient_accumulation_steps=1", SGD, CONSTANT]
GOLDEN = [0.6777, 0.4770, 0.3534]
LORA = "lora={rank: 4, alpha: 24}"


@pytest.fixture(scope="session")
def judged(tmp_path_factory):
    """``judged[kind] -> overrides`` with data of that kind, 13 rows each."""
    folder = tmp_path_factory.mktemp("judged")
    scores = [
        {"prompt": row["prompt"], "completion": row["chosen"], "help": i % 5, "truth": -i / 10}
        for i, row in enumerate(PAIRS)
    ]
    steps = [
        {
            "prompt": row["prompt"][-1]["content"],
            "completions": [m["content"] for m in (*row["chosen"], *row["rejected"])] * (1 + i % 2),
            "labels": [True, False] * (1 + i % 2),
        }
        for i, row in enumerate(PAIRS)
    ]
    scores, steps = write_jsonl(folder / "scores.jsonl", scores), write_jsonl(folder / "steps.jsonl", steps)
    component = "torchft.data.preferences."
    return {
        "pairs": [f"dataset={{source: {write_jsonl(folder / 'pairs.jsonl', PAIRS)}}}"],
        "scored": [
            f"dataset={{_component_: {component}scored, scores: [help, truth], source: {scores}}}",
            "loss={_component_: torchft.losses.reward.regression}",
        ],
        "stepwise": [
            f"dataset={{_component_: {component}stepwise, source: {steps}}}",
            "loss={_component_: torchft.losses.reward.steps}",
        ],
    }


KINDS = ["pairs", "scored", "stepwise"]


def test_training_is_transformers(rewards, base, judged, tmp_path, no_picture):
    """Bradley-Terry step by step, from the same random score."""
    first = rewards(tmp_path / "first", *judged["pairs"], *EPOCH, "max_steps=1", "optimizer.lr=1e-30")
    model = AutoModelForSequenceClassification.from_pretrained(first / "export", dtype=torch.float32).eval()
    run = rewards(tmp_path / "run", *judged["pairs"], *EPOCH, "epochs=3", "clip_grad_norm=0.5", "loss.centering=0.05")
    sides = [hub_answers_batch(base, [(row["prompt"], row[side]) for row in PAIRS]) for side in ("chosen", "rejected")]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for row in rows(run):
        chosen, rejected = (
            model.model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).last_hidden_state[
                torch.arange(13), b["attention_mask"].sum(1) - 1
            ]
            @ model.score.weight[0]
            for b in sides
        )
        loss = (torch.log1p((rejected - chosen).exp()) + 0.05 * (chosen + rejected) ** 2).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 0.5
        assert row["margin"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-3, abs=1e-4)
        assert row["accuracy"] == (chosen > rejected).sum() / 13
    theirs = dict(model.named_parameters())
    assert largest_difference(load_file(run / "export" / "model.safetensors"), theirs) < 1e-4


@pytest.mark.parametrize("options", [[], [LORA, "lora.dora=true"]], ids=["full", "lora"])
def test_the_export_scores_as_transformers_does(rewards, judged, tmp_path, no_picture, options):
    """Of a batch of ragged conversations that are padded at their end."""
    run = rewards(tmp_path / "run", *judged["pairs"], *options, "epochs=6", "optimizer.lr=3e-3", "packed=true")
    assert losses(run)[-4:].mean() < losses(run)[:4].mean() - 0.2 and rows(run)[-1]["accuracy"] > 0.5
    model, info = AutoModelForSequenceClassification.from_pretrained(
        run / "export", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.num_labels == 1
    batch = hub_answers_batch(
        run / "export", [(row["prompt"], row[side]) for row in PAIRS for side in ("chosen", "rejected")]
    )
    ids = batch["input_ids"].where(batch["attention_mask"].bool(), model.config.pad_token_id)
    with torch.no_grad():
        scores = model.eval()(input_ids=ids, attention_mask=batch["attention_mask"]).logits.view(13, 2)
    assert (scores[:, 0] > scores[:, 1]).float().mean() >= 0.9
    held_out = rewards(  # the same folder's score by our own reading, after no further step
        tmp_path / "again", *judged["pairs"], *options, "epochs=6", "optimizer.lr=3e-3", "packed=true",
        judged["pairs"][0].replace("dataset=", "dataset_eval="),
    )  # fmt: skip
    last = json.loads((held_out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval_margin"] == pytest.approx((scores[:, 0] - scores[:, 1]).mean().item(), rel=1e-4)
    assert last["eval_score"] == pytest.approx(scores.mean().item(), rel=1e-4, abs=1e-5)


def test_steps_are_transformers_token_classes(rewards, judged, tmp_path, no_picture):
    held_out = judged["stepwise"][0].replace("dataset=", "dataset_eval=")
    run = rewards(tmp_path / "run", *judged["stepwise"], "epochs=10", "optimizer.lr=3e-3", held_out)
    model, info = AutoModelForTokenClassification.from_pretrained(
        run / "export", dtype=torch.float32, output_loading_info=True
    )
    assert (
        not info["missing_keys"] and not info["unexpected_keys"] and model.config.id2label == {0: "wrong", 1: "right"}
    )
    tokenizer, total, right, count = tokenizers.load(run / "export"), 0.0, 0, 0
    with open(re.search(r"source: (\S+)}", judged["stepwise"][0])[1]) as f:
        data = [json.loads(line) for line in f]
    for row in data:
        ids = list(tokenizer.render([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True).tokens)
        labels = [-100] * len(ids)
        for step, label in zip(row["completions"], row["labels"]):
            new = [*tokenizer.encode(step), *tokenizer.encode("\n")]
            ids, labels = ids + new, labels + [-100] * (len(new) - 1) + [int(label)]
        labels = torch.tensor([labels])
        with torch.no_grad():
            out = model.eval()(input_ids=torch.tensor([ids]), labels=labels)
        n = (labels != -100).sum().item()
        total, count = total + out.loss.item() * n, count + n
        right += (out.logits.argmax(-1) == labels).sum().item()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval_loss"] == pytest.approx(total / count, rel=1e-4) and last["eval_loss"] < 0.6
    assert last["eval_accuracy"] == pytest.approx(right / count)


def test_several_objectives(rewards, judged, tmp_path, no_picture):
    run = rewards(tmp_path / "run", *judged["scored"], "epochs=6", "optimizer.lr=3e-3")
    assert losses(run)[-4:].mean() < 0.5 * losses(run)[:4].mean()
    model = AutoModelForSequenceClassification.from_pretrained(run / "export", dtype=torch.float32)
    assert model.score.weight.shape[0] == 2 and model.config.id2label == {0: "score_0", 1: "score_1"}


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_train_what_padded_ones_do(rewards, judged, tmp_path, no_picture, kind):
    padded, packed = (
        rewards(tmp_path / p, *judged[kind], *EPOCH, f"packed={p}", "optimizer.lr=1e-3") for p in ("false", "true")
    )
    assert (losses(packed) - losses(padded)).abs().max() < 1e-5 and losses(packed)[1] < losses(packed)[0]
    assert largest_difference(weights(packed), weights(padded)) < 1e-5


def test_resume_is_bit_exact(rewards, judged, tmp_path, monkeypatch, no_picture):
    options = [*judged["pairs"], LORA, "save_every=1", "optimizer.lr=1e-3"]
    whole = rewards(tmp_path / "whole", *options)
    for step in (1, 3, 4):
        with interrupted(monkeypatch, step):
            rewards(tmp_path / "parts", *options)
    parts = rewards(tmp_path / "parts", *options)
    assert (rows(parts), digests(parts)) == (rows(whole), digests(whole))


def part(settings, output_dir, overrides):
    train(load_recipe("reward_modeling"), settings, output_dir, *overrides)


@pytest.mark.parametrize(
    ("kind", "size", "spread"),
    [
        ("pairs", 2, []),
        ("stepwise", 2, []),
        ("pairs", 2, ["parallel.tp=2", "packed=true"]),
        ("scored", 2, ["parallel.cp=2", LORA]),
        ("stepwise", 4, ["parallel.cp=2", "packed=true"]),
    ],
)
def test_ranks_are_one_process(rewards, dpo_settings, judged, tmp_path, no_picture, kind, size, spread):
    options = [*judged[kind], "epochs=2", "gradient_accumulation_steps=1", "optimizer.lr=2e-4", CONSTANT, *spread[1:]]
    options += [judged[kind][0].replace("dataset=", "dataset_eval="), "clip_grad_norm=0.5"]
    alone = rewards(tmp_path / "alone", *options, "batch_size=4")
    own = 4 * (2 if spread else 1) // size  # rows of a rank; two share them
    run_ranks(part, size, dpo_settings, tmp_path / "together", [*options, *spread[:1], f"batch_size={own}"])
    for row, want in zip(rows(tmp_path / "together"), rows(alone), strict=True):
        assert row.pop("grad_norm", 0.0) == pytest.approx(want.pop("grad_norm", 0.0), rel=1e-5)
        row.pop("tokens", None), want.pop("tokens", None)  # ranks pad to their own longest row
        assert row == pytest.approx(want, rel=1e-4, abs=1e-5)
    exports = [load_file(run / "export" / "model.safetensors") for run in (tmp_path / "together", alone)]
    assert largest_difference(*exports) < 1e-3


def test_data_of_another_kind_is_refused(rewards, judged, tmp_path):
    with pytest.raises(UserError, match=r"reward.bradley_terry needs data of another kind: .*preferences.pairs"):
        rewards(tmp_path / "run", judged["scored"][0])
    with pytest.raises(UserError, match=r"steps needs data of another kind: torchft.data.preferences.stepwise"):
        rewards(tmp_path / "run", judged["pairs"][0], judged["stepwise"][1])


def test_a_document_that_ends_in_the_padding_token(rewards, base, judged, tmp_path, no_picture):
    """transformers would read the token before it: the export says that rows cannot be padded."""
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<|eot_id|>"}))
    run = rewards(tmp_path / "run", *judged["pairs"], f"checkpoint_dir={folder}", "max_steps=1")
    assert json.loads((run / "export" / "config.json").read_text())["pad_token_id"] is None


def test_the_demo_in_short(tmp_path):
    """A few steps teach it more than half of which answers to held-out prompts are the better ones."""
    short = ["max_steps=16", "log_every=16", "eval_every=16", "batch_size=2", "dataset_eval.max_rows=50"]
    run = train(load_recipe("reward_modeling"), shipped.find_config("demo/reward"), tmp_path / "run", *short)
    before, after = read_rows(run / "metrics.jsonl")
    assert before["eval_accuracy"] < 0.65 and after["eval_accuracy"] >= 0.68
    assert after["eval_margin"] > before["eval_margin"] + 0.2 and after["eval_loss"] < 0.65 < before["eval_loss"]


def test_golden_losses(rewards, judged, tmp_path, no_picture):
    """Of a run on torch 2.13 (CPU): a change that should not move numbers shows that it does not."""
    options = [*judged["pairs"], LORA, "epochs=1", "packed=true", "batch_size=1", CONSTANT, "optimizer.lr=1e-3"]
    assert losses(rewards(tmp_path / "run", *options)).tolist() == pytest.approx(GOLDEN, abs=1e-4)
