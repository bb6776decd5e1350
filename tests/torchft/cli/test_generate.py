"""``tune generate``: prompts, files and a chat, with the demo's model."""

import io
import json

import pytest

from torchft import shipped
from torchft.cli.main import main

BASE = str(shipped.config_path("demo/base"))
GREEDY = ("--dtype", "fp32", "--device", "cpu", "--temperature", "0", "--max-new-tokens", "24")


@pytest.fixture
def ask(capsys):
    def call(*words):
        try:
            code = main(["generate", BASE, *GREEDY, *words])
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return call


def test_prompts_of_the_command_line(ask):
    assert ask('Repeat the word "hello".', "What is 3 plus 4?")[:2] == (0, "hello\n7\n")
    assert ask("What is 3 plus 4?", "--num-samples", "2")[1] == "7\n7\n"
    raw = '<|user|>Repeat the word "yes".<|end|><|assistant|>'
    assert ask("--raw", raw)[1] == "yes\n"


def test_a_file_becomes_rows(ask, tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "What is 3 plus 4?"}, {"role": "assistant", "content": "?"}]},
        {"messages": [{"role": "user", "content": "What is 10 plus 4?"}]},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, _ = ask("--file", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "a.jsonl"))
    assert (code, out) == (0, "")
    found = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["messages"][-1]["content"] for row in found] == ["7", "14"]
    assert [row["finish"] for row in found] == ["stop", "stop"]
    _, out, _ = ask("--file", str(tmp_path / "q.jsonl"), "--system", "Hi.")
    assert json.loads(out.splitlines()[0])["messages"][:2] == [
        {"role": "system", "content": "Hi."},
        rows[0]["messages"][0],
    ]


def test_chat(ask, monkeypatch):
    lines = 'Repeat the word "hello".\n/undo\n\n/help\nWhat is 3 plus 4?\n/quit\nnot read\n'
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code, out, err = ask()
    assert (code, out) == (0, "hello\n7\n") and "forgotten" in err and "/save" in err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("hi", "--temperature=-1"), "temperature: -1.0 must be at least 0"),
        (("hi", "--file", "x.jsonl"), "not both"),
        (("--raw",), "--raw"),
        (("hi", "--max-len", "3"), "--max-len is 3"),
        (("hi", "--num-samples", "0"), "at least 1"),
        (("hi", "--adapter", "none"), "none"),
    ],
)
def test_mistakes(ask, words, problem):
    code, _, err = ask(*words)
    assert code == 2 and problem in err and "Traceback" not in err
