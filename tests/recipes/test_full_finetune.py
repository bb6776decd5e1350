"""Full fine-tuning from end to end: against training with transformers, resumed, accumulated, and from scratch."""

import json
import logging
import math
import shutil

import pytest
import tiny
import torch
from letters import write_jsonl
from recipe_runs import (
    conversations,
    digests,
    hub_answers,
    hub_batch,
    hub_loss,
    hub_model,
    interrupted,
    largest_difference,
    losses,
    our_answers,
    rows,
    weights,
)
from safetensors.torch import load_file
from transformers import AutoTokenizer, get_cosine_schedule_with_warmup
from vocabularies import QWEN_SPECIAL, byte_level, template, write

from torchft import tokenizers
from torchft.errors import UserError
from torchft.tokenizers import bpe

TRAINED, UNSEEN = conversations(13), conversations(4, seed=1)
EXAM = TRAINED[:3] + UNSEEN[:2]
SGD = "optimizer={_component_: torch.optim.SGD, lr: 0.1}"
CONSTANT = "lr_schedule={_component_: torchft.training.schedules.constant}"


def test_steps_are_those_of_transformers(full, base, tmp_path, no_picture):
    """Losses, gradient norms, learning rates and final weights of transformers' model, schedule and torch's AdamW."""
    options = ["batch_size=5", "gradient_accumulation_steps=3", "epochs=5", "clip_grad_norm=0.5"]
    options += ["optimizer={_component_: torch.optim.AdamW, lr: 1e-3, weight_decay: 0.5, betas: [0.9, 0.95]}"]
    run = full(
        tmp_path / "run", *options, "lr_schedule={_component_: torchft.training.schedules.cosine, warmup_steps: 2}"
    )
    model, batch = hub_model(base), hub_batch(base, TRAINED)
    decayed = [
        {"params": [p for p in model.parameters() if p.ndim == n], "weight_decay": w} for n, w in ((2, 0.5), (1, 0))
    ]
    optimizer = torch.optim.AdamW(decayed, lr=1e-3, betas=(0.9, 0.95))
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, 5)
    for row in rows(run):
        lr = schedule.get_last_lr()[0]
        loss = hub_loss(model, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 0.5
        assert row["lr"] == pytest.approx(lr, rel=1e-12)
        assert row["supervised_tokens"] == (batch["labels"] != -100).sum()
    assert largest_difference(load_file(run / "export" / "model.safetensors"), dict(model.state_dict())) < 3e-5


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_resume_is_bit_exact(full, tmp_path, monkeypatch, no_picture, packed):
    """Interrupted after the first step, within an epoch, where an epoch ends, and run again after the last step."""
    options = [f"packed={packed}", f"batch_size={1 if packed else 2}", "save_every=1"]
    whole = full(tmp_path / "whole", *options)
    total = rows(whole)[-1]["step"]
    for step in (1, total // 2 - 1, total // 2, total - 1):
        with interrupted(monkeypatch, step):
            full(tmp_path / "parts", *options)
    for _ in range(2):
        parts = full(tmp_path / "parts", *options)
        assert (rows(parts), digests(parts)) == (rows(whole), digests(whole))
        assert [start["status"] for start in json.loads((parts / "run.json").read_text())["starts"]][:4] == [
            "failed"
        ] * 4


def test_accumulation_packing_and_recompute_train_the_same(full, tmp_path, no_picture):
    """Three epochs of one step each: in one batch, in thirteen, packed, and with recompute."""
    ways = {
        "one batch": ["batch_size=13", "gradient_accumulation_steps=1"],
        "thirteen": ["batch_size=1", "gradient_accumulation_steps=13"],
        "packed": ["batch_size=2", "gradient_accumulation_steps=9", "packed=true"],
        "recomputed": ["batch_size=4", "gradient_accumulation_steps=4", "recompute=full"],
    }
    runs = {name: full(tmp_path / name, *options, SGD, CONSTANT, "epochs=3") for name, options in ways.items()}
    whole = runs.pop("one batch")
    assert losses(whole)[2] < losses(whole)[1] < losses(whole)[0]
    for run in runs.values():
        assert (losses(run) - losses(whole)).abs().max() < 1e-5
        assert largest_difference(weights(run), weights(whole)) < 1e-6  # measured: 2e-7


def test_k28_a_checkpoint_with_its_own_template(full, base, tmp_path, no_picture):
    """ChatML on a tied bf16 model: transformers loads, renders and answers the same."""
    mine, run = tmp_path / "base", tmp_path / "run"
    tokenizer = byte_level(bpe.PATTERNS["Qwen 2"], special=QWEN_SPECIAL, nfc=True)
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write(mine, tokenizer_config=config, chat_template=template("qwen2_5"))
    tokenizer.save(str(mine / "tokenizer.json"))
    end = tokenizer.token_to_id("<|im_end|>")
    sizes = {"vocab_size": 1203, "tie_word_embeddings": True, "std": 0.1, "eos_token_id": end}
    tiny.checkpoint(mine, dtype=torch.bfloat16, **sizes)
    exam = write_jsonl(tmp_path / "exam.jsonl", EXAM)
    options = [f"exact_match.source={exam}", "exact_match.max_new_tokens=24", "epochs=25", "optimizer.lr=1e-2"]
    full(run, f"checkpoint_dir={mine}", *options, "save_every=1000", "seq_len=256", "batch_size=4")
    folder = run / "export"
    assert {p.name for p in folder.iterdir()} == {p.name for p in mine.iterdir()}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (mine / name).read_bytes()
    ours, theirs = tokenizers.load(folder), AutoTokenizer.from_pretrained(folder)
    for row in TRAINED:
        assert ours.render(row["messages"]).tokens == theirs.apply_chat_template(
            row["messages"], tokenize=True, return_dict=False
        )
    answers = hub_answers(hub_model(folder), folder, EXAM)
    assert our_answers(folder, EXAM) == answers
    right = [ours.decode(a) == row["messages"][-1]["content"] for a, row in zip(answers, EXAM)]
    assert rows(run)[-1]["exact_match"] == sum(right) / 5 > 0
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_bf16_weights_train_and_export(full, base, tmp_path, no_picture, caplog):
    half = full(tmp_path / "half", "dtype=bf16", "export_dtype=bf16")
    assert {p.dtype for p in weights(half).values()} == {torch.bfloat16}
    exported, saved = load_file(half / "export" / "model.safetensors"), weights(half)
    assert {p.dtype for p in exported.values()} == {torch.bfloat16}
    assert sorted(p.sum().item() for p in exported.values()) == sorted(p.sum().item() for p in saved.values())
    assert json.loads((half / "export" / "config.json").read_text())["dtype"] == "bfloat16"
    assert (losses(half) - losses(full(tmp_path / "full"))).abs().max() < 0.1
    with caplog.at_level(logging.WARNING):
        full(tmp_path / "slow", "dtype=bf16", "optimizer.lr=1e-7", "max_steps=1")
    assert "lr 1e-07 is below the resolution of" in caplog.text  # N4


def test_from_scratch_reads_no_weights(full, base, tmp_path, no_picture):
    """The first loss is that of guessing; the seed decides the weights."""
    bare = tmp_path / "bare"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    options = [f"checkpoint_dir={bare}", "from_scratch=true", "max_steps=3"]
    first, again = full(tmp_path / "first", *options), full(tmp_path / "again", *options)
    other = full(tmp_path / "other", *options, "seed=1")
    assert losses(first)[0] == pytest.approx(math.log(1216), abs=0.1)
    assert digests(first) == digests(again) and digests(first) != digests(other)
    with pytest.raises(UserError, match=r"holds no \.safetensors file"):
        full(tmp_path / "run", f"checkpoint_dir={bare}")


def test_plain_text_needs_no_chat_format(full, base, tmp_path, no_picture):
    """A loss on questions and answers in plain text, against transformers."""
    data = write_jsonl(tmp_path / "qa.jsonl", [{"question": f"{i} red?", "answer": "blue " * i} for i in range(1, 6)])
    options = [f"source: {data}", "prompt_template: 'Q: {question} A: '", "column_map: {output: answer}"]
    dataset = "dataset={_component_: torchft.data.datasets.instruct, " + ", ".join(options) + "}"
    run = full(tmp_path / "run", dataset, "batch_size=5", "gradient_accumulation_steps=1", "max_steps=1")
    tokenizer, model = AutoTokenizer.from_pretrained(base), hub_model(base)
    total = count = 0
    for i in range(1, 6):
        prompt = tokenizer(f"Q: {i} red? A: ")["input_ids"]
        answer = tokenizer("blue " * i + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([prompt + answer])
        total += hub_loss(
            model, {"input_ids": ids, "labels": ids.where(torch.arange(ids.shape[1]) >= len(prompt), -100)}
        ) * len(answer)
        count += len(answer)
    assert rows(run)[0]["loss"] == pytest.approx((total / count).item(), rel=1e-5)


def test_n1_weights_stay_those_of_the_step_before(full, tmp_path, monkeypatch, no_picture):
    """With every weight trained too: a poisoned micro-batch changes nothing, and the run can go on."""
    recipe, calls = full.args[0], []
    nll_sum = recipe.nll_sum

    def poisoned(hidden, project, *, labels, num_supervised=None):
        calls.append(labels)
        return nll_sum(hidden, project, labels=labels) * (float("nan") if len(calls) == 3 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "nll_sum", poisoned)
        with pytest.raises(UserError, match=r"^step 2: loss nan, .*rows of this batch: .*train\.jsonl:\d+, "):
            full(tmp_path / "run", "save_every=1")
    whole, resumed = (full(tmp_path / name, "save_every=1") for name in ("whole", "run"))
    assert (rows(resumed), digests(resumed)) == (rows(whole), digests(whole))
