"""The recipe that answers files: continued, divided over ranks, with its options."""

import json
import math

import pytest
from letters import write_jsonl
from processes import TWO_GPUS, run_ranks
from recipe_runs import load_recipe

from torchft import shipped
from torchft.config_load import load
from torchft.errors import UserError

BASE = shipped.config_path("demo/base")
SMALL = ["device=cpu", "dtype=fp32", "seq_len=64", "sampling.max_new_tokens=12", "num_slots=4", "save_every=3"]
QUESTIONS = [f'Repeat the word "{w}".' for w in ("one", "two", "abc", "red", "blue", "six", "ten")]


def part(folder, overrides):
    prompts = write_jsonl(folder / "q.jsonl", [{"prompt": q, "answer": q[17:-2]} for q in QUESTIONS])
    recipe = load_recipe("generate")
    given = [f"checkpoint_dir={BASE}", f"prompts.source={prompts}", f"output={folder / 'a.jsonl'}", *SMALL]
    recipe.main(load(recipe.Config, recipe="generate", file=None, overrides=[*given, *overrides]))


def generate(folder, *overrides):
    part(folder, overrides)
    return [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]


def test_answers_in_order(tmp_path):
    found = generate(tmp_path, "sampling.temperature=0", "logps=true")
    assert [row["messages"][0]["content"] for row in found] == QUESTIONS
    right = sum(row["messages"][-1]["content"] == row["answer"] for row in found)
    assert right >= 5 and {row["finish"] for row in found} == {"stop"}
    assert all(len(row["tokens"]) == len(row["logps"]) and max(row["logps"]) <= 0 for row in found)


def test_an_ended_run_goes_on_with_the_same_answers(tmp_path, monkeypatch):
    options = ["num_samples=2", "sampling.temperature=3.0", "seed=5"]
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = generate(tmp_path / "whole", *options)
    assert len(whole) == 14 and len({row["messages"][-1]["content"] for row in whole}) > 7
    parts = tmp_path / "parts"
    lines = (tmp_path / "whole" / "a.jsonl").read_text().splitlines(keepends=True)
    (parts / "a.jsonl.partial").write_text("".join(lines[:7]) + lines[7][:20])  # three prompts, and a torn one
    assert generate(parts, *options) == whole and not (parts / "a.jsonl.partial").exists()


@pytest.mark.parametrize("way", [[], ["parallel.tp=2"]])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=TWO_GPUS)])
def test_ranks_give_what_one_process_gives(tmp_path, way, device):
    options = ["num_samples=2", "sampling.temperature=3.0", f"device={device}"]
    alone = generate(tmp_path, *options)
    (tmp_path / "ranks").mkdir()
    run_ranks(part, 2, tmp_path / "ranks", [*options, *way])
    found = [json.loads(line) for line in (tmp_path / "ranks" / "a.jsonl").read_text().splitlines()]
    assert found == alone


def test_a_base_in_four_bits(tmp_path):
    found = generate(tmp_path, "sampling.temperature=0", "nf4={}", "logps=true")
    assert all(math.isfinite(logp) for row in found for logp in row["logps"])


def test_conflicts(tmp_path):
    with pytest.raises(UserError, match=r"end in \.jsonl"):
        generate(tmp_path, "output=answers.txt")
