"""The chat's history and commands, with the demo's model."""

import json

import pytest
import torch

from torchft import shipped
from torchft.errors import UserError
from torchft.generation.chat import Chat
from torchft.generation.loaded import engine, load
from torchft.generation.sampling import Sampling


@pytest.fixture(scope="module")
def demo():
    return load(shipped.config_path("demo/base"), dtype=torch.float32, device=torch.device("cpu"))


def chat(demo, *, max_len=256, **more):
    model, tokenizer = demo
    one = engine(model, tokenizer, num_slots=1, max_len=max_len)
    return Chat(one, tokenizer, sampling=Sampling(temperature=0.0, max_new_tokens=24), **more)


def test_answers_become_history(demo):
    talk = chat(demo)
    assert "".join(talk.answer('Repeat the word "hello".')) == "hello"
    said = "".join(talk.answer("What is 3 plus 4?"))
    assert [m["content"] for m in talk.messages] == ['Repeat the word "hello".', "hello", "What is 3 plus 4?", said]


def test_what_was_said_before_is_read(demo, monkeypatch):
    """Each question is rendered with all before it."""
    _, tokenizer = demo
    talk, prompts = chat(demo, system="Be brief."), []
    submit = talk._engine.submit
    monkeypatch.setattr(talk._engine, "submit", lambda request: prompts.append(request.prompt) or submit(request))
    for question in ("What is 1 plus 1?", "What is 2 plus 2?"):
        list(talk.answer(question))
    assert "Be brief." in tokenizer.decode(prompts[0]) and "What is 1" in tokenizer.decode(prompts[1])
    assert tokenizer.render(talk.messages[:-1], add_generation_prompt=True).tokens == prompts[1]


def test_commands(demo, tmp_path):
    talk = chat(demo, system="Be brief.")
    list(talk.answer("What is 3 plus 4?"))
    assert talk.command(f"/save {tmp_path / 'a.jsonl'}").startswith("saved")
    assert talk.command(f"/save {tmp_path / 'a.jsonl'}").startswith("saved")
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows == [{"messages": talk.messages}] * 2
    assert "cannot be written" in talk.command(f"/save {tmp_path / 'none' / 'a.jsonl'}")
    assert talk.command("/undo") == "forgotten" and talk.messages == [{"role": "system", "content": "Be brief."}]
    assert "nothing" in talk.command("/undo") and len(talk.messages) == 1
    assert talk.command("/system Be kind.") and talk.messages == [{"role": "system", "content": "Be kind."}]
    assert talk.command("/system") and talk.messages == []
    assert "/undo" in talk.command("/help") and "no command" in talk.command("/hlep")
    assert "needs" in talk.command("/save")


def test_a_save_that_fails_keeps_file_and_chat(demo, tmp_path):
    talk, latin = chat(demo), tmp_path / "latin.jsonl"
    assert "no answer to save" in talk.command(f"/save {tmp_path / 'empty.jsonl'}") and not list(tmp_path.iterdir())
    list(talk.answer("What is 3 plus 4?"))
    latin.write_bytes(b"caf\xe9\n")
    assert "not UTF-8 at byte 3" in talk.command(f"/save {latin}") and latin.read_bytes() == b"caf\xe9\n"
    for name in ("~nobody-of-that-name/a.jsonl", "a\0b.jsonl", str(tmp_path), "a" * 300):
        assert "saved" not in talk.command(f"/save {name}")
    talk.messages[0]["content"] = "half \ud800"
    assert "half a character" in talk.command(f"/save {tmp_path / 'half.jsonl'}")
    assert len(talk.messages) == 2 and list(tmp_path.iterdir()) == [latin]


def test_a_row_is_not_joined_to_an_open_one(demo, tmp_path):
    talk, path = chat(demo), tmp_path / "a.jsonl"
    list(talk.answer("What is 3 plus 4?"))
    path.write_text('{"messages": []}')
    assert talk.command(f"/save {path}").startswith("saved")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"messages": []},
        {"messages": talk.messages},
    ]


def test_a_conversation_that_is_too_long_says_the_way_out(demo):
    """And goes on as it was: what could not be answered is not in the history."""
    talk = chat(demo, max_len=64)
    list(talk.answer("What is 3 plus 4?"))
    before = list(talk.messages)
    for question in ("Repeat the word " + "hello " * 20, "half \ud800"):
        with pytest.raises(UserError):
            list(talk.answer(question))
        assert talk.messages == before and talk._engine.is_idle
    with pytest.raises(UserError, match=r"64 is the most.*/undo.*--max-len"):
        list(talk.answer("Repeat the word " + "hello " * 20))
    assert "forgotten" in talk.command("/undo") and talk.messages == []
    assert "".join(talk.answer("What is 3 plus 4?")) == "7"


def test_a_reader_who_leaves_ends_the_answer(demo):
    talk = chat(demo)
    answer = talk.answer("Count from 1 to 6.")
    first = next(piece for piece in answer if piece)
    answer.close()
    assert talk._engine.is_idle and talk.messages[-1] == {"role": "assistant", "content": first}
