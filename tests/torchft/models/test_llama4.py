"""Llama 4's chat format against transformers' copy of the released template."""

import json

import pytest
from conversations import PLAIN, TOOL_USE, TOOLS, assistant, call, user
from transformers.models.llama4.processing_llama4 import chat_template as LLAMA4_TEMPLATE
from vocabularies import pair

from torchft.errors import UserError
from torchft.models import llama4
from torchft.tokenizers import load

LLAMA4 = ["<|begin_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>", "<|python_start|>", "<|python_end|>"]
MORE = {
    "a call with text": [
        user(" a\n"), {**call("now", {"z": [1, {"a": None}]}), "content": " Let me "}, {"role": "tool", "content": 5},
        {"role": "tool", "content": ["ü", 1.5]}, assistant("ok"),
    ],
    "two calls": [
        user("a"), {**call("f", {"x": "ü"}), "tool_calls": call("now", {})["tool_calls"] * 2},
        {"role": "tool", "content": "x"}, assistant("b"),
    ],
    "another role": [{"role": "developer", "content": " d "}, user("a"), assistant("b")],
}  # fmt: skip
ALL = PLAIN | TOOL_USE | MORE
OPTIONS = [{}, {"tools": TOOLS}, {"tools": TOOLS, "tools_in_user_message": False}, {"tools": []}]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """(ours, transformers') of an instruct checkpoint, and ours of a base one, which has no template."""
    root = tmp_path_factory.mktemp("llama4")
    ours, oracle = pair(root / "instruct", LLAMA4_TEMPLATE, LLAMA4, [], "<|eot|>", bos="<|begin_of_text|>")
    pair(root / "base", "", LLAMA4, [], "<|eot|>", bos="<|begin_of_text|>")
    (root / "base" / "chat_template.jinja").unlink()
    return ours, oracle, load(root / "base")


def rendered(oracle, messages, source, **options):
    return oracle.apply_chat_template(messages, chat_template=source, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "tools", "tools in the system turn", "no tools"])
@pytest.mark.parametrize("conversation", ALL)
def test_ids_are_the_templates_and_answers_are_learned(conversation, options, chats):
    (ours, oracle, base), messages = chats, ALL[conversation]
    assert ours._chat is base._chat is llama4.chat
    if options.get("tools") is not None and options.get("tools_in_user_message", True) and "developer" in str(messages):
        with pytest.raises(UserError, match="tools are put into the first user message"):
            ours.render(messages, **options)
        return
    for prompt in (False, True):
        more = options | {"add_generation_prompt": prompt}
        got = ours.render(messages, **more).tokens
        assert got == rendered(oracle, messages, None, **more)
        assert got == rendered(oracle, messages, base.chat_template, **more)  # ours, which is exported
    got = ours.render(messages, **options)
    learned = ours.decode([token for token, train in zip(got.tokens, got.train) if train])
    assert learned == "".join(f"{answer(m)}<|eot|>" for m in messages if m["role"] == "assistant")
    assert ours.stop_ids == tuple(oracle.convert_tokens_to_ids(["<|eot|>"]))


def answer(message):
    if "tool_calls" not in message:
        return message["content"]
    functions = [c["function"] for c in message["tool_calls"]]
    calls = [
        f'{{"name": "{f["name"]}", "parameters": {json.dumps(f["arguments"], ensure_ascii=False)}}}' for f in functions
    ]
    return f"<|python_start|>{message.get('content', '')}<|python_end|>{''.join(calls)}"
