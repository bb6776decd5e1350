"""The recipe that measures: against transformers, on rows whose answers are known."""

import json
import math
import sys

import pytest
import torch
from letters import turns, write_jsonl
from processes import run_ranks
from recipe_runs import hub_model, load_recipe

from torchft import shipped, tokenizers
from torchft.config_load import load
from torchft.errors import UserError
from torchft.generation.exact_match import ExactMatchConfig

BASE = shipped.config_path("demo/base")
ROWS = [
    ("What is 3 plus 4?", "7"),
    ('Repeat the word "red".', "red"),
    ('Spell the word "cat".', "c-a-t"),
    ("Hi?", "no"),
]


def measure(folder, *overrides, read=True):
    recipe = load_recipe("evaluate")
    given = [f"checkpoint_dir={BASE}", "device=cpu", "dtype=fp32", "seq_len=64", f"output={folder / 'found.json'}"]
    recipe.main(load(recipe.Config, recipe="evaluate", file=None, overrides=[*given, *overrides]))
    return json.loads((folder / "found.json").read_text()) if read else None


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
    assert found["multiple_choice"] == pytest.approx(2 / 3) and found["multiple_choice_rows"] == 3


def test_every_broken_question_is_named(tmp_path):
    row = {"prompt": "What is 3 plus 4?", "choices": ["9", "7", "1"], "answer": 1}
    without = {key: value for key, value in row.items() if key != "answer"}
    rows = [row, row | {"choices": "ab"}, row | {"choices": ["a"]}, row | {"answer": 5}, without, row | {"answer": "²"}]
    broken = write_jsonl(tmp_path / "b.jsonl", rows)
    with pytest.raises(UserError) as raised:
        measure(tmp_path, f"multiple_choice.source={broken}")
    assert [problem.partition(": ")[0] for problem in raised.value.problems] == [f"{broken}:{n}" for n in range(2, 7)]
    assert "has no 'answer'" in raised.value.problems[3]
    with pytest.raises(UserError, match="10 more rows have problems too"):
        measure(tmp_path, f"multiple_choice.source={write_jsonl(tmp_path / 'b.jsonl', [without] * 30)}")


def test_all_rows_are_asked_unless_told_otherwise(tmp_path, capsys):
    """250 of them: more than a training recipe asks by default."""
    data = write_jsonl(tmp_path / "d.jsonl", [turns("Hi?", "no")] * 249 + [turns(*ROWS[0])])
    options = [f"exact_match.source={data}", "exact_match.max_new_tokens=1", "exact_match.batch_size=250"]
    found = measure(tmp_path, *options)
    assert (found["exact_match_rows"], found["exact_match_cut_answers"]) == (250, 250)
    assert "all 250 rows; 250 answers cut at max_new_tokens 1" in panel(capsys)
    assert measure(tmp_path, *options, "exact_match.max_rows=3")["exact_match_rows"] == 3
    assert "the first 3 rows (max_rows)" in panel(capsys)
    assert ExactMatchConfig(source="").max_rows == 200


def panel(capsys):
    return " ".join(capsys.readouterr().out.replace("│", " ").split())


LONG = turns("Hi?", "red green " * 20)  # 200 letters


def test_long_rows_of_perplexity_are_cut_into_windows(tmp_path, capsys):
    """Every token is predicted once, as the windows' own log-probabilities add up to."""
    data = write_jsonl(tmp_path / "d.jsonl", [turns(*ROWS[0]), LONG])
    found = measure(tmp_path, f"perplexity.source={data}")
    model, tokenizer = hub_model(BASE), tokenizers.load(BASE)
    total, count = 0.0, 0
    for row in (turns(*ROWS[0]), LONG):
        rendered = tokenizer.render(row["messages"])
        for i in range(0, len(rendered.tokens) - 1, 63):
            tokens, train = rendered.tokens[i : i + 64], rendered.train[i : i + 64]
            with torch.no_grad():
                logps = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
            for at, (token, is_trained) in enumerate(zip(tokens[1:], train[1:])):
                total, count = total - logps[at, token].item() * is_trained, count + is_trained
    assert found["nll"] == pytest.approx(total / count, rel=1e-5)
    assert (found["perplexity_rows"], found["perplexity_split_rows"], found["perplexity_lost_tokens"]) == (2, 1, 0)
    assert f"2 of 2 rows, {count} tokens counted; 1 rows cut into pieces" in panel(capsys)


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (
            "perplexity.too_long=truncate",
            "2 of 2 rows, {n} tokens counted; 1 rows truncated to seq_len (50.0%); {lost}",
        ),
        ("perplexity.too_long=drop", "1 of 2 rows, {n} tokens counted; 1 rows dropped (50.0%): too long; {lost}"),
        ("perplexity._component_=torchft.data.datasets.chat", "1 rows truncated to seq_len (50.0%); {lost}"),
    ],
)
def test_what_perplexity_leaves_out_is_said(tmp_path, capsys, way, said):
    data = write_jsonl(tmp_path / "d.jsonl", [turns(*ROWS[0]), LONG])
    found = measure(tmp_path, f"perplexity.source={data}", way)
    tokenizer = tokenizers.load(BASE)
    short, long = (tokenizer.render(row["messages"]) for row in (turns(*ROWS[0]), LONG))
    kept = 0 if "drop" in way else 64
    lost, n = len(long.tokens) - kept, sum(short.train[1:]) + sum(long.train[1:kept])
    assert found["perplexity_lost_tokens"] == lost
    assert said.format(n=n, lost=f"{lost} tokens of too long rows left out") in panel(capsys)


def test_nothing_left_of_perplexity_says_why(tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [LONG])
    with pytest.raises(UserError, match="1 rows too long"):
        measure(tmp_path, f"perplexity.source={data}", "perplexity.too_long=drop")


def test_what_is_beyond_the_context_is_counted_and_named(tmp_path, capsys):
    """The demo model was trained on 256 tokens; questions of more are asked anyway."""
    data = write_jsonl(tmp_path / "d.jsonl", [turns(*ROWS[0]), turns("red " * 80, "red"), turns("red " * 90, "red")])
    choice = {"choices": ["9", "7"], "answer": 1}
    asked = write_jsonl(tmp_path / "c.jsonl", [{"prompt": q} | choice for q in ("Hi?", "Hi?", "red " * 80)])
    options = [f"exact_match.source={data}", "exact_match.max_new_tokens=12", f"multiple_choice.source={asked}"]
    found = measure(tmp_path, *options, f"perplexity.source={data}", "seq_len=512")
    names = ("exact_match", "multiple_choice", "perplexity")
    assert [found[f"{name}_beyond_context"] for name in names] == [2, 1, 2]
    assert [found[f"{name}_rows"] for name in names] == [3, 3, 3]
    said = panel(capsys).replace(" ", "")
    for count, where in ((2, "d.jsonl:2"), (1, "c.jsonl:3")):
        assert f"{count}longerthanthemodel'scontextof256tokens,measuredanyway(thefirst:" in said and where in said


def test_an_answer_is_needed(tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [turns(*ROWS[0]), {"prompt": "Hi?"}, {"prompt": "Ho?"}])
    with pytest.raises(UserError) as raised:
        measure(tmp_path, f"exact_match.source={data}")
    rule = "the last two messages must be a question and its answer, text"
    assert raised.value.problems == (f"{data}:2: {rule}", f"{data}:3: {rule}")


def test_the_output_is_looked_at_before_the_work(tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", [turns(*ROWS[0])])
    folder = tmp_path / "new" / "folder"
    folder.parent.mkdir()
    measure(tmp_path, f"exact_match.source={data}", f"output={folder / 'found.json'}", read=False)
    assert (folder / "found.json").exists()
    for wrong, why in ((folder, "is a folder"), (tmp_path / "d.jsonl" / "found.json", "cannot be written")):
        with pytest.raises(UserError, match=why):
            measure(tmp_path, f"exact_match.source={data}", f"output={wrong}")


def test_tasks_without_the_harness_are_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "torchft.generation.lm_eval_model", raising=False)
    data = write_jsonl(tmp_path / "d.jsonl", [turns(*ROWS[0])])
    with pytest.raises(UserError, match=r"they need lm_eval: pip install 'torchft-recipes\[eval\]'"):
        measure(tmp_path, f"exact_match.source={data}", "tasks=[hellaswag]")


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
