"""Each sample in docs/data.md: three lines that its format makes three samples of, found by the first row."""

import json
import re
from pathlib import Path

import pytest
from letters import Letters

from torchft.data import datasets, messages, preferences

DOCS = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
SAMPLES = dict(re.findall(r"```jsonl (\w+)\n(.*?)```", DOCS, flags=re.S))
JUDGED = ("pairs", "unpaired", "stepwise")


class Calls(Letters):
    """Letters that read parts and calls too."""

    def render(self, messages, **options):
        shown = [{**m, "content": _content(m)} for m in messages]
        return super().render([{k: v for k, v in m.items() if k != "tool_calls"} for m in shown], **options)


def _content(message):
    content = message.get("content", json.dumps(message.get("tool_calls")))
    return "".join(part["text"] for part in content) if isinstance(content, list) else content


def test_every_format_has_a_sample():
    assert set(SAMPLES) == {*messages.FORMATS, "text", "tokenized", *JUDGED}
    assert all(len(sample.splitlines()) == 3 for sample in SAMPLES.values())


@pytest.mark.parametrize("name", SAMPLES)
def test_the_sample_trains(name, tmp_path):
    path = tmp_path / "sample.jsonl"
    path.write_text(SAMPLES[name])
    how = {"tokenizer": Calls(), "seq_len": 2000}
    samples = (preferences if name in JUDGED else datasets).auto(str(path), **how).samples()
    assert len(samples) == 3 and not samples.counts.dropped
    assert all(any(label != -100 for label in sample.labels) for sample in samples)
    rows = [json.loads(line) for line in SAMPLES[name].splitlines()]
    if name in messages.FORMATS:
        assert messages.detect(rows[0]) == name
        named = datasets.chat(str(path), format=name, **how).samples()
        assert list(named) == list(samples)


def test_train_false_leaves_its_message_out(tmp_path):
    path = tmp_path / "sample.jsonl"
    path.write_text(SAMPLES["openai"])
    samples = datasets.auto(str(path), tokenizer=Calls(), seq_len=2000).samples()
    learned = [chr(label) for label in samples[1].labels if 0 <= label < 1000]
    assert learned == ["2"]


@pytest.mark.parametrize("name", ["chat", "instruct", "completion", "tokenized"])
def test_the_names_in_the_docs_exist(name):
    assert f"torchft.data.datasets.{name}`" in DOCS and name in vars(datasets)


def test_a_data_set_of_ones_own(tmp_path):
    """The code in the docs, on a file of its form; a row that lacks a column is named."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCS, flags=re.S)
    names = {"__name__": __name__}
    exec(code, names)
    (tmp_path / "faq.csv").write_text("q,a\nHi?,Yes\nWell?,\n")
    built = names["faq"](str(tmp_path / "faq.csv"), tokenizer=Letters(), seq_len=99, weight=0.5, train_on="all")
    samples = built.samples()
    assert len(samples) == 1 and samples.counts.dropped == {"empty": 1}
    assert samples[0].labels[0] != -100 and built.reading.weight == 0.5
    assert names["faq"](tokenizer=Letters(), seq_len=9).reading.source == "data/faq.csv"
