"""Classes and rerankers from end to end, of encoders and a decoder: against transformers in training and after export,
packed, resumed, on ranks."""

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from letters import write_jsonl
from processes import run_ranks
from recipe_runs import (
    WORDS,
    digests,
    interrupted,
    largest_difference,
    load_recipe,
    losses,
    rows,
    train,
    weights,
    write_settings,
)
from safetensors.torch import load_file
from tiny import random_
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from torchft import shipped
from torchft.cli.main import main as tune
from torchft.errors import UserError
from torchft.training.metrics import read_rows

SGD = "optimizer={_component_: torch.optim.SGD, lr: 0.02}"
CONSTANT = "lr_schedule={_component_: torchft.training.schedules.constant}"
EPOCH = ["batch_size=13", "gradient_accumulation_steps=1", SGD, CONSTANT]
LORA = "lora={rank: 4, alpha: 24}"
LABELS = ["colours", "numbers", "both"]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GOLDEN = [1.1989, 1.0927, 0.9703]
LOSS = "loss={{_component_: torchft.losses.reward.{}}}"


def texts(count):
    """Words of colours, of numbers, or both; as classes, as grades of pairs, and as candidates."""
    colours, numbers = WORDS[:3], WORDS[3:8]
    found = []
    for i in range(count):
        kind = LABELS[i % 3]
        of = [(colours, numbers, colours)[i % 3][(i + j) % 3] for j in range(2 + i % 4)]
        of += [numbers[i % 5]] * (kind == "both")
        other = colours[i % 3] if kind != "numbers" else numbers[i % 5]
        wrong = [numbers[(i + j) % 5] if kind != "numbers" else colours[(i + j) % 3] for j in range(2)]
        found.append(
            {"text": " ".join(of), "label": kind, "query": " ".join(of), "document": other, "grade": i % 2,
             "several": [kind] * (i % 2), "positive": other, "negative": [f"{w} day" for w in wrong]}
        )  # fmt: skip
    return found


ROWS = texts(13)


def tokenizer_of(folder):
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys(w.lower() for w in WORDS)]
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n")
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return len(vocab)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """``encoders[kind]``: BERT with a pooler, and a ModernBERT with the head of its pretraining."""
    found = {}
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    for kind, cls, more in (
        ("bert", transformers.BertModel, NO_DROPOUT),
        ("modernbert", transformers.ModernBertForMaskedLM,
         {"local_attention": 8, "cls_token_id": 2, "sep_token_id": 3, "eos_token_id": 3, "bos_token_id": 2}),
    ):  # fmt: skip
        found[kind] = tmp_path_factory.mktemp(kind)
        size = tokenizer_of(found[kind])
        config = cls.config_class(vocab_size=size, max_position_embeddings=64, pad_token_id=0, **sizes, **more)
        model = random_(cls(config), std=0.15)
        for name, p in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                p.data += 1.0
        model.save_pretrained(found[kind])
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """``data[kind] -> overrides``: data and loss."""
    source = write_jsonl(tmp_path_factory.mktemp("texts") / "texts.jsonl", ROWS)
    component = f"source: {source}, _component_: torchft.data.labelled."
    labels = f"labels: [{', '.join(LABELS)}]"
    return {
        "classes": [f"dataset={{{component}classes, {labels}}}", LOSS.format("cross_entropy")],
        "pairs of texts": [
            f"dataset={{{component}classes, {labels}, text_pair: document}}", LOSS.format("cross_entropy"),
        ],
        "several": [
            f"dataset={{{component}classes, {labels}, label: several, several: true}}",
            LOSS.format("binary_cross_entropy"),
        ],
        "graded": [f"dataset={{{component}graded, scores: [grade]}}", LOSS.format("binary_cross_entropy")],
        "candidates": [f"dataset={{{component}candidates, num_negatives: 2}}", LOSS.format("listwise")],
        "two": [f"dataset={{{component}candidates}}", LOSS.format("bradley_terry")],
        "margin": [f"dataset={{{component}candidates}}", LOSS.format("margin")],
    }  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory, encoders):
    folder = tmp_path_factory.mktemp("settings")
    path = write_settings(folder, encoders["bert"], folder / "none")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "dataset"}))
    return path


@pytest.fixture(scope="module")
def run(settings):
    recipe = load_recipe("reward_modeling")
    recipe.draw_loss = lambda *args, **kwargs: None
    return partial(train, recipe, settings)


def hub_loss(model, tokenizer, kind):
    """transformers' scores with the closed form of each loss, a mean over the 13 rows."""

    def scores(one, other=None):
        pair = [[r[one] for r in ROWS]] if other is None else [[r[one] for r in ROWS], [other(r) for r in ROWS]]
        return model(**tokenizer(*pair, padding=True, return_tensors="pt")).logits

    classes = torch.tensor([LABELS.index(r["label"]) for r in ROWS])
    match kind:
        case "classes" | "pairs of texts":
            found = scores("text", (lambda r: r["document"]) if kind == "pairs of texts" else None)
            return F.cross_entropy(found, classes)
        case "several":
            hot = F.one_hot(classes, 3) * torch.tensor([[i % 2] for i in range(13)])
            return F.binary_cross_entropy_with_logits(scores("text"), hot.float())
        case "graded":
            grades = torch.tensor([[i % 2] for i in range(13)]).float()
            return F.binary_cross_entropy_with_logits(scores("query", lambda r: r["document"]), grades)
    right = scores("query", lambda r: r["positive"])
    wrong = [scores("query", lambda r, i=i: r["negative"][i]) for i in range(2)]
    match kind:
        case "candidates":
            return F.cross_entropy(torch.cat((right, *wrong), dim=1), torch.zeros(13, dtype=torch.long))
        case "two":
            return F.softplus(wrong[0] - right).mean()
        case "margin":
            return F.margin_ranking_loss(right, wrong[0], torch.ones_like(right), margin=1.0)


@pytest.mark.parametrize("kind", ["classes", "pairs of texts", "several", "graded", "candidates", "two", "margin"])
@pytest.mark.parametrize("base", ["bert", "modernbert"])
def test_training_is_transformers(run, encoders, data, tmp_path, base, kind):
    """Step by step from the same random head, token types and padding as its tokenizer has them; and what is left."""
    common = [f"checkpoint_dir={encoders[base]}", *data[kind], *EPOCH]
    first = run(tmp_path / "first", *common, "max_steps=1", "optimizer.lr=1e-30")
    model = AutoModelForSequenceClassification.from_pretrained(first / "export", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(first / "export")
    out = run(tmp_path / "run", *common, "epochs=3", "clip_grad_norm=0.5")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for row in rows(out):
        loss = hub_loss(model, tokenizer, kind)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
    again, info = AutoModelForSequenceClassification.from_pretrained(
        out / "export", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert largest_difference(dict(again.named_parameters()), dict(model.named_parameters())) < 1e-4
    wants_names = kind in ("classes", "pairs of texts", "several")
    assert again.config.id2label == (dict(enumerate(LABELS)) if wants_names else {0: "score_0"})


def test_a_decoder_reads_its_last_token(run, base, data, tmp_path):
    options = [f"checkpoint_dir={base}", *data["classes"], "epochs=8", "optimizer.lr=3e-3", "packed=true"]
    out = run(tmp_path / "run", *options, data["classes"][0].replace("dataset=", "dataset_eval="))
    model = AutoModelForSequenceClassification.from_pretrained(out / "export", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "export")
    with torch.no_grad():
        scores = torch.cat([model(torch.tensor([tokenizer(r["text"])["input_ids"]])).logits for r in ROWS])
    classes = torch.tensor([LABELS.index(r["label"]) for r in ROWS])
    last = read_rows(out / "metrics.jsonl")[-1]
    assert last["eval_loss"] == pytest.approx(F.cross_entropy(scores, classes).item(), rel=1e-4)
    assert last["eval_accuracy"] == (scores.argmax(1) == classes).sum() / 13 > 0.9


@pytest.mark.parametrize("options", [[], [LORA]], ids=["full", "lora"])
def test_it_learns_and_begins_again_from_its_export(run, data, encoders, tmp_path, options):
    """A reranker: the right candidate comes first; what was exported is where another run begins."""
    held_out = data["candidates"][0].replace("dataset=", "dataset_eval=")
    common = [f"checkpoint_dir={encoders['bert']}", *data["candidates"], held_out, *options]
    out = run(tmp_path / "run", *common, "epochs=12", "packed=true")
    found = [row for row in read_rows(out / "metrics.jsonl") if "eval_mrr" in row]
    assert found[-1]["eval_accuracy"] > 0.9 > found[0]["eval_accuracy"] and found[-1]["eval_mrr"] > 0.95
    again = run(tmp_path / "again", *common[1:], f"checkpoint_dir={out / 'export'}", "max_steps=1")
    first = read_rows(again / "metrics.jsonl")[0]
    assert first["eval_loss"] == pytest.approx(found[-1]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("kind", ["pairs of texts", "candidates", "two"])
def test_packed_rows_train_what_padded_ones_do(run, data, tmp_path, kind):
    padded, packed = (run(tmp_path / p, *data[kind], *EPOCH, f"packed={p}", "epochs=2") for p in ("false", "true"))
    assert (losses(packed) - losses(padded)).abs().max() < 1e-5 and losses(packed)[1] < losses(packed)[0]
    assert largest_difference(weights(packed), weights(padded)) < 1e-5


def test_resume_is_bit_exact(run, data, tmp_path, monkeypatch):
    options = [*data["pairs of texts"], LORA, "save_every=1", "optimizer.lr=1e-3"]
    whole = run(tmp_path / "whole", *options)
    for step in (1, 3, 4):
        with interrupted(monkeypatch, step):
            run(tmp_path / "parts", *options)
    parts = run(tmp_path / "parts", *options)
    assert (rows(parts), digests(parts)) == (rows(whole), digests(whole))


def part(settings, output_dir, overrides):
    train(load_recipe("reward_modeling"), settings, output_dir, *overrides)


@pytest.mark.parametrize("kind", ["pairs of texts", "candidates"])
def test_two_ranks_are_one_process(run, settings, data, tmp_path, kind):
    options = [*data[kind], "epochs=2", "gradient_accumulation_steps=1", SGD, CONSTANT]
    alone = run(tmp_path / "alone", *options, "batch_size=4")
    run_ranks(part, 2, settings, tmp_path / "together", [*options, "batch_size=2"])
    assert (losses(tmp_path / "together") - losses(alone)).abs().max() < 1e-4 and len(losses(alone)) == 8
    exports = [load_file(run / "export" / "model.safetensors") for run in (tmp_path / "together", alone)]
    assert largest_difference(*exports) < 1e-3


def test_sentence_transformers_ranks_as_it_was_trained(run, data, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    out = run(tmp_path / "run", *data["graded"], "epochs=2")
    ranker = st.CrossEncoder(str(out / "export"), device="cpu", activation_fn=torch.nn.Identity())
    pairs = [(r["query"], r["document"]) for r in ROWS]
    model = AutoModelForSequenceClassification.from_pretrained(out / "export", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "export")
    with torch.no_grad():
        batch = tokenizer([q for q, _ in pairs], [d for _, d in pairs], padding=True, return_tensors="pt")
        want = model(**batch).logits[:, 0]
    assert (torch.tensor(ranker.predict(pairs)) - want).abs().max() < 1e-5


def test_mistakes_are_named(run, encoders, data, settings, tmp_path, capsys):
    bad = write_jsonl(tmp_path / "bad.jsonl", [ROWS[0], ROWS[1] | {"label": "number"}])
    dataset = data["classes"][0].replace("texts.jsonl", "bad.jsonl").partition("source: ")
    dataset = f"{dataset[0]}source: {bad}, {dataset[2].partition(', ')[2]}"
    options = [f"output_dir={tmp_path / 'run'}", dataset, data["classes"][1]]
    with pytest.raises(SystemExit) as e:
        tune(["run", "reward_modeling", "--config", str(settings), *options])
    error = " ".join(capsys.readouterr().err.split())
    assert e.value.code == 2 and "Traceback" not in error
    assert "bad.jsonl:2: 'label' is 'number', which is none of the labels colours, numbers, both" in error
    with pytest.raises(
        UserError, match=r"cross_entropy needs data of another kind: .*labelled.classes, with one label"
    ):
        run(tmp_path / "two", data["several"][0], data["classes"][1])
    with pytest.raises(UserError, match=r"listwise needs data of another kind: torchft.data.labelled.candidates"):
        run(tmp_path / "three", data["classes"][0], data["candidates"][1])
    long = write_jsonl(tmp_path / "long.jsonl", [ROWS[0], ROWS[1] | {"text": "red " * 68}])
    with pytest.raises(UserError, match="a text has 70 tokens, but the model has 64 positions"):
        run(tmp_path / "four", dataset.replace(str(bad), str(long)), data["classes"][1])


@pytest.mark.parametrize(
    ("name", "steps", "right"), [("classify", ["max_steps=8"], 0.55), ("rerank", ["max_steps=8", "batch_size=4"], 0.5)]
)
def test_the_demos_in_short(tmp_path, name, steps, right):
    """A few steps on the small model, on held-out words."""
    recipe = load_recipe("reward_modeling")
    recipe.draw_loss = lambda *args, **kwargs: None
    short = [*steps, "eval_every=8", "dataset_eval.max_rows=40"]
    out = train(recipe, shipped.find_config(f"demo/{name}"), tmp_path / "run", *short)
    before, after = (row for row in read_rows(out / "metrics.jsonl") if "eval_accuracy" in row)
    assert before["eval_accuracy"] < 0.4 and after["eval_accuracy"] > max(right, before["eval_accuracy"] + 0.2)


def test_golden_losses(run, data, tmp_path):
    """Of a run on torch 2.13 (CPU): a change that should not move numbers shows that it does not."""
    options = [*data["pairs of texts"], LORA, "epochs=2", "seq_len=16", "packed=true", CONSTANT, "optimizer.lr=1e-3"]
    assert losses(run(tmp_path / "run", *options)).tolist()[:3] == pytest.approx(GOLDEN, abs=1e-4)
