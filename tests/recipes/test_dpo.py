"""Preference training from end to end: against transformers, its references, packed, resumed, on ranks, and refused."""

import json
import math
import re
import sys

import pytest
import torch
from letters import write_jsonl
from processes import run_ranks
from recipe_runs import (
    digests,
    hub_answers_batch,
    hub_logps,
    hub_model,
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

from torchft import shipped
from torchft.adapters.lora import lora_layers
from torchft.cli.main import main
from torchft.cli.run import find
from torchft.training import reference

PAIRS = preferences(13)
GOLDEN = [0.69314718, 0.67569196, 0.65124631]
SGD = "optimizer={_component_: torch.optim.SGD, lr: 0.02}"
CONSTANT = "lr_schedule={_component_: torchft.training.schedules.constant}"
EPOCH = ["batch_size=13", "gradient_accumulation_steps=1", SGD, CONSTANT]
LORA = "lora={rank: 4, alpha: 24}"
SHARED = [LORA, "packed=true", "share_prompts=true"]
KTO = "loss={_component_: torchft.losses.preference.kto, beta: 0.2, undesirable_weight: 0.7}"
LOSS = "loss={{_component_: torchft.losses.preference.{}, {}}}"


def unpaired(rated):
    return [KTO, f"dataset={{_component_: torchft.data.preferences.unpaired, source: {rated}}}"]


def hub_pairs(base):
    sides = [hub_answers_batch(base, [(row["prompt"], row[side]) for row in PAIRS]) for side in ("chosen", "rejected")]
    return lambda model: [hub_logps(model, batch)[0] for batch in sides]


def test_full_training_is_transformers_with_the_closed_form(dpo, base, tmp_path, no_picture):
    """Losses, norms, rewards and wins of every step, the reference a second checkpoint."""
    run = dpo(tmp_path / "run", *EPOCH, "epochs=3", "clip_grad_norm=0.5", "loss.beta=0.3", "loss.label_smoothing=0.1")
    model, logps = hub_model(base), hub_pairs(base)
    with torch.no_grad():
        known = logps(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for row in rows(run):
        chosen, rejected = (0.3 * (policy - ref) for policy, ref in zip(logps(model), known))
        margin = chosen - rejected
        loss = (0.9 * torch.log1p((-margin).exp()) + 0.1 * torch.log1p(margin.exp())).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 0.5
        assert row["rewards_chosen"] == pytest.approx(chosen.mean().item(), abs=1e-4)
        assert row["margin"] == pytest.approx(margin.mean().item(), abs=1e-4)
        assert row["accuracy"] == (margin > 0).sum() / 13
        optimizer.step()
        optimizer.zero_grad()
    assert rows(run)[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert rows(run)[-1]["margin"] > 0.1 and rows(run)[-1]["accuracy"] > rows(run)[0]["accuracy"]
    theirs = dict(model.named_parameters())
    assert largest_difference(load_file(run / "export" / "model.safetensors"), theirs) < 1e-5


def test_kto_is_transformers_with_the_closed_form(dpo, base, rated, tmp_path, no_picture):
    """With its estimate of the KL from the next row's answer."""
    with open(rated) as f:
        data = [json.loads(line) for line in f]
    run = dpo(tmp_path / "run", *EPOCH, *unpaired(rated), "epochs=3", "clip_grad_norm=null")
    own = hub_answers_batch(base, [(row["prompt"], row["completion"]) for row in data])
    others = hub_answers_batch(base, [(row["prompt"], data[(i + 1) % 13]["completion"]) for i, row in enumerate(data)])
    model, good = hub_model(base), torch.tensor([row["label"] for row in data])
    with torch.no_grad():
        known, known_others = hub_logps(model, own)[0], hub_logps(model, others)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for row in rows(run):
        rewards = 0.2 * (hub_logps(model, own)[0] - known)
        with torch.no_grad():
            kl = 0.2 * (hub_logps(model, others)[0] - known_others).mean().clamp(min=0)
        loss = torch.where(good, 1 - torch.sigmoid(rewards - kl), 0.7 * (1 - torch.sigmoid(kl - rewards))).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["margin"] == pytest.approx((rewards[good].mean() - rewards[~good].mean()).item(), abs=1e-4)
    assert kl > 0.01 and row["margin"] > 0.05 and "accuracy" not in row
    assert largest_difference(load_file(run / "export" / "model.safetensors"), dict(model.named_parameters())) < 1e-5


@pytest.mark.parametrize("options", [[], [LORA]], ids=["full", "lora"])
def test_every_reference_gives_the_same_run(dpo, base, tmp_path, monkeypatch, no_picture, options):
    """A second checkpoint, the model before training, adapters switched off; computed before or with each batch."""
    monkeypatch.setattr(reference, "cache_folder", lambda: tmp_path / "cache")
    options = [*options, "epochs=1", f"dataset_eval={{source: {write_jsonl(tmp_path / 'e.jsonl', preferences(3, 1))}}}"]
    runs = [
        dpo(tmp_path / "own", *options),
        dpo(tmp_path / "other", *options, f"reference_dir={base}"),
        dpo(tmp_path / "before", *options, "precompute_reference=true"),
        dpo(tmp_path / "both", *options, "precompute_reference=true", f"reference_dir={base}"),
    ]
    for run in runs[1:]:
        assert (losses(run) - losses(runs[0])).abs().max() < 1e-5
        assert rows(run)[0]["eval_loss"] == pytest.approx(math.log(2), rel=1e-5)
        assert largest_difference(weights(run), weights(runs[0])) < 1e-4
    assert len(list((tmp_path / "cache" / "references").iterdir())) == 2  # of training and held-out pairs

    def unasked(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(reference, "answer_logps", unasked)
    again = dpo(tmp_path / "again", *options, "precompute_reference=true")
    assert rows(again) == rows(runs[2])
    with pytest.raises(AssertionError, match="computed again"):  # other pairs
        dpo(tmp_path / "less", *options, "precompute_reference=true", "dataset.max_rows=9")
    for file in (tmp_path / "cache" / "references").iterdir():
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AssertionError, match="computed again"):  # damaged
        dpo(tmp_path / "damaged", *options, "precompute_reference=true")


@pytest.mark.parametrize("extra", [["ld_alpha=0.4"], ["wpo=true"], ["rpo_alpha=0.5", LORA], ["kto"]])
def test_packed_pairs_train_what_padded_ones_do(dpo, rated, tmp_path, no_picture, extra):
    """An epoch as one step, twice: the second loss and the weights show the gradients."""
    options = [*EPOCH, *(unpaired(rated) if extra == ["kto"] else extra)]
    padded, packed = (dpo(tmp_path / str(p), *options, f"packed={p}".lower()) for p in (False, True))
    assert rows(packed)[0]["supervised_tokens"] == rows(padded)[0]["supervised_tokens"]
    assert rows(packed)[0]["tokens"] < rows(padded)[0]["tokens"]
    assert (losses(packed) - losses(padded)).abs().max() < 1e-5 and losses(packed)[1] < losses(packed)[0]
    assert largest_difference(weights(packed), weights(padded)) < 1e-6


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["packed=true", "ld_alpha=0.4"],
        ["packed=true", "wpo=true", LORA],
        ["packed=true", LOSS.format("simpo", "beta: 2, gamma: 1")],
    ],
)
def test_shared_prompts_train_what_others_do(dpo, base, tmp_path, no_picture, extra):
    """An epoch as one step, twice, as above; the held-out pairs share too."""
    options = [*EPOCH, *extra, f"dataset_eval={{source: {write_jsonl(tmp_path / 'e.jsonl', preferences(3, 1))}}}"]
    shared, plain = (dpo(tmp_path / s, *options, f"share_prompts={s}", "epochs=2") for s in ("true", "false"))
    assert rows(shared)[1]["tokens"] < rows(plain)[1]["tokens"]
    for row, want in zip(rows(shared), rows(plain), strict=True):
        row.pop("tokens", None), want.pop("tokens", None)
        assert row == pytest.approx(want, rel=1e-5, abs=2e-6)
    assert rows(plain)[-1]["eval_loss"] and losses(plain)[1] < losses(plain)[0]
    assert largest_difference(weights(shared), weights(plain)) < 1e-6


@pytest.mark.parametrize("kind", ["pairs", "kto"])
def test_accumulation_is_one_large_batch(dpo, rated, tmp_path, no_picture, kind):
    options = [SGD, CONSTANT, *(unpaired(rated) if kind == "kto" else [])]
    runs = [
        dpo(tmp_path / f"{b}x{k}", *options, f"batch_size={b}", f"gradient_accumulation_steps={k}")
        for b, k in ((4, 1), (2, 2), (1, 4))
    ]
    for run in runs[1:]:
        assert (losses(run) - losses(runs[0])).abs().max() < 1e-5
        assert largest_difference(weights(run), weights(runs[0])) < 1e-6
    assert losses(runs[0])[4:].mean() < losses(runs[0])[:4].mean()


@pytest.mark.parametrize(
    "options",
    [[*SHARED, "batch_size=1"], ["precompute_reference=true"], ["kto"]],
    ids=["lora", "full", "kto"],
)
def test_resume_is_bit_exact(dpo, rated, tmp_path, monkeypatch, no_picture, options):
    """After the first step, within an epoch, where an epoch ends, and run again after the last step."""
    monkeypatch.setattr(reference, "cache_folder", lambda: tmp_path / "cache")
    options = [*(unpaired(rated) if options == ["kto"] else options), "save_every=1", "optimizer.lr=1e-3"]
    whole = dpo(tmp_path / "whole", *options)
    total = rows(whole)[-1]["step"]
    for step in (1, total // 2 - 1, total // 2, total - 1):
        with interrupted(monkeypatch, step):
            dpo(tmp_path / "parts", *options)
    for _ in range(2):
        parts = dpo(tmp_path / "parts", *options)
        assert (rows(parts), digests(parts)) == (rows(whole), digests(whole))


def test_full_rank_lora_takes_the_step_of_full_training(dpo, base, tmp_path, monkeypatch, no_picture):
    """With A the identity and B zero, B's gradient is the weight's: one step of SGD moves both alike."""
    recipe = dpo.args[0]
    init = recipe.init_adapters

    def identity(model):
        init(model)
        for layer in lora_layers(model).values():
            torch.nn.init.eye_(layer.lora_a.data)

    monkeypatch.setattr(recipe, "init_adapters", identity)
    step = [*EPOCH, "epochs=1", "clip_grad_norm=null"]
    full = dpo(tmp_path / "full", *step)
    lora = dpo(
        tmp_path / "lora",
        *step,
        "lora={rank: 128, alpha: 128, rank_pattern: {o_proj: 256}, alpha_pattern: {o_proj: 256}}",
    )
    ours, theirs = (load_file(run / "export" / "model.safetensors") for run in (lora, full))
    names = [name for name in ours if name.endswith("proj.weight")]
    assert len(names) == 14
    assert max((ours[name] - theirs[name]).abs().max() for name in names) < 1e-6
    untouched = load_file(base / "model.safetensors")
    assert max((ours[name] - untouched[name]).abs().max() for name in names) > 1e-3


OTHERS = [
    ("dpo_normalised", "beta: 5.0"), ("robust", "beta: 0.1, label_smoothing: 0.1"), ("ipo", "beta: 0.1"),
    ("hinge", "beta: 0.1"), ("nca", "beta: 0.1"), ("bco", "beta: 0.1"), ("simpo", "beta: 2.0, gamma: 1.0"),
    ("cpo", "beta: 0.1"), ("orpo", "beta: 0.1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), OTHERS)
def test_every_loss_trains(dpo, tmp_path, no_picture, name, options):
    run = dpo(tmp_path / "run", LOSS.format(name, options), LORA, "epochs=4", "packed=true", "batch_size=1")
    assert losses(run)[-4:].mean() < losses(run)[:4].mean()
    assert sum(row["margin"] for row in rows(run)[-4:]) > sum(row["margin"] for row in rows(run)[:4])


def test_golden_losses(dpo, tmp_path, no_picture):
    """Of a run on torch 2.13 (CPU): a change that should not move numbers shows that it does not."""
    options = [LORA, "epochs=1", "packed=true", "share_prompts=false", "batch_size=1", CONSTANT, "optimizer.lr=1e-3"]
    run = dpo(tmp_path / "run", *options)
    assert losses(run).tolist() == pytest.approx(GOLDEN, rel=1e-4)


def part(settings, output_dir, overrides):
    train(load_recipe("dpo"), settings, output_dir, *overrides)


@pytest.mark.parametrize(
    "options",
    [
        [LORA, "packed=true", "share_prompts=true", "batch_size=2"],
        ["packed=false", "batch_size=2"],
        ["kto", "batch_size=2"],
    ],
    ids=["lora", "full", "kto"],
)
def test_two_ranks_are_one_process(dpo, dpo_settings, pairs, rated, tmp_path, no_picture, options):
    """The last step of an epoch leaves the second rank without a row."""
    data = unpaired(rated) if options[0] == "kto" else [f"dataset={{source: {pairs}}}"]
    options = [*data, *options[options[0] == "kto" : -1], "epochs=3", "gradient_accumulation_steps=1", SGD, CONSTANT]
    options += [data[-1].replace("dataset=", "dataset_eval="), "clip_grad_norm=0.5", "eval_every=3"]
    alone = dpo(tmp_path / "alone", *options, "batch_size=4")
    run_ranks(part, 2, dpo_settings, tmp_path / "together", [*options, "batch_size=2"])
    ours = rows(tmp_path / "together")
    assert len(ours) == len(rows(alone)) > 3
    for row, want in zip(ours, rows(alone), strict=True):
        row.pop("tokens", None), want.pop("tokens", None)  # ranks pad to their own longest row
        assert row == pytest.approx(want, rel=1e-4, abs=1e-5)
    assert largest_difference(weights(tmp_path / "together"), weights(alone)) < 1e-5


def test_a_stream_of_pairs(dpo, tmp_path, no_picture):
    options = [
        LORA,
        "streaming={}",
        "max_steps=6",
        "packed=true",
        "share_prompts=true",
        "batch_size=1",
        "optimizer.lr=1e-2",
    ]
    run = dpo(tmp_path / "run", *options)
    assert len(losses(run)) == 6 and losses(run)[-1] < losses(run)[0] - 0.1


def test_qlora(dpo, tmp_path, no_picture):
    run = dpo(tmp_path / "run", LORA, "nf4={}", "epochs=3", "optimizer.lr=1e-2")
    assert rows(run)[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert losses(run)[-4:].mean() < 0.6 and rows(run)[-1]["margin"] > 0.2


def test_compiled_blocks(dpo, tmp_path, no_picture):
    options = [LORA, "packed=true", "batch_size=1", "max_steps=3", "seq_len=192"]
    eager, compiled = (
        dpo(tmp_path / str(c), *options, f"compile={c}".lower(), "recompute=none") for c in (False, True)
    )
    assert (losses(compiled) - losses(eager)).abs().max() < 1e-5 and losses(eager)[2] != losses(eager)[1]
    assert largest_difference(weights(compiled), weights(eager)) < 1e-4


@pytest.fixture
def tune(monkeypatch, capsys):
    """``tune(*words) -> (exit code, stderr)``, in this process."""
    monkeypatch.setattr(sys, "argv", ["tune"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def call(*words):
        try:
            code = main([str(word) for word in words])
        except SystemExit as e:
            code = e.code
        return code, capsys.readouterr().err

    return call


def test_user_errors_exit_with_2(dpo_settings, rated, tmp_path, tune):
    same = write_jsonl(tmp_path / "same.jsonl", [PAIRS[0], {**PAIRS[1], "rejected": PAIRS[1]["chosen"]}])
    alone = write_jsonl(tmp_path / "alone.jsonl", [{key: PAIRS[0][key] for key in ("prompt", "chosen")}])
    words = ["run", "dpo", "--config", dpo_settings, f"output_dir={tmp_path / 'run'}"]
    for options, message in [
        ([f"dataset.source={same}"], r".*same.jsonl:2: 'chosen' and 'rejected' are the same"),
        ([f"dataset.source={alone}"], r".*alone.jsonl:1: no column 'rejected'"),
        (
            [unpaired(rated)[1]],
            r"dataset: torchft.losses.preference.dpo needs .*: torchft.data.preferences.pairs",
        ),
        ([KTO], r"dataset: torchft.losses.preference.kto needs .*: torchft.data.preferences.unpaired"),
        ([KTO, "rpo_alpha=1"], r".*rpo_alpha, ld_alpha, wpo: they are for pairs"),
        ([LOSS.format("simpo", "beta: 1.0")], r".*loss.gamma: torchft.losses.preference.simpo needs it: a number"),
        (["loss.policy_chosen_logps=1"], r".*loss.policy_chosen_logps: the recipe sets this itself"),
        (["loss.beta=x"], r".*loss.beta"),
        (["nf4={}"], r".*nf4, fp8: the base has one format, which is frozen"),
        ([LOSS.format("orpo", "beta: 0.1"), "precompute_reference=true"], r".*this loss has no reference"),
        ([KTO, "precompute_reference=true"], r".*precompute_reference: what streams or KL estimates ask"),
        (["dataset.too_long=truncate"], r"dataset.too_long: an answer that is judged is never cut"),
    ]:
        code, error = tune(*words, *options)
        assert code == 2 and re.search(rf"(?s)error: {message}", error) and "Traceback" not in error, error
    assert not list((tmp_path / "run").glob("step_*"))


@pytest.mark.parametrize("name", ["full_dpo_distributed", "lora_dpo_single_device", "lora_dpo_distributed"])
def test_torchtunes_names(name):
    script, distributed = find(name)
    assert script.name == "dpo.py" and distributed == name.endswith("_distributed")


def test_the_demo_in_short(tmp_path):
    """Of held-out words the margin and the share of preferred answers rise."""
    recipe = load_recipe("dpo")
    short = [
        "max_steps=18",
        "eval_every=18",
        "log_every=18",
        "optimizer.lr=2e-3",
        "packed=true",
        "dataset_eval.max_rows=16",
        "batch_size=3",
    ]
    run = train(recipe, shipped.find_config("demo/dpo"), tmp_path / "run", *short)
    before, after = rows(run)
    assert before["eval_margin"] == 0 and before["eval_preferred"] < 0.2
    assert after["eval_margin"] > 3 and after["eval_preferred"] > before["eval_preferred"] + 0.3
