"""The recipe that measures: against transformers, on rows whose answers are known."""

import json
import math

import pytest
import torch
from letters import turns, write_jsonl
from processes import run_ranks
from recipe_runs import hub_model, load_recipe

from torchft import shipped, tokenizers
from torchft.config_load import load
from torchft.errors import UserError

BASE = shipped.config_path("demo/base")
ROWS = [
    ("What is 3 plus 4?", "7"),
    ('Repeat the word "red".', "red"),
    ('Spell the word "cat".', "c-a-t"),
    ("Hi?", "no"),
]


def measure(folder, *overrides):
    recipe = load_recipe("evaluate")
    given = [f"checkpoint_dir={BASE}", "device=cpu", "dtype=fp32", "seq_len=64", f"output={folder / 'found.json'}"]
    recipe.main(load(recipe.Config, recipe="evaluate", file=None, overrides=[*given, *overrides]))
    return json.loads((folder / "found.json").read_text())


def test_perplexity_is_transformers(tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [turns(*row) for row in ROWS])
    found = measure(tmp_path, f"perplexity.source={data}")
    model, tokenizer = hub_model(BASE), tokenizers.load(BASE)
    total, count = 0.0, 0
    for question, answer in ROWS:
        rendered = tokenizer.render(turns(question, answer)["messages"])
        with torch.no_grad():
            logps = model(torch.tensor([rendered.tokens])).logits[0, :-1].log_softmax(-1)
        for i, (token, train) in enumerate(zip(rendered.tokens[1:], rendered.train[1:])):
            total, count = total - logps[i, token].item() * train, count + train
    assert found["nll"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_exact_match(tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [turns(*row) for row in ROWS])
    assert measure(tmp_path, f"exact_match.source={data}")["exact_match"] == 0.75


def test_multiple_choice(tmp_path):
    rows = [
        {"prompt": "What is 3 plus 4?", "choices": ["9", "7", "1"], "answer": 1},
        {"prompt": 'Repeat the word "red".', "choices": ["dog", "red"], "answer": "red"},
        {"prompt": 'Spell the word "cat".', "choices": ["c-a-t", "dog"], "answer": "B"},
    ]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    found = measure(tmp_path, f"multiple_choice.source={data}", "multiple_choice.batch_size=3")
    assert found["multiple_choice"] == pytest.approx(2 / 3)
    for wrong in ({"choices": "ab"}, {"choices": ["a"]}, {"answer": 5}):
        broken = write_jsonl(tmp_path / "b.jsonl", [rows[0] | wrong])
        with pytest.raises(UserError, match=r"b\.jsonl:1"):
            measure(tmp_path, f"multiple_choice.source={broken}")


def test_nothing_to_measure(tmp_path):
    with pytest.raises(UserError, match="nothing is measured"):
        measure(tmp_path)


def measure_shared(folder, overrides):
    measure(folder, *overrides)


def refused_tasks(folder):
    with pytest.raises(UserError, match="the harness runs in one process"):
        measure(folder, "tasks=[hellaswag]")


@pytest.mark.parametrize("way", [[], ["parallel.tp=2"]])
def test_two_ranks_are_one_process(tmp_path, way):
    """Rows that do not divide among ranks: the same perplexity, exact match and multiple choice."""
    data = write_jsonl(tmp_path / "d.jsonl", [turns(*row) for row in [*ROWS, ROWS[0]]])
    asked = [{"prompt": q, "choices": ["9", "7", "red"], "answer": answer} for (q, _), answer in zip(ROWS, (1, 2, 0))]
    choices = write_jsonl(tmp_path / "c.jsonl", asked)
    options = [f"perplexity.source={data}", f"exact_match.source={data}", f"multiple_choice.source={choices}"]
    alone = measure(tmp_path, *options, "batch_size=2")
    (tmp_path / "ranks").mkdir()
    run_ranks(measure_shared, 2, tmp_path / "ranks", [*options, "batch_size=2", *way])
    together = json.loads((tmp_path / "ranks" / "found.json").read_text())
    assert together.pop("checkpoint_dir") == alone.pop("checkpoint_dir")
    assert together == pytest.approx(alone, rel=1e-6)
    run_ranks(refused_tasks, 2, tmp_path)
    assert together["exact_match"] == 0.8 and 0 < together["multiple_choice"] < 1
