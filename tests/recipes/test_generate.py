"""The recipe that answers files: continued, divided over ranks, with its options."""

import json
import math
import os
import re
import shutil
import sys
from dataclasses import replace

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


def part(folder, overrides, recipe=None):
    prompts = write_jsonl(folder / "q.jsonl", [{"prompt": q, "answer": q[17:-2]} for q in QUESTIONS])
    recipe = recipe or load_recipe("generate")
    given = [f"checkpoint_dir={BASE}", f"prompts.source={prompts}", f"output={folder / 'a.jsonl'}", *SMALL]
    recipe.main(load(recipe.Config, recipe="generate", file=None, overrides=[*given, *overrides]))


def generate(folder, *overrides):
    part(folder, overrides)
    return [json.loads(line) for line in (folder / "a.jsonl").read_bytes().splitlines()]


def ended_early(folder, *overrides, chunks=1):
    """A run that is ended after ``chunks`` of three prompts; returns its unfinished file."""
    recipe, left = load_recipe("generate"), iter(range(chunks))
    real = recipe.answers

    def answers(*args, **kwargs):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    recipe.answers = answers
    with pytest.raises(KeyboardInterrupt):
        part(folder, overrides, recipe)
    return folder / "a.jsonl.partial"


def test_answers_in_order(tmp_path):
    found = generate(tmp_path, "sampling.temperature=0", "logps=true")
    assert [row["messages"][0]["content"] for row in found] == QUESTIONS
    right = sum(row["messages"][-1]["content"] == row["answer"] for row in found)
    assert right >= 5 and {row["finish"] for row in found} == {"stop"}
    assert all(len(row["tokens"]) == len(row["logps"]) and max(row["logps"]) <= 0 for row in found)


def test_an_ended_run_goes_on_with_the_same_answers(tmp_path):
    options = ["num_samples=2", "sampling.temperature=3.0", "seed=5"]
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = generate(tmp_path / "whole", *options)
    assert len(whole) == 14 and len({row["messages"][-1]["content"] for row in whole}) > 7
    parts = tmp_path / "parts"
    partial = ended_early(parts, *options)
    lines = (tmp_path / "whole" / "a.jsonl").read_bytes().split(b"\n")
    assert partial.read_bytes().split(b"\n") == [*lines[:6], b""]
    partial.write_bytes(b"\n".join([*lines[:7], lines[7][:20]]))  # three prompts, half of one and a torn one
    assert generate(parts, *options, "save_every=2", "num_slots=3") == whole
    assert {file.name for file in parts.iterdir()} == {"q.jsonl", "a.jsonl"}


def test_line_ends_inside_a_text_and_a_torn_letter_are_no_rows(tmp_path):
    """U+2028 and U+0085 end lines for str.splitlines, but no JSON line."""
    partial = ended_early(tmp_path)
    rows = [json.loads(line) for line in partial.read_bytes().splitlines()]
    for row in rows:
        row["messages"][-1]["content"] = "one\u2028two\u0085three"
    whole = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    partial.write_bytes(whole + '{"messages": [{"content": "Grö'.encode()[:-1])
    found = generate(tmp_path)
    assert len(found) == 7 and found[:3] == rows
    assert [row["messages"][0]["content"] for row in found] == QUESTIONS


def test_a_run_killed_in_its_first_line_starts_anew(tmp_path):
    partial = ended_early(tmp_path)
    partial.write_bytes(partial.read_bytes()[:10])
    assert len(generate(tmp_path)) == 7


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("sampling.temperature=0.25", r"sampling \(.*'temperature': 0\.25"),
        ("num_samples=2", r"num_samples \(1 then, 2 now\)"),
        ("logps=true", "logps"),
        ("prompts", "other prompts;"),
        ("checkpoint", "other checkpoint_dir;"),
        ("no mark", "does not say of what"),
    ],
)
def test_answers_of_another_run_are_not_taken_over(tmp_path, monkeypatch, change, said):
    """Refused rather than thrown away: they may have taken hours."""
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    partial = ended_early(tmp_path, f"checkpoint_dir={base}")
    before = partial.read_bytes()
    if change == "prompts":
        monkeypatch.setattr(sys.modules[__name__], "QUESTIONS", [*QUESTIONS[1:], 'Repeat the word "new".'])
    elif change == "checkpoint":  # trained again: the same sizes
        os.utime(base / "model.safetensors", (1, 1))
    elif change == "no mark":
        (tmp_path / "a.jsonl.partial.made_of").unlink()
    with pytest.raises(UserError, match=rf"(?s)a\.jsonl\.partial .*{said}.*remove .*a\.jsonl\.partial to start anew"):
        generate(tmp_path, f"checkpoint_dir={base}", *([change] if "=" in change else []))
    assert partial.read_bytes() == before
    partial.unlink()
    assert len(generate(tmp_path, f"checkpoint_dir={base}")) == 7


def test_an_adapter_is_known_by_its_files(tmp_path):
    recipe = load_recipe("generate")
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"1")
    given = [f"checkpoint_dir={BASE}", "prompts.source=q.jsonl", f"output={tmp_path / 'a.jsonl'}", *SMALL]
    without = load(recipe.Config, recipe="generate", file=None, overrides=given)
    config = replace(without, adapter=tmp_path)
    first = recipe.made_of(config, [])
    assert first == recipe.made_of(replace(config, device="cuda", num_slots=9, output=tmp_path / "b.jsonl"), [])
    (tmp_path / "adapter_model.safetensors").write_bytes(b"22")
    changed = [
        {name for name in first if first[name] != other[name]}
        for other in (recipe.made_of(config, []), recipe.made_of(without, []))
    ]
    assert changed == [{"adapter"}, {"adapter"}]


def test_endings_are_counted_by_name(tmp_path, capsys, monkeypatch):
    """Of prompts that do not fit, of answers that are cut, and over an interruption."""
    monkeypatch.setattr(sys.modules[__name__], "QUESTIONS", [*QUESTIONS[:3], "red " * 40, *QUESTIONS[3:], "red " * 50])
    options = ["sampling.temperature=0", "sampling.max_new_tokens=3"]
    ended_early(tmp_path, *options, chunks=2)
    found = generate(tmp_path, *options)
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for finish in ("length", "too_long"):
        places = [i for i, row in enumerate(found, 1) if row["finish"] == finish]
        assert re.search(rf"{finish} {len(places)} [a-z][^;]*; the first: line {places[0]}\b", said)
    assert "too_long 2 empty, as their prompts do not fit seq_len 64; the first: line 4" in said


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
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        generate(tmp_path, f"output={tmp_path / 'b.jsonl'}")
