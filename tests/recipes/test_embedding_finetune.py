"""Embedding models from end to end: against transformers, packed, cached, resumed, on ranks, and as folders of
sentence-transformers."""

import json
import random
import shutil
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
from transformers import AutoModel, AutoTokenizer

from torchft import shipped
from torchft.errors import UserError
from torchft.sentence_transformers import Embedder, read_embedder, save_modules
from torchft.training.metrics import read_rows

SGD = "optimizer={_component_: torch.optim.SGD, lr: 0.02}"
CONSTANT = "lr_schedule={_component_: torchft.training.schedules.constant}"
EPOCH = ["batch_size=13", "gradient_accumulation_steps=1", SGD, CONSTANT]
LORA = "lora={rank: 4, alpha: 24}"
GOLDEN = [0.8557, 0.7480, 0.3839]


def texts(count, seed=0):
    """Queries, the same words the other way round, and words of another row."""
    rng = random.Random(seed)
    words = [rng.sample(WORDS, 2 + i % 4) for i in range(count)]
    return [
        {
            "query": " ".join(w),
            "positive": " ".join(reversed(w)),
            "negative": [" ".join(words[i - 1][:1] + w[1:])],
        }
        for i, w in enumerate(words)
    ]


ROWS = texts(13)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, base):
    """A small ModernBERT with the tokenizer of ``base``."""
    folder = tmp_path_factory.mktemp("encoder")
    for file in base.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    config = transformers.ModernBertConfig(
        vocab_size=1216, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        local_attention=8, pad_token_id=None, bos_token_id=0, eos_token_id=1, cls_token_id=0, sep_token_id=1,
        initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.ModernBertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory, base):
    folder = tmp_path_factory.mktemp("texts")
    path = write_settings(folder, base, folder / "none")
    source = write_jsonl(folder / "texts.jsonl", ROWS)
    dataset = {"source": source, "num_negatives": 1}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dataset": dataset, "temperature": 0.1}))
    return path


@pytest.fixture(scope="module")
def run(settings):
    recipe = load_recipe("embedding_finetune")
    recipe.draw_loss = lambda *args, **kwargs: None
    return partial(train, recipe, settings)


def hub_embeddings(model, folder, sentences, pooling):
    """transformers' hidden states pooled as the name says, [n, d]."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for sentence in sentences:
        ids = torch.tensor([tokenizer(sentence)["input_ids"]])
        hidden = model(input_ids=ids).last_hidden_state[0]
        found.append({"last": hidden[-1], "cls": hidden[0], "mean": hidden.mean(0)}[pooling])
    return torch.stack(found)


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_training_is_transformers(run, base, encoder, tmp_path, kind, pooling):
    """Step by step: a cross-entropy over cosines of transformers' hidden states; and what is exported."""
    folder = base if kind == "decoder" else encoder
    out = run(
        tmp_path / "run", f"checkpoint_dir={folder}", f"pooling={pooling}", *EPOCH, "epochs=3", "clip_grad_norm=0.5"
    )
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    model.train(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    columns = [[r["query"] for r in ROWS], [r["positive"] for r in ROWS], [r["negative"][0] for r in ROWS]]
    for row in rows(out):
        q, p, n = (F.normalize(hub_embeddings(model, folder, c, pooling), dim=-1) for c in columns)
        loss = F.cross_entropy(q @ torch.cat((p, n)).T / 0.1, torch.arange(13))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-4)
        # All but zero for a decoder's first token, which is alike in all texts.
        assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-3, abs=2e-5)
    again = AutoModel.from_pretrained(out / "export", dtype=torch.float32)
    assert largest_difference(dict(again.named_parameters()), dict(model.named_parameters())) < 1e-4
    assert read_embedder(out / "export").pooling == pooling


def test_it_learns_to_find(run, encoder, tmp_path):
    source = write_jsonl(tmp_path / "held_out.jsonl", ROWS)
    out = run(
        tmp_path / "run", f"checkpoint_dir={encoder}", "epochs=12", "packed=true", f"dataset_eval={{source: {source}}}",
        "symmetric=true", "matryoshka_dims=[32, 128]",
    )  # fmt: skip
    found = [row for row in read_rows(out / "metrics.jsonl") if "eval_mrr" in row]
    assert found[0]["step"] == 0 and found[-1]["eval_recall_at_1"] > found[0]["eval_recall_at_1"]
    assert found[-1]["eval_recall_at_1"] > 0.9 and found[-1]["eval_loss"] < found[0]["eval_loss"]


@pytest.mark.parametrize("options", [[], [LORA]], ids=["full", "lora"])
def test_many_small_batches_are_one_large_one(run, encoder, tmp_path, options):
    """GradCache: all rows of a step are negatives of each other; packed rows too."""
    common = [f"checkpoint_dir={encoder}", SGD, CONSTANT, "epochs=2", *options]
    one = run(tmp_path / "one", *common, "batch_size=13", "gradient_accumulation_steps=1")
    small = run(tmp_path / "small", *common, "batch_size=2", "gradient_accumulation_steps=7")
    packed = run(tmp_path / "packed", *common, "batch_size=1", "gradient_accumulation_steps=13", "packed=true")
    for other in (small, packed):
        assert (losses(other) - losses(one)).abs().max() < 1e-5
        assert largest_difference(weights(other), weights(one)) < 1e-5
    assert losses(one)[1] < losses(one)[0]


def test_resume_is_bit_exact(run, encoder, tmp_path, monkeypatch):
    options = [f"checkpoint_dir={encoder}", "lora={rank: 4, dropout: 0.1}", "save_every=1"]
    whole = run(tmp_path / "whole", *options)
    for step in (1, 3, 4):
        with interrupted(monkeypatch, step):
            run(tmp_path / "parts", *options)
    parts = run(tmp_path / "parts", *options)
    assert (rows(parts), digests(parts)) == (rows(whole), digests(whole))


def part(settings, output_dir, overrides):
    train(load_recipe("embedding_finetune"), settings, output_dir, *overrides)


@pytest.mark.parametrize(
    ("size", "symmetric", "spread"),
    [
        (2, "true", []),
        (2, "false", []),
        (2, "true", ["parallel.tp=2"]),
        (2, "false", ["parallel.cp=2", "packed=true", "pooling=mean"]),
        (4, "true", ["parallel.tp=2", LORA]),
    ],
)
def test_ranks_are_one_process(run, settings, base, encoder, tmp_path, size, symmetric, spread):
    """13 rows in steps of 8: the last one has 3 rows of one rank and 2 of the other."""
    options = [f"checkpoint_dir={base if spread else encoder}", "epochs=2", "optimizer.lr=1e-3", CONSTANT, *spread[1:]]
    options += [f"symmetric={symmetric}", "clip_grad_norm=0.5", f"dataset_eval={{source: {tmp_path / 'eval.jsonl'}}}"]
    write_jsonl(tmp_path / "eval.jsonl", texts(5, seed=1))
    alone = run(tmp_path / "alone", *options, "batch_size=8", "gradient_accumulation_steps=1")
    own = 4 * (2 if spread else 1) // size  # rows of a rank; two share them
    run_ranks(part, size, settings, tmp_path / "together", [*options, *spread[:1], f"batch_size={own}"])
    for row, want in zip(rows(tmp_path / "together"), rows(alone), strict=True):
        assert row.pop("grad_norm", 0.0) == pytest.approx(want.pop("grad_norm", 0.0), rel=1e-5)
        row.pop("tokens", None), want.pop("tokens", None)  # ranks pad to their own longest row
        assert row == pytest.approx(want, rel=1e-4, abs=1e-5)
    exports = [load_file(folder / "export" / "model.safetensors") for folder in (tmp_path / "together", alone)]
    assert largest_difference(*exports) < 1e-3


def test_the_same_text_is_no_negative(run, settings, encoder, tmp_path):
    """Rows whose documents are the same, on two ranks and in one process, against transformers' hidden states."""
    data = [dict(row) for row in ROWS[:8]]
    data[5]["positive"] = data[0]["positive"]
    data[6]["query"] = data[1]["query"]
    source = write_jsonl(tmp_path / "same.jsonl", data)
    options = [f"checkpoint_dir={encoder}", f"dataset={{source: {source}}}", "pooling=mean", SGD, CONSTANT, "epochs=2"]
    alone = run(tmp_path / "alone", *options, "batch_size=8", "gradient_accumulation_steps=1")
    run_ranks(part, 2, settings, tmp_path / "together", [*options, "batch_size=2", "gradient_accumulation_steps=2"])
    assert (losses(tmp_path / "together") - losses(alone)).abs().max() < 1e-5
    model = AutoModel.from_pretrained(encoder, dtype=torch.float32).eval()
    with torch.no_grad():
        q, p = (hub_embeddings(model, encoder, [row[c] for row in data], "mean") for c in ("query", "positive"))
    scores = F.normalize(q, dim=-1) @ F.normalize(p, dim=-1).T / 0.1
    for i, j in ((0, 5), (1, 6)):
        scores[i, j] = scores[j, i] = -torch.inf
    assert rows(alone)[0]["loss"] == pytest.approx(F.cross_entropy(scores, torch.arange(8)).item(), rel=1e-4)


def test_sentence_transformers_reads_the_export(run, base, encoder, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    for folder, pooling in ((base, "last"), (encoder, "mean")):
        out = run(
            tmp_path / pooling, f"checkpoint_dir={folder}", "epochs=1", f"pooling={pooling}",
            "dataset.query_prompt='ask: '",
        )  # fmt: skip
        theirs = st.SentenceTransformer(str(out / "export"), device="cpu")
        sentences = [row["query"] for row in ROWS]
        model = AutoModel.from_pretrained(out / "export", dtype=torch.float32)
        with torch.no_grad():
            want = hub_embeddings(model, out / "export", [f"ask: {s}" for s in sentences], pooling)
        got = torch.tensor(theirs.encode(sentences, prompt_name="query", batch_size=5))
        assert (got - F.normalize(want, dim=-1)).abs().max() < 1e-5


def test_a_sentence_transformers_folder_is_gone_on_with(run, encoder, tmp_path):
    """Its prompts, length, pooling and similarity are trained, and written again."""
    folder = tmp_path / "folder"
    shutil.copytree(encoder, folder)
    was = Embedder(
        pooling="cls", similarity="dot", is_normalized=False, max_seq_len=6,
        prompts={"query": "hello ", "document": "world ", "other": "day "}, default_prompt="other",
    )  # fmt: skip
    save_modules(folder, was, dim=128, pad_token="<|end_of_text|>")
    common = ["temperature=50", SGD, CONSTANT, "epochs=1"]
    told = run(tmp_path / "told", f"checkpoint_dir={folder}", *common)
    assert read_embedder(told / "export") == was
    said = ["dataset.query_prompt='hello '", "dataset.document_prompt='world '", "dataset.text_len=6"]
    asked = run(tmp_path / "asked", f"checkpoint_dir={encoder}", *common, *said, "pooling=cls", "similarity=dot")
    assert losses(told).tolist() == losses(asked).tolist()
    angle = run(tmp_path / "angle", f"checkpoint_dir={folder}", *common, "similarity=cosine", "dataset.text_len=9")
    assert (losses(angle) - losses(told)).abs().max() > 1e-3
    left = read_embedder(angle / "export")
    assert (left.similarity, left.max_seq_len, left.prompts) == ("cosine", 9, was.prompts)


def test_bad_choices_are_named(run, encoder, tmp_path):
    with pytest.raises(UserError, match="matryoshka_dims: 256 is no width of an embedding of 128"):
        run(tmp_path / "run", f"checkpoint_dir={encoder}", "matryoshka_dims=[64, 256]")
    (tmp_path / "folder").mkdir()
    modules = [{"type": "sentence_transformers.models.Transformer", "path": ""}, {"type": "a.Dense", "path": "2_Dense"}]
    (tmp_path / "folder" / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="has Dense, which torchft does not have"):
        read_embedder(tmp_path / "folder")


def test_golden_losses(run, encoder, tmp_path):
    """Of a run on torch 2.13 (CPU): a change that should not move numbers shows that it does not."""
    options = [f"checkpoint_dir={encoder}", LORA, "epochs=1", CONSTANT, "optimizer.lr=1e-3"]
    assert losses(run(tmp_path / "run", *options)).tolist()[:3] == pytest.approx(GOLDEN, abs=1e-4)


def test_the_demo(tmp_path):
    """In short: a few steps on the small model already find more of the held-out answers."""
    short = ["batch_size=4", "gradient_accumulation_steps=1", "max_steps=8", "dataset_eval.max_rows=64", "eval_every=8"]
    recipe = load_recipe("embedding_finetune")
    recipe.draw_loss = lambda *args, **kwargs: None
    out = train(recipe, shipped.find_config("demo/embedding"), tmp_path / "run", *short)
    before, after = (row for row in read_rows(out / "metrics.jsonl") if "eval_mrr" in row)
    assert (
        after["eval_recall_at_1"] > before["eval_recall_at_1"] + 0.15 and after["eval_mrr"] > before["eval_mrr"] + 0.15
    )


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_base_in_four_bits(run, base, encoder, tmp_path, kind):
    folder = base if kind == "decoder" else encoder
    options = [f"checkpoint_dir={folder}", "nf4={}", LORA, "epochs=6", "packed=true"]
    out = run(tmp_path / "run", *options)
    assert losses(out)[-4:].mean() < 0.7 * losses(out)[:4].mean()
    assert all("lora_" in name for name in weights(out))
