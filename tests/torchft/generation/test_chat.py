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
    assert talk.command("/undo") == "forgotten" and talk.messages == [{"role": "system", "content": "Be brief."}]
    assert "nothing" in talk.command("/undo") and len(talk.messages) == 1
    assert talk.command("/system Be kind.") and talk.messages == [{"role": "system", "content": "Be kind."}]
    assert talk.command("/system") and talk.messages == []
    assert "/undo" in talk.command("/help") and "no command" in talk.command("/hlep")
    assert "cannot be written" in talk.command(f"/save {tmp_path / 'none' / 'a.jsonl'}")
    assert "needs" in talk.command("/save")


def test_a_conversation_that_is_too_long_says_the_way_out(demo):
    talk = chat(demo, max_len=20)
    with pytest.raises(UserError, match=r"20 is the most.*/undo"):
        list(talk.answer("Repeat the word " + "hello " * 10))
    assert talk._engine.is_idle


def test_a_reader_who_leaves_ends_the_answer(demo):
    talk = chat(demo)
    answer = talk.answer("Count from 1 to 6.")
    first = next(piece for piece in answer if piece)
    answer.close()
    assert talk._engine.is_idle and talk.messages[-1] == {"role": "assistant", "content": first}
