"""The harness's requests and tasks, answered; needs lm-eval (extra eval)."""

import json

import pytest
import torch

from torchft import shipped
from torchft.errors import UserError
from torchft.generation.loaded import load
from torchft.generation.multiple_choice import continuation_logps

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from torchft.generation.lm_eval_model import EngineLM, find_tasks, run_tasks


@pytest.fixture(scope="module")
def lm():
    model, tokenizer = load(shipped.config_path("demo/base"), dtype=torch.float32, device=torch.device("cpu"))
    return EngineLM(model, tokenizer, max_len=64, batch_size=4, num_slots=4)


def ask(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def test_loglikelihood_is_of_the_continuation_with_its_space(lm):
    encode = lm._tokenizer.encode
    found = lm.loglikelihood(ask("loglikelihood", ("Repeat the", " word"), ("Repeat the ", "word"), ("", "word")))
    pair = encode("Repeat the"), encode(" word")
    [want] = continuation_logps(lm._model, [pair], batch_size=1)
    assert found[0] == found[1] == pytest.approx(want)
    assert found[2][0] < 0


def test_rolling_counts_every_token_once(lm):
    text = "Repeat the word. " * 32
    [found] = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)))
    tokens = [lm._first(), *lm._tokenizer.encode(text)]
    assert len(tokens) > 128
    want = sum(
        continuation_logps(lm._model, [(tokens[i : i + 1], tokens[i + 1 : i + 64])], batch_size=1)[0][0]
        for i in range(0, len(tokens) - 1, 63)
    )
    assert found == pytest.approx(want, rel=1e-5)


def test_generation_stops_where_it_is_told(lm):
    prompt = '<|user|>Spell the word "cat".<|end|><|assistant|>'
    options = {"until": ["a"], "max_gen_toks": 10}, {"until": [], "max_gen_toks": 10}, {"until": [], "max_gen_toks": 1}
    assert lm.generate_until(ask("generate_until", *((prompt, o) for o in options))) == ["c-", "c-a-t", "c"]


def test_contexts_that_lose_their_beginning_are_counted(lm):
    before, long = lm.num_cut, "Repeat the word. " * 32
    lm.loglikelihood(ask("loglikelihood", (long, " word"), ("the", " word")))
    lm.generate_until(ask("generate_until", (long, {"until": [], "max_gen_toks": 2})))
    assert lm.num_cut == before + 2


def test_a_local_task_keeps_the_results_of_every_filter(lm, tmp_path):
    """As gsm8k's strict-match and flexible-extract: two numbers of one metric; a task without filters has none."""
    row = {"q": '<|user|>Spell the word "cat".<|end|><|assistant|>', "a": "c-a-t"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    filters = [
        {"name": name, "filter": [{"function": "regex", "regex_pattern": pattern}, {"function": "take_first"}]}
        for name, pattern in (("strict-match", "the answer is (.*)"), ("flexible-extract", "(.*)"))
    ]
    spelling = data | {
        "task": "spelling",
        "output_type": "generate_until",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": filters,
    }
    choosing = data | {
        "task": "choosing",
        "output_type": "multiple_choice",
        "doc_to_choice": ["dog", "c-a-t"],
        "doc_to_target": 1,
        "metric_list": [{"metric": "acc"}],
    }
    files = []
    for task in (spelling, choosing):
        files.append(str(tmp_path / f"{task['task']}.yaml"))
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(task))  # JSON is YAML
    found = run_tasks(lm, files, find_tasks(files), num_fewshot=None, limit=None)
    assert found == {
        "spelling/exact_match,strict-match": 0.0,
        "spelling/exact_match,flexible-extract": 1.0,
        "choosing/acc": 1.0,
    }


def test_unknown_tasks_are_named_together():
    with pytest.raises(UserError, match=r"(?s)'hellaswg' is no task.*'nothing.yaml' is no task"):
        find_tasks(["hellaswag", "hellaswg", "nothing.yaml"])
