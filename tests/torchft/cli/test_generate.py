"""``tune generate``: prompts, files and a chat, with the demo's model."""

import io
import json

import pytest

from torchft import shipped
from torchft.cli import generate
from torchft.cli.main import main
from torchft.generation import room

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


class Keys(io.StringIO):
    """Lines, of which "^C" is the key Ctrl-C, and "^X" no UTF-8."""

    def readline(self):
        line = super().readline()
        if line == "^C\n":
            raise KeyboardInterrupt
        if line == "^X\n":
            b"\xff".decode()
        return line


@pytest.mark.parametrize("end", ["^C\n^C\n", "^C\n", "/quit\n"])
def test_ctrl_c_at_the_prompt_says_how_to_leave(ask, monkeypatch, end):
    asked = 'Repeat the word "hello".\n/undo\n^C\nWhat is 3 plus 4?\n/undo\n^X\nRepeat the word "yes".'
    lines = f"^C\n{asked}\n{end}"
    monkeypatch.setattr("sys.stdin", Keys(lines))
    code, out, err = ask()
    assert (code, out) == (0, "hello\n7\nyes\n") and "not utf-8" in err
    assert err.count("/quit, Ctrl-D or another Ctrl-C ends the chat") == 2 + ("^C" in end)


def test_a_question_that_is_too_long_leaves_the_chat_going(ask, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a" * 300 + "\nWhat is 3 plus 4?\n"))
    code, out, err = ask()
    assert (code, out) == (0, "\n7\n") and "is the most with its answer" in err


def test_what_begins_with_a_dash(ask):
    raw = '<|user|>Repeat the word "yes".<|end|><|assistant|>'
    assert ask("--raw", "--seed", "1", "--", raw, "-3 plus 5?")[1].startswith("yes\n")
    code, out, _ = ask("--system", "-be brief", "--stop", "-", "--", 'Repeat the word "hello".')
    assert (code, out) == (0, "hello\n")
    for word in ("-3 plus 5?", "--help me"):
        code, _, err = ask(word)
        assert code == 2 and f"goes behind --: -- {word!r}" in err
    code, _, err = ask("--tempratur", "1", "hi")
    assert code == 2 and "unknown option '--tempratur'" in err


def sizes(monkeypatch):
    """What engines are made of."""
    found = []
    made = generate.engine
    monkeypatch.setattr(generate, "engine", lambda *a, **how: found.append(how) or made(*a, **how))
    return found


def test_slots_are_as_long_as_the_longest_prompt_and_answer(ask, monkeypatch, tmp_path):
    found = sizes(monkeypatch)
    ask("What is 3 plus 4?", 'Repeat the word "hello".')
    (tmp_path / "q.jsonl").write_text('{"prompt": "What is 3 plus 4?"}\n')
    ask("--file", str(tmp_path / "q.jsonl"), "--num-samples", "3")
    ask("What is 3 plus 4?", "--max-new-tokens", "10000")  # the context
    ask("What is 3 plus 4?", "--max-len", "30")
    lengths = [how["max_len"] for how in found]
    assert 24 < lengths[1] < lengths[0] < 24 + 60 and lengths[2:] == [256, 30]
    assert [how["num_slots"] for how in found] == [2, 3, 1, 1]


def test_slots_that_do_not_fit_become_fewer(ask, monkeypatch):
    """And the answers stay what they are."""
    found = sizes(monkeypatch)
    want = ask("What is 3 plus 4?", "--num-samples", "6", "--temperature", "2")[1]
    monkeypatch.setattr(room, "free_memory", lambda device: 2 << 20)  # half of it for slots of 40 tokens of 8 KiB
    code, out, err = ask("What is 3 plus 4?", "--num-samples", "6", "--temperature", "2")
    assert (code, out) == (0, want) and "fit at a time, not 6" in err and found[1]["num_slots"] < 6
    monkeypatch.setattr(room, "free_memory", lambda device: 1000)
    code, _, err = ask("What is 3 plus 4?")
    assert code == 2 and "a device with more" in err


def test_a_chat_says_how_long_it_may_be(ask, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    err = ask()[2]
    assert "up to 256 tokens" in err and "--max-len" in err
    monkeypatch.setattr(room, "free_memory", lambda device: 2 << 20)
    code, _, err = ask("--max-len", "250")
    assert code == 2 and "up to 250 tokens, take" in err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("hi", "--temperature=-1"), "--temperature: -1.0 must be at least 0"),
        (("hi", "--temperature", "-1"), "--temperature: -1.0 must be at least 0"),
        (("hi", "--temperature", "nan"), "--temperature: nan is no number"),
        (("hi", "--top-p", "inf"), "--top-p: inf is no number"),
        (("hi", "--max-new-tokens", "0"), "--max-new-tokens: 0 must be at least 1"),
        (("hi", "--seed", "-1"), "--seed: -1 must be at least 0"),
        (("hi", "--seed", str(2**40)), f"--seed: {2**40} must be at most"),
        (("hi", "--stop", ""), "--stop: an empty text"),
        (("hi", "--stop", "\udcff"), "--stop: the text is not UTF-8"),
        (("hi", "--file", "x.jsonl"), "not both"),
        (("--file", ""), "--file: the name is empty"),
        (("--raw",), "--raw"),
        (("--raw", ""), "prompt 1: the prompt has no tokens"),
        (("hi", "--raw", "--system", "Be brief."), "so no --system"),
        (("hi", "--max-len", "3"), "--max-len is 3"),
        (("hi", "--max-len", "257"), "--max-len: 257 is more than the model's context of 256 tokens"),
        (("hi", "--max-len", "0"), "--max-len: 0 must be at least 2"),
        (("ok", "a" * 300), "prompt 2: the prompt has 3"),
        (("\udcff",), "prompt 1: text holds a lone surrogate"),
        (("hi", "--num-samples", "0"), "--num-samples: 0 must be at least 1"),
        (("hi", "--num-slots", "-2"), "--num-slots: -2 must be at least 1"),
        (("hi", "--adapter", "none"), "--adapter: none"),
        (("hi", "--chat-format", "none"), "none"),
        (("hi", "--device", "none"), "none"),
        (("hi", "--output", "no/such/a.txt"), "--output: the folder no/such does not exist"),
        (("hi", "--output", "."), "--output: . is a folder"),
        (("--output", "a.txt"), "in a chat /save"),
    ],
)
def test_mistakes(ask, words, problem):
    code, _, err = ask(*words)
    assert code == 2 and problem in err and "Traceback" not in err


def test_all_mistakes_at_once_and_before_the_weights_are_read(ask, monkeypatch, tmp_path):
    monkeypatch.setattr(generate, "load_model", None)
    (tmp_path / "q.jsonl").write_text('{"nothing": 1}\n')
    wrong = ("--seed", "-1", "--temperature", "nan", "--max-len", "999", "--stop", "", "--num-slots", "0")
    code, _, err = ask(*wrong, "--output", "none/a", "--adapter", "none", "--file", str(tmp_path / "q.jsonl"))
    assert code == 2 and err.startswith("error: 8 problems")
    for name in ("seed", "temperature", "max-len", "stop", "num-slots", "output", "adapter"):
        assert f"  - --{name}: " in err
    assert "q.jsonl:1" in err


def test_answers_that_cannot_be_written_are_shown(ask):
    code, out, err = ask("What is 3 plus 4?", "--output", "/dev/full")
    assert (code, out) == (2, "7\n") and "the answers are above" in err
