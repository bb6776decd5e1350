"""Distillation from end to end: against transformers step by step, packed, resumed, on ranks, and the demo in short."""

import json
import shutil

import pytest
import torch
from processes import run_ranks
from recipe_runs import (
    conversations,
    digests,
    hub_batch,
    hub_model,
    interrupted,
    largest_difference,
    load_recipe,
    losses,
    rows,
    train,
    weights,
)
from safetensors.torch import load_file
from torch.nn import functional as F
from trl.experimental.gkd import GKDTrainer

from torchft import models, shipped, tokenizers
from torchft.errors import UserError
from torchft.models.shallow import build_shallow
from torchft.rl.rewrite import Writers
from torchft.training import reference
from torchft.training import teacher as teacher_module
from torchft.training.metrics import read_rows

SGD = "optimizer={_component_: torch.optim.SGD, lr: 0.1}"
CONSTANT = "lr_schedule={_component_: torchft.training.schedules.constant}"
EPOCH = ["batch_size=13", "gradient_accumulation_steps=1", SGD, CONSTANT]
REVERSE = "divergence={_component_: torchft.losses.distill.reverse_kl}"
GOLDEN = [4.5131, 4.3217, 3.9958]
LORA = "lora={rank: 4, alpha: 24}"


@pytest.mark.parametrize(("divergence", "weight"), [("forward_kl", 1.0), ("reverse_kl", 0.4)])
def test_training_is_transformers_with_kl_div(distill, base, teacher, tmp_path, no_picture, divergence, weight):
    options = [f"divergence._component_=torchft.losses.distill.{divergence}", f"kd_weight={weight}", "temperature=2.0"]
    run = distill(tmp_path / "run", *EPOCH, *options, "epochs=3", "clip_grad_norm=0.5")
    batch = hub_batch(base, conversations(13))
    student, other = hub_model(base), hub_model(teacher)
    mask, y = batch["labels"][:, 1:] != -100, batch["labels"][:, 1:]

    def logits(model):
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return out[:, :-1][mask][:, :1216]  # words that both have

    with torch.no_grad():
        t = (logits(other) / 2).log_softmax(-1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for row in rows(run):
        words = logits(student)
        s = (words / 2).log_softmax(-1)
        pair = (s, t) if divergence == "forward_kl" else (t, s)
        kd = F.kl_div(*pair, log_target=True, reduction="sum") / mask.sum()
        loss = weight * kd + (1 - weight) * F.cross_entropy(words, y[mask])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    theirs = dict(student.named_parameters())
    assert largest_difference(load_file(run / "export" / "model.safetensors"), theirs) < 1e-5
    assert losses(run)[-1] < losses(run)[0]


@pytest.mark.parametrize("options", [[REVERSE], [LORA, "kd_weight=0.5"]], ids=["full", "lora"])
def test_packed_rows_train_what_padded_ones_do(distill, tmp_path, no_picture, options):
    padded, packed = (distill(tmp_path / p, *EPOCH, *options, f"packed={p}") for p in ("false", "true"))
    assert (losses(packed) - losses(padded)).abs().max() < 1e-5 and losses(packed)[1] < losses(packed)[0]
    assert largest_difference(weights(packed), weights(padded)) < 1e-6


def test_resume_is_bit_exact(distill, tmp_path, monkeypatch, no_picture):
    options = [LORA, "packed=true", "batch_size=1", "save_every=1", "nf4={}"]
    whole = distill(tmp_path / "whole", *options)
    for step in (1, 3):
        with interrupted(monkeypatch, step):
            distill(tmp_path / "parts", *options)
    parts = distill(tmp_path / "parts", *options)
    assert (rows(parts), digests(parts)) == (rows(whole), digests(whole))


def rewritten(monkeypatch):
    """What `Writers.rewrite` gives, as it is asked."""
    found, rewrite = [], Writers.rewrite
    monkeypatch.setattr(Writers, "rewrite", lambda *args, **kwargs: found.append(rewrite(*args, **kwargs)) or found[-1])
    return found


def greedy(model, batch, tokenizer):
    """What transformers says after each row's question, with the question, as ids; and how long that is."""
    found = []
    for tokens, labels in zip(batch.tokens, batch.labels):
        question = tokens[: int((labels != -100).nonzero()[0]) + 1]
        limits = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": list(tokenizer.stop_ids)}
        limits["suppress_tokens"] = list(range(tokenizer.vocab_size, model.config.vocab_size)) or None
        whole = model.generate(question[None], attention_mask=torch.ones_like(question)[None], **limits)[0]
        found.append((len(question), whole))
    return found


@pytest.mark.parametrize(("author", "beta"), [("student", 0.3), ("teacher", 1.0), ("teacher", None)])
def test_other_answers_are_learned_as_transformers_and_trl_do(
    distill, base, teacher, tmp_path, no_picture, monkeypatch, author, beta
):
    """Greedy answers are transformers' own, of the student as it is then; the loss on them is TRL's, on the student's
    without what the data's likelihood weighs, or without a beta their likelihood: sequence-level distillation."""
    seen = rewritten(monkeypatch)
    options = [f"rewrite.{author}_share=1", "rewrite.sampling={temperature: 0.0, max_new_tokens: 9}", "temperature=2.0"]
    kd = f"divergence={{_component_: torchft.losses.distill.jensen_shannon, beta: {beta or 0.5}}}"
    weight = 0.0 if beta is None or author == "student" else 1.0
    run = distill(tmp_path / "run", *EPOCH, *options, kd, f"kd_weight={weight}", "epochs=3", "clip_grad_norm=0.5")
    student, other = hub_model(base), hub_model(teacher)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    tokenizer, lengths = tokenizers.load(base), set()
    for row, [batch] in zip(rows(run), seen, strict=True):
        want = greedy(student if author == "student" else other, batch, tokenizer)
        for (start, answer), tokens, labels in zip(want, batch.tokens, batch.labels, strict=True):
            assert torch.equal(tokens[: len(answer)], answer) and tokens[len(answer) :].eq(tokenizer.pad_id).all()
            assert labels[start - 1 : len(answer) - 1].equal(answer[start:])
            assert (labels != -100).sum() == len(answer) - start
            lengths.add(len(answer))
        mask = (torch.arange(batch.tokens.shape[1]) < torch.tensor(batch.lengths)[:, None]).long()
        words, known = (m(batch.tokens, attention_mask=mask).logits[..., :1216] for m in (student, other))
        if beta is None:
            loss = F.cross_entropy(words.flatten(0, 1), batch.labels.flatten())
        else:
            loss = GKDTrainer.generalized_jsd_loss(words, known.detach(), batch.labels, beta=beta, temperature=2.0)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert len(lengths) > 5


GKD = ["rewrite.student_share=0.5", "rewrite.teacher_share=0.2", "rewrite.sampling={max_new_tokens: 12}"]


def test_packed_answers_train_what_padded_ones_do(distill, tmp_path, no_picture):
    options = [*EPOCH, *GKD, REVERSE, "epochs=4"]
    padded, packed = (distill(tmp_path / p, *options, f"packed={p}") for p in ("false", "true"))
    assert (losses(packed) - losses(padded)).abs().max() < 1e-5
    assert largest_difference(weights(packed), weights(padded)) < 1e-6


def test_resume_with_answers_is_bit_exact(distill, data, tmp_path, monkeypatch, no_picture):
    held_out = f"dataset_eval={{_component_: torchft.data.datasets.chat, source: {data}, max_rows: 5}}"
    options = [LORA, *GKD, held_out, "eval_every=2", "packed=true", "batch_size=1", "save_every=1", "nf4={}"]
    whole = distill(tmp_path / "whole", *options)
    for step in (1, 3):
        with interrupted(monkeypatch, step):
            distill(tmp_path / "parts", *options)
    parts = distill(tmp_path / "parts", *options)
    assert (rows(parts), digests(parts)) == (rows(whole), digests(whole))
    ours, want = (read_rows(run / "metrics.jsonl") for run in (parts, whole))
    for name in ("eval_own_divergence", "response_tokens", "ended/length"):
        assert [row.get(name) for row in ours] == [row.get(name) for row in want]
        assert any(row.get(name) for row in want)
    assert any("response_tokens" not in row for row in want[1:])  # a step of the data's own answers


def test_answers_on_two_ranks_are_those_of_one_process(distill, kd_settings, tmp_path, no_picture):
    options = ["epochs=2", "gradient_accumulation_steps=1", SGD, CONSTANT, *GKD]
    alone = distill(tmp_path / "alone", *options, "batch_size=4")
    run_ranks(part, 2, kd_settings, tmp_path / "together", [*options, "batch_size=2"])
    assert (losses(tmp_path / "together") - losses(alone)).abs().max() < 1e-5
    assert largest_difference(weights(tmp_path / "together"), weights(alone)) < 1e-5
    ours, want = (read_rows(run / "metrics.jsonl") for run in (tmp_path / "together", alone))
    assert [row.get("response_tokens") for row in ours] == [row.get("response_tokens") for row in want]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_answers_on_a_gpu_are_those_of_a_cpu(distill, tmp_path, no_picture):
    """With compiled blocks, replayed micro-steps and decoding in CUDA graphs."""
    options = [*EPOCH, "rewrite.student_share=1", "rewrite.sampling={temperature: 0.0, max_new_tokens: 9}", "epochs=3"]
    cpu = distill(tmp_path / "cpu", *options)
    gpu = distill(tmp_path / "gpu", *options, "device=cuda", "compile=true")
    assert (losses(gpu) - losses(cpu)).abs().max() < 2e-2
    ours, want = ([row["response_tokens"] for row in read_rows(run / "metrics.jsonl")] for run in (gpu, cpu))
    assert ours == pytest.approx(want, rel=0.05)


def test_what_rewriting_refuses(distill, tmp_path):
    for options, message in (
        (["rewrite={student_share: 0.6, teacher_share: 0.6}"], "rewrite: student_share and teacher_share are of the"),
        (["rewrite.student_share=0.5", "teacher_top_k=8"], "rewrite: teacher_top_k knows no other answers"),
        (["rewrite.student_share=0.5", "parallel.tp=2"], "models in parts"),
    ):
        with pytest.raises(UserError, match=message):
            distill(tmp_path / "run", *options)


def part(settings, output_dir, overrides):
    train(load_recipe("knowledge_distillation"), settings, output_dir, *overrides)


TOP_K = ["packed=true", "teacher_top_k=8"]


@pytest.mark.parametrize("spread", [[], ["parallel.tp=2"], ["parallel.cp=2", "packed=true"], ["parallel.cp=2", *TOP_K]])
def test_two_ranks_are_one_process(distill, kd_settings, data, tmp_path, no_picture, spread):
    """Both models sharded; the last step of an epoch leaves the second rank without a row. And both models' heads,
    or the tokens of rows, spread."""
    options = ["epochs=2", "gradient_accumulation_steps=1", SGD, CONSTANT, "kd_weight=0.7", *spread[1:]]
    options += [f"dataset_eval={{_component_: torchft.data.datasets.chat, source: {data}}}"]
    alone = distill(tmp_path / "alone", *options, "batch_size=4")
    options += [*spread[:1], f"batch_size={4 if spread else 2}"]
    env = {"XDG_CACHE_HOME": str(tmp_path / "cache")}  # where no teacher has written yet
    run_ranks(part, 2, kd_settings, tmp_path / "together", options, env=env)
    assert len(losses(alone)) == (4 if "packed=true" in spread else 8)
    assert (losses(tmp_path / "together") - losses(alone)).abs().max() < 1e-5
    ours, want = (read_rows(tmp_path / r / "metrics.jsonl") for r in ("together", "alone"))
    for row, other in zip(ours, want, strict=True):
        for key in ("grad_norm", "eval_loss", "eval_divergence"):
            assert row.get(key, 0) == pytest.approx(other.get(key, 0), rel=1e-4)
    assert largest_difference(weights(tmp_path / "together"), weights(alone)) < 1e-5


def test_what_was_written_is_read_back(distill, data, tmp_path, monkeypatch, no_picture):
    """All but one of the words: the run of the teacher itself. Few: less of a divergence. And the teacher runs once."""
    monkeypatch.setattr(reference, "cache_folder", lambda: tmp_path / "cache")
    held_out = f"dataset_eval={{_component_: torchft.data.datasets.chat, source: {data}, max_rows: 5}}"
    options = ["epochs=1", "temperature=2.0", "kd_weight=0.7", held_out, "packed=true", "batch_size=1"]
    online, written, few = (
        distill(tmp_path / str(k), *options, *([f"teacher_top_k={k}"] if k else [])) for k in (None, 1215, 8)
    )
    assert (losses(written) - losses(online)).abs().max() < 1e-4
    assert largest_difference(weights(written), weights(online)) < 1e-4
    first = [read_rows(run / "metrics.jsonl")[0] for run in (online, written, few)]
    assert first[1]["eval_divergence"] == pytest.approx(first[0]["eval_divergence"], rel=1e-4)
    assert first[2]["eval_divergence"] < 0.9 * first[0]["eval_divergence"]
    assert first[2]["eval_loss"] == pytest.approx(first[0]["eval_loss"], rel=1e-5)

    def unasked(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(teacher_module, "top_k_logps", unasked)
    assert rows(distill(tmp_path / "again", *options, "teacher_top_k=8")) == rows(few)
    with pytest.raises(AssertionError, match="computed again"):
        distill(tmp_path / "other", *options, "teacher_top_k=9")
    with pytest.raises(UserError, match="teacher_top_k: 1216 of 1216 words leaves none to be the rest"):
        distill(tmp_path / "all", *options, "teacher_top_k=1216")


def test_the_first_blocks_as_a_student(base, distill, tmp_path, no_picture):
    run = distill(tmp_path / "run", "num_layers=1", "max_steps=1", "optimizer.lr=1e-30")
    model = hub_model(run / "export")
    assert model.config.num_hidden_layers == 1
    whole = load_file(base / "model.safetensors")
    for name, weight in load_file(run / "export" / "model.safetensors").items():
        assert torch.equal(weight, whole[name]), name
    with pytest.raises(UserError, match=r"num_layers: 3 of 2 blocks"):
        build_shallow(models.config_json(base), 3)


def test_a_teacher_of_other_tokens_is_refused(distill, teacher, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(teacher, folder)
    text = (folder / "tokenizer.json").read_text()
    tokenizer = json.loads(text)
    vocab = tokenizer["model"]["vocab"]
    one, other = list(vocab)[300:302]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"teacher_dir: its tokenizer (is another one: token \d+ is|cuts)"):
        distill(tmp_path / "run", f"teacher_dir={folder}")


def test_the_demo_in_short(tmp_path):
    """Half of the blocks come nearer to the teacher than by the same steps on the data alone, which lead away."""
    short = ["max_steps=16", "log_every=16", "dataset_eval.max_rows=40", "batch_size=2"]
    recipe, config, ends = load_recipe("knowledge_distillation"), shipped.find_config("demo/distill"), {}
    for weight in (1.0, 0.0):
        run = train(recipe, config, tmp_path / str(weight), *short, f"kd_weight={weight}")
        before, ends[weight] = read_rows(run / "metrics.jsonl")
    assert ends[1.0]["eval_divergence"] < 0.7 * before["eval_divergence"]
    assert ends[1.0]["eval_divergence"] < 0.5 * ends[0.0]["eval_divergence"]
    assert ends[0.0]["eval_loss"] < 0.5 * ends[1.0]["eval_loss"]


def test_the_demo_of_gkd_in_short(tmp_path):
    """Half of the steps learn from the student's answers, and those that it gives come nearer to the teacher's."""
    short = ["max_steps=16", "log_every=16", "dataset_eval.max_rows=40", "batch_size=2", "divergence.beta=0.0"]
    run = train(load_recipe("knowledge_distillation"), shipped.find_config("demo/gkd"), tmp_path / "run", *short)
    before, after = read_rows(run / "metrics.jsonl")
    assert after["eval_own_divergence"] < 0.6 * before["eval_own_divergence"] and 1 < after["response_tokens"] < 16


def test_golden_losses(distill, tmp_path, no_picture):
    """Of a run on torch 2.13 (CPU): a change that should not move numbers shows that it does not."""
    run = distill(tmp_path / "run", LORA, "epochs=1", "packed=true", "batch_size=1", CONSTANT, "kd_weight=0.5")
    assert losses(run).tolist() == pytest.approx(GOLDEN, abs=1e-4)
