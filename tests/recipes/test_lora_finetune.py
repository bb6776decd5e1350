"""LoRA fine-tuning from end to end: against transformers and PEFT, resumed, accumulated, quantised, and refused."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import tiny
import torch
from letters import turns, write_jsonl
from peft import PeftModel
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
    newest_step,
    our_answers,
    questions,
    rows,
    weights,
)
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from torchft import registry, tokenizers
from torchft.adapters.nf4 import NF4Config, apply_nf4
from torchft.cli.main import main
from torchft.errors import UserError
from torchft.training.run_folder import open_run

TRAINED, UNSEEN = conversations(13), conversations(4, seed=1)
EXAM = TRAINED[:3] + UNSEEN[:3]
SGD = "optimizer={_component_: torch.optim.SGD, lr: 0.1}"
CONSTANT = "lr_schedule={_component_: torchft.training.schedules.constant}"


class Tracker:
    """A metric logger of the user's own."""

    def __init__(self, *, run_id, output_dir, config):
        self.path = output_dir / "tracked.txt"
        self.path.write_text(f"{run_id} {config['seed']}\n")

    def log(self, step, values):
        self.path.write_text(f"{self.path.read_text()}{step} {values['loss']}\n")

    def close(self):
        self.path.write_text(f"{self.path.read_text()}closed\n")


def exported(folder):
    merged = load_file(folder / "export" / "model.safetensors")
    return merged | load_file(folder / "export" / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def trained(lora, tmp_path_factory):
    """A run that learned its questions by heart, with all that a run can report."""
    folder = tmp_path_factory.mktemp("trained")
    held_out, exam = write_jsonl(folder / "eval.jsonl", UNSEEN), write_jsonl(folder / "exam.jsonl", EXAM)
    registry.add(Tracker, kind="metric_logger")
    return lora(
        folder / "run",
        "epochs=20",
        "optimizer.lr=1e-2",
        "lora.alpha=24",
        "lora.dropout=0.05",
        "dataset_eval._component_=torchft.data.datasets.chat",
        f"dataset_eval.source={held_out}",
        f"exact_match.source={exam}",
        "exact_match.max_new_tokens=24",
        "exact_match.batch_size=4",
        "eval_every=25",
        "save_every=25",
        "keep_last=1",
        f"metric_loggers=[{{_component_: {Tracker.__module__}.Tracker}}]",
    )


def test_what_a_run_leaves(trained):
    """All that a run folder has; of the steps the last one, and the best by held-out loss."""
    found = {path.name for path in trained.iterdir()} - {".lock", "tracked.txt"}
    steps = {row["eval_loss"]: row["step"] for row in rows(trained) if "eval_loss" in row}
    kept = {f"step_{step:06}" for step in (80, steps[min(steps)])}
    assert found == {"config.yaml", "run.json", "metrics.jsonl", "loss.png", "export", *kept}
    assert [row["step"] for row in rows(trained)] == list(range(81))
    run = json.loads((trained / "run.json").read_text())
    assert run["recipe"] == "lora_finetune" and [start["status"] for start in run["starts"]] == ["finished"]
    manifest = json.loads((newest_step(trained) / "manifest.json").read_text())
    assert (manifest["run_id"], manifest["step"]) == (run["id"], 80)
    tracked = (trained / "tracked.txt").read_text().splitlines()
    assert tracked == [
        f"{run['id']} 0",
        *(f"{row['step']} {row['loss']}" for row in rows(trained)[1:]),
        "closed",
    ]


def test_losses_are_transformers(trained, base):
    """Of the base before the first step, and held out after the last one."""
    first = rows(trained)[1]
    every = hub_batch(trained / "export", TRAINED)
    assert first["supervised_tokens"] < (every["labels"] != -100).sum()
    held_out = hub_loss(hub_model(trained / "export"), hub_batch(trained / "export", UNSEEN)).item()
    assert rows(trained)[-1]["eval_loss"] == pytest.approx(held_out, rel=1e-5)


def test_k28_the_merged_model_in_transformers(trained, base):
    folder = trained / "export"
    model = hub_model(folder)
    answers = hub_answers(model, folder, EXAM)
    assert our_answers(folder, EXAM) == answers
    ours, theirs = tokenizers.load(folder), AutoTokenizer.from_pretrained(folder)
    for row in EXAM:
        ids = theirs.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        assert ours.render(row["messages"]).tokens == tokenizers.load(base).render(row["messages"]).tokens == ids
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (base / name).read_bytes()


def test_exact_match_is_decoded(trained):
    """The share of right answers in metrics.jsonl, by transformers' own decoding of the exported model."""
    folder = trained / "export"
    texts = [tokenizers.load(folder).decode(ids) for ids in hub_answers(hub_model(folder), folder, EXAM)]
    right = [text == row["messages"][-1]["content"] for text, row in zip(texts, EXAM)]
    assert right[:3] == [True] * 3  # learned by heart
    assert rows(trained)[-1]["exact_match"] == sum(right) / 6 < 1
    assert rows(trained)[0] == {"step": 0, "exact_match": 0.0}


def test_k28_the_adapter_in_peft(trained, base):
    """The base with the adapter answers and computes what the merged model does."""
    adapted = PeftModel.from_pretrained(hub_model(base), trained / "export" / "adapter").eval()
    merged = hub_model(trained / "export")
    assert hub_answers(adapted.base_model.model, trained / "export", EXAM) == our_answers(trained / "export", EXAM)
    tokens = tiny.tokens(vocab_size=1216)
    with torch.no_grad():
        assert (adapted(tokens).logits - merged(tokens).logits).abs().max() < 1e-4
        assert (hub_model(base)(tokens).logits - merged(tokens).logits).abs().max() > 1
    path = trained / "export" / "adapter"
    theirs = AutoTokenizer.from_pretrained(path)
    assert peft.PeftConfig.from_pretrained(path).base_model_name_or_path == str(base.resolve())
    for messages in questions(EXAM):
        ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=True)
        assert tokenizers.load(base).render(messages, add_generation_prompt=True).tokens == ids


def test_steps_are_pefts(lora, base, tmp_path, no_picture):
    """From the adapter after one step on: losses, gradient norms and weights of PEFT's model trained with SGD."""
    options = ["batch_size=13", "gradient_accumulation_steps=1", SGD, CONSTANT, "lora.alpha=24", "clip_grad_norm=0.5"]
    first = lora(tmp_path / "first", *options, "epochs=1")
    run = lora(tmp_path / "run", *options, "epochs=4")
    model = PeftModel.from_pretrained(hub_model(base), first / "export" / "adapter", is_trainable=True)
    batch = hub_batch(run / "export", TRAINED)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for row in rows(run)[1:]:
        loss = hub_loss(model, batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5) and norm > 0.5
    theirs = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    assert largest_difference(load_file(run / "export" / "adapter" / "adapter_model.safetensors"), theirs) < 1e-6


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_resume_is_bit_exact(lora, tmp_path, monkeypatch, no_picture, capsys, packed):
    """Interrupted after the first step, within an epoch, where an epoch ends, and run again after the last step.

    Between two steps means between two accumulation windows; the last one of an epoch is short.
    """
    options = [f"packed={packed}", f"batch_size={1 if packed else 2}", "lora.dropout=0.1", "save_every=1"]
    whole = lora(tmp_path / "whole", *options)
    total = rows(whole)[-1]["step"]
    for step in (1, total // 2 - 1, total // 2, total - 1):
        with interrupted(monkeypatch, step):
            lora(tmp_path / "parts", *options)
    for _ in range(2):
        parts = lora(tmp_path / "parts", *options)
        assert rows(parts) == rows(whole)
        assert digests(parts) == digests(whole)
        assert largest_difference(exported(parts), exported(whole)) == 0
    said = capsys.readouterr().out.split("LoRA fine-tuning")[-1].replace("\n", " ")
    assert re.search(rf"all\W+{total}\W+steps\W+are\W+done:\W+nothing\W+is\W+left\W+to\W+train", said)


def test_steps_after_the_last_checkpoint_are_done_again(lora, tmp_path, monkeypatch, no_picture):
    """And metrics.jsonl holds each step once, its means over the same steps, whenever it is written."""
    options = ["save_every=3", "log_every=2"]
    whole = lora(tmp_path / "whole", *options)
    with interrupted(monkeypatch, 5):
        lora(tmp_path / "parts", *options)
    assert [row["step"] for row in rows(tmp_path / "parts")] == [2, 3, 4]
    parts = lora(tmp_path / "parts", *options)
    assert rows(parts) == rows(whole)
    assert [row["step"] for row in rows(parts)] == [2, 3, 4, 6, 8]
    assert digests(parts) == digests(whole)


def test_a_run_that_failed_before_its_first_checkpoint_starts_anew(lora, tmp_path, monkeypatch, no_picture):
    exam = write_jsonl(tmp_path / "exam.jsonl", EXAM)
    options = [f"exact_match.source={exam}", "exact_match.max_new_tokens=4"]
    with interrupted(monkeypatch, 2):
        lora(tmp_path / "run", *options)
    lora(tmp_path / "run", *options, "optimizer.lr=1e-3")
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(9))


def test_k1_killed_while_it_saves(settings, lora, tmp_path, no_picture):
    """``python recipes/lora_finetune.py``, by SIGKILL between a checkpoint's last byte and its renaming."""
    whole = lora(tmp_path / "whole", "save_every=1", "epochs=1")
    script = Path(lora.args[0].__file__)
    command = [sys.executable, script, "--config", settings, f"output_dir={tmp_path / 'run'}", "save_every=1"]
    environment = {"PYTHONPATH": str(script.parent.parent), "TORCHFT_FAULT": "before_commit:kill:*:3"}
    environment |= {"OMP_NUM_THREADS": "1"}  # as here: with other threads sums are other sums
    killed = subprocess.run([*command, "epochs=1"], env=os.environ | environment, capture_output=True, timeout=120)
    assert killed.returncode == -9
    assert len(list((tmp_path / "run").glob(".step_000003.*"))) == 1
    resumed = lora(tmp_path / "run", "save_every=1", "epochs=1")
    assert (rows(resumed), digests(resumed)) == (rows(whole), digests(whole))
    assert not list(resumed.glob(".step*"))


@pytest.mark.parametrize("optimizer", ["torchao.optim.AdamW8bit", "torchft.training.optim.MuonWithAdamW"])
def test_other_optimizers_train_and_resume(lora, tmp_path, monkeypatch, no_picture, optimizer):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # torchao's optimizers compile each shape: 20 s on a CPU
    options = [f"optimizer={{_component_: {optimizer}, lr: 1e-2}}", "save_every=1"]
    whole = lora(tmp_path / "whole", *options)
    assert losses(whole)[4:].mean() < losses(whole)[:4].mean() - 0.5
    with interrupted(monkeypatch, 3):
        lora(tmp_path / "parts", *options)
    parts = lora(tmp_path / "parts", *options)
    assert (rows(parts), digests(parts)) == (rows(whole), digests(whole))


def test_more_epochs_go_on(lora, tmp_path, no_picture):
    """``epochs`` is free to change: the run goes on where it ended, each epoch with an order of its own."""
    lora(tmp_path / "run", "epochs=1", CONSTANT)
    lora(tmp_path / "run", "epochs=2", CONSTANT)
    whole = lora(tmp_path / "whole", "epochs=2", CONSTANT)
    assert (rows(tmp_path / "run"), digests(tmp_path / "run")) == (rows(whole), digests(whole))


def test_accumulation_is_one_large_batch(lora, tmp_path, no_picture):
    """k micro-batches of b rows as one of k x b: ragged rows, and a window of one row where the epoch ends."""
    runs = {
        (b, k): lora(tmp_path / f"{b}x{k}", f"batch_size={b}", f"gradient_accumulation_steps={k}", SGD, CONSTANT)
        for b, k in ((4, 1), (2, 2), (1, 4))
    }
    whole = runs.pop((4, 1))
    for run in runs.values():
        assert [row["supervised_tokens"] for row in rows(run)] == [row["supervised_tokens"] for row in rows(whole)]
        assert (losses(run) - losses(whole)).abs().max() < 1e-5
        assert largest_difference(weights(run), weights(whole)) < 2e-7  # measured: 2e-8
    assert losses(whole)[4:].mean() < losses(whole)[:4].mean()


def test_packed_rows_train_what_padded_ones_do(lora, tmp_path, no_picture):
    """An epoch as one step, twice: the second loss and the weights show the gradients."""
    epoch = ["batch_size=1", "gradient_accumulation_steps=99", SGD, CONSTANT]
    padded, packed = (lora(tmp_path / name, f"packed={name == 'packed'}", *epoch) for name in ("padded", "packed"))
    assert rows(packed)[0]["supervised_tokens"] == rows(padded)[0]["supervised_tokens"]
    assert rows(packed)[0]["tokens"] < rows(padded)[0]["tokens"]
    assert (losses(packed) - losses(padded)).abs().max() < 1e-5 and losses(packed)[1] < losses(packed)[0]
    assert largest_difference(weights(packed), weights(padded)) < 2e-7


def test_recompute_changes_nothing(lora, tmp_path, no_picture):
    """Not a bit, dropout included."""
    options = ["lora.dropout=0.1", "epochs=1"]
    kept, again = (lora(tmp_path / mode, f"recompute={mode}", *options) for mode in ("none", "full"))
    assert (rows(kept), digests(kept)) == (rows(again), digests(again))


@pytest.mark.parametrize("kind", ["lora.dora=true", "lora.rslora=true", "lora.rank_pattern={q_proj: 3}"])
def test_kinds_of_adapters(lora, base, tmp_path, no_picture, kind):
    """They learn, and base plus adapter in PEFT compute what the merged model does."""
    run = lora(tmp_path / "run", kind, "lora.rank=4", "lora.alpha=24")
    assert losses(run)[4:].mean() < losses(run)[:4].mean() - 0.5
    tokens = tiny.tokens(vocab_size=1216)
    adapted = PeftModel.from_pretrained(hub_model(base), run / "export" / "adapter").eval()
    with torch.no_grad():
        assert (adapted(tokens).logits - hub_model(run / "export")(tokens).logits).abs().max() < 1e-4


def through_nf4(weight):
    """``weight`` as an NF4 layer holds it; torchao's own function has another place in each of its versions."""
    layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight.data.copy_(weight)
    model = torch.nn.Sequential(layer)
    apply_nf4(model, NF4Config(targets=[".*"]))
    return model[0].weight.to(torch.float32)


def test_qlora(lora, base, tmp_path, no_picture):
    """N12: it learns, and the merged export is the dequantised base plus the adapter's product."""
    run = lora(tmp_path / "run", "nf4={}", "lora.rank=4", "lora.alpha=24")
    assert losses(run)[4:].mean() < losses(run)[:4].mean() - 0.5
    adapter = load_file(run / "export" / "adapter" / "adapter_model.safetensors")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, run / "export"))
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        if key.format("A") in adapter:
            weight = through_nf4(weight)
            weight = weight + 24 / 4 * adapter[key.format("B")] @ adapter[key.format("A")]
        assert (after[name] - weight).abs().max() < 1e-6, name
    assert sum("lora_A" in key for key in adapter) == 14


def test_a_bf16_base_has_fp32_adapters(lora, tmp_path, no_picture):
    half = lora(tmp_path / "half", "dtype=bf16", "export_dtype=bf16")
    assert {p.dtype for p in weights(half).values()} == {torch.float32}
    adapter = load_file(half / "export" / "adapter" / "adapter_model.safetensors")
    assert {p.dtype for p in adapter.values()} == {torch.float32}
    assert {p.dtype for p in load_file(half / "export" / "model.safetensors").values()} == {torch.bfloat16}
    assert (losses(half) - losses(lora(tmp_path / "full"))).abs().max() < 0.1


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


def test_a_copied_recipe_runs_by_its_path(settings, lora, tmp_path, tune):
    """``tune cp lora_finetune mine.py`` and ``tune run ./mine.py`` train bit for bit what the shipped one does."""
    mine = tmp_path / "mine.py"
    assert tune("cp", "lora_finetune", mine)[0] == 0
    words = ("--config", settings, "epochs=1")
    assert tune("run", mine, *words, f"output_dir={tmp_path / 'run'}") == (0, "")
    whole = lora(tmp_path / "whole", "epochs=1")
    assert (rows(tmp_path / "run"), digests(tmp_path / "run")) == (rows(whole), digests(whole))


def test_user_errors_exit_with_2(settings, base, tmp_path, monkeypatch, tune):
    """One message, no traceback, whether a config, the data, the folder or the machine is at fault."""
    silent = write_jsonl(
        tmp_path / "silent.jsonl", [{"messages": [{**m, "train": False} for m in turns("a", "b")["messages"]]}]
    )
    words = ["run", "lora_finetune", "--config", settings, f"output_dir={tmp_path / 'run'}"]
    for options, message in [
        (["eval_every=2", "export=[]"], r"2 problems\n.*eval_every: there is nothing to evaluate.*\n.*export: nothing"),
        ([f"dataset.source={silent}"], r"dataset: nothing to train on: none of 1 rows has a supervised token"),  # D9
        ([f"output_dir={base / 'run'}"], r"output_dir .* lies inside checkpoint_dir"),  # C14
        (["device=cuda:99"], r"device: 'cuda:99' cannot be used here: "),
        (["lora.targets=[q_prj]"], r"lora.targets: .*q_prj"),
    ]:
        code, error = tune(*words, *options)
        assert code == 2 and re.search(rf"error: {message}", error) and "Traceback" not in error, error
    assert not list((tmp_path / "run").glob("step_*")) and not (base / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert tune(*words)[0] == 2


def test_d14_a_tokenizer_of_another_model(lora, base, tmp_path):
    small = tmp_path / "small"
    shutil.copytree(base, small)
    tiny.checkpoint(small, vocab_size=1200)
    with pytest.raises(UserError, match=r"token id 12\d\d is outside the model's 1200 embedding rows"):
        lora(tmp_path / "run", f"checkpoint_dir={small}")


def test_k26_a_folder_in_use(lora, tmp_path):
    with (
        open_run(tmp_path, "seed: 0", recipe="lora_finetune"),
        pytest.raises(UserError, match=rf"output_dir {tmp_path} is in use by process {os.getpid()} "),
    ):
        lora(tmp_path)


def test_c15_a_folder_of_another_run(lora, full, tmp_path, no_picture):
    lora(tmp_path / "run", "max_steps=1")
    before = digests(tmp_path / "run")
    with pytest.raises(UserError, match=r"a run of lora_finetune, not of full_finetune; choose another output_dir"):
        full(tmp_path / "run")
    with pytest.raises(UserError, match=r"holds a run \(export, step_000001\) and resume is 'never'"):
        lora(tmp_path / "run", "resume=never")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(UserError, match=r"but no run.json: not a run's; choose another output_dir"):
        lora(tmp_path / "run", "max_steps=1")
    assert digests(tmp_path / "run") == before


def test_k19_a_changed_config(lora, tmp_path, monkeypatch, no_picture):
    """Every difference is named; accept_changes goes on with what the config says now."""
    with interrupted(monkeypatch, 2):
        lora(tmp_path / "run", "save_every=1", CONSTANT)
    changed = ["save_every=2", CONSTANT, "optimizer.lr=1e-4", "clip_grad_norm=0.5"]
    with pytest.raises(UserError) as refused:
        lora(tmp_path / "run", *changed)
    assert set(refused.value.problems[:-1]) == {"clip_grad_norm: 1.0 -> 0.5", "optimizer.lr: 0.005 -> 0.0001"}
    assert "To continue it with this one: resume=accept_changes" in str(refused.value)
    lora(tmp_path / "run", *changed, "resume=accept_changes")
    assert [row["lr"] for row in rows(tmp_path / "run")] == [0.005] * 2 + [1e-4] * 6


def test_k18_the_base_has_changed(lora, base, tmp_path, monkeypatch, no_picture):
    mine = tmp_path / "base"
    shutil.copytree(base, mine)
    options = [f"checkpoint_dir={mine}", "save_every=1"]
    with interrupted(monkeypatch, 2):
        lora(tmp_path / "run", *options)
    tensors = load_file(mine / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] += 1e-3
    save_file(tensors, mine / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"step_000002 was trained on other base weights"):
        lora(tmp_path / "run", *options)
    assert not (tmp_path / "run" / "step_000003").exists()


def test_d21_the_data_has_changed(lora, data, tmp_path, monkeypatch, no_picture):
    mine = tmp_path / "mine.jsonl"
    shutil.copyfile(data, mine)
    options = [f"dataset.source={mine}", "save_every=1"]
    with interrupted(monkeypatch, 2):
        lora(tmp_path / "run", *options)
    mine.write_text(mine.read_text().replace("hello", "hallo"))
    with pytest.raises(UserError, match=r"cannot resume the data loader: fingerprint was"):
        lora(tmp_path / "run", *options)


def test_n1_a_loss_that_is_not_finite(lora, tmp_path, monkeypatch, no_picture):
    """In the second micro-batch of step 3: nothing changes, the rows are named, and the run can go on from step 2."""
    recipe = lora.args[0]
    built, calls = [], []
    build_model, nll_sum = recipe.build_model, recipe.nll_sum

    def poisoned(hidden, project, *, labels, num_supervised=None):
        calls.append(labels)
        return nll_sum(hidden, project, labels=labels) * (float("nan") if len(calls) == 6 else 1.0)

    whole = lora(tmp_path / "whole", "save_every=1", "epochs=1")
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "build_model", lambda *args: built.append(build_model(*args)) or built[-1])
        patch.setattr(recipe, "nll_sum", poisoned)
        with pytest.raises(UserError, match=r"^step 3: loss nan, gradient norm nan: .* gradients of 28 param") as stop:
            lora(tmp_path / "run", "save_every=1", "epochs=1")
    lines = re.findall(r"train\.jsonl:(\d+)", str(stop.value))
    assert len(set(lines)) == 4  # 2 x 2 rows
    wanted = sum((labels != -100).sum() for labels in calls[4:])
    learned = hub_batch(whole / "export", [TRAINED[int(line) - 1] for line in lines])["labels"]
    assert (learned != -100).sum() == wanted
    saved = weights(tmp_path / "run")
    now = {name: p for name, p in built[0].named_parameters() if p.requires_grad}
    assert newest_step(tmp_path / "run").name == "step_000002" and largest_difference(saved, now) == 0
    assert not (tmp_path / "run" / "export").exists()
    resumed = lora(tmp_path / "run", "save_every=1", "epochs=1")
    assert (rows(resumed), digests(resumed)) == (rows(whole), digests(whole))


def test_a_learning_rate_that_is_far_too_high(lora, tmp_path, no_picture):
    with pytest.raises(UserError, match=r"^step 2: loss (nan|inf), .*train\.jsonl:\d+.* lower the learning rate"):
        lora(tmp_path / "run", CONSTANT, "optimizer.lr=1e30")
    assert not list((tmp_path / "run").glob("step_*"))
