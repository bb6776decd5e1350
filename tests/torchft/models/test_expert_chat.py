# ruff: noqa: RUF001  DeepSeek's tokens are written so
"""Chat of families with experts: GLM 4.5's own format is trl's twin of the released template, which learns where an
answer ends; Qwen's train on the template of the checkpoint, whose ids are transformers'."""

import re

import pytest
from conversations import PLAIN, TOOL_USE, TOOLS, assistant, call, user
from vocabularies import pair, template

from torchft.errors import UserError
from torchft.models import deepseek_v3, glm4_moe

MARKUP = [
    f"<{end}{word}>" for word in ("think", "tool_call", "tool_response", "arg_key", "arg_value") for end in ("", "/")
]
GLM_SPECIAL = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATES = {  # name -> template, special tokens, the one that ends an answer
    "qwen3_2507": ("qwen3_instruct_2507", QWEN, "<|im_end|>"),
}
ALL = PLAIN | {k: v for k, v in TOOL_USE.items() if k in ("tools only offered", "a call and its result")}
MORE = {
    "reasoning": [
        user("a"), {**assistant("b"), "reasoning_content": " hm\n"}, user("c"),
        {**assistant("\nd"), "reasoning_content": "y"},
    ],
    "reasoning in the text": [
        user("a"), assistant("<think>\nso\n</think>\n\nb"), user("c"), assistant("<think>x</think>d")
    ],
    "a call with text": [
        user("Weather?"),
        {**call("get_weather", {"city": "Zürich", "days": [1, {"a": None}]}), "content": "Let me look."},
        {"role": "tool", "content": "21"}, {"role": "tool", "content": "22"}, assistant("warm"), user("and?"),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def glm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glm")
    return pair(folder, template("glm4moe"), GLM_SPECIAL, MARKUP, "<|endoftext|>", chat_format="glm4_moe")


@pytest.mark.parametrize("options", [{}, {"tools": TOOLS}], ids=["plain", "tools"])
@pytest.mark.parametrize("conversation", [*ALL, *MORE])
def test_glm_is_the_training_template(conversation, options, glm):
    (ours, oracle), messages = glm, (ALL | MORE)[conversation]
    assert ours._chat is glm4_moe.chat
    twin = oracle.apply_chat_template(
        messages, chat_template=template("glm4moe_training"), tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True, **options,
    )  # fmt: skip
    got = ours.render(messages, **options)
    assert got.tokens == twin["input_ids"]
    assert got.train == [bool(x) for x in twin["assistant_masks"]]
    for more in ({}, {"add_generation_prompt": True}, {"add_generation_prompt": True, "enable_thinking": False}):
        exported = oracle.apply_chat_template(
            messages, chat_template=ours.chat_template, tokenize=True, return_dict=False, **options, **more
        )
        assert ours.render(messages, **options, **more).tokens == exported


def test_glm_prompts_as_released(glm):
    """Up to a question, where a model is asked to answer, it is the released template's text."""
    ours, oracle = glm
    for messages in ([user("a")], [user("a"), assistant("b"), user("c")], MORE["a call with text"]):
        for more in ({}, {"enable_thinking": False}):
            want = oracle.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False, **more
            )
            assert ours.render(messages, add_generation_prompt=True, **more).tokens == want


def test_glm_refuses_other_roles(glm):
    with pytest.raises(UserError, match=r"message 0: GLM 4.5's chat format has no role 'ipython'"):
        glm[0].render([{"role": "ipython", "content": "b"}, user("a"), assistant("c")])


@pytest.fixture(scope="module", params=TEMPLATES)
def released(request, tmp_path_factory):
    name, special, end = TEMPLATES[request.param]
    return *pair(tmp_path_factory.mktemp(name), template(name), special, MARKUP, end), end


@pytest.mark.parametrize("conversation", ALL)
def test_ids_are_the_released_templates_and_answers_are_learned(conversation, released):
    (ours, oracle, end), messages = released, ALL[conversation]
    options = {"tools": TOOLS} if conversation in TOOL_USE else {}
    for prompt in (False, True):
        want = oracle.apply_chat_template(
            messages, add_generation_prompt=prompt, tokenize=True, return_dict=False, **options
        )
        assert ours.render(messages, add_generation_prompt=prompt, **options).tokens == want
    got = ours.render(messages, **options)
    learned = ours.decode([token for token, train in zip(got.tokens, got.train) if train])
    rest = ours.decode([token for token, train in zip(got.tokens, got.train) if not train])
    answers = [m["content"] for m in messages if m["role"] == "assistant" and m.get("content")]
    assert all(answer in learned for answer in answers)
    assert learned.endswith(end) == (messages[-1]["role"] == "assistant") or end == "<|im_end|>"
    questions = [m["content"] for m in messages if m["role"] == "user"]
    assert all(question in rest for question in questions) and not re.search(r"<\|(im_start|start)\|>", learned)


DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁sep｜>"]
DEEPSEEK += [
    f"<｜tool▁{word}{s}▁{end}｜>" for word in ("call", "output") for s in ("", "s") for end in ("begin", "end")
]
TWO_RESULTS = [
    user("Weather?"), {**call("get_weather", {"city": "Zürich", "days": [1, {"a": None}]}), "content": "Let me look."},
    {"role": "tool", "content": "21"}, {"role": "tool", "content": "22"}, assistant("warm"), user("and?"),
]  # fmt: skip


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory):
    return pair(
        tmp_path_factory.mktemp("deepseek"), template("deepseekv3"), DEEPSEEK, ["<think>", "</think>"], DEEPSEEK[1],
        bos=DEEPSEEK[0], chat_format="deepseek_v3",
    )  # fmt: skip


@pytest.mark.parametrize("conversation", [*PLAIN, "a call and its result", "two results"])
def test_deepseek_is_the_training_template(conversation, deepseek):
    """Ids and masks of trl's twin, which counts to an answer the token that the prompt ends with."""
    (ours, oracle), messages = deepseek, (ALL | {"two results": TWO_RESULTS})[conversation]
    assert ours._chat is deepseek_v3.chat
    as_read = [{"content": "", **m} for m in messages]  # the twin adds its content to a call
    twin = oracle.apply_chat_template(
        as_read, chat_template=template("deepseekv3_training"), tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    got = ours.render(messages)
    assert got.tokens == twin["input_ids"]
    prompt_ends = oracle.convert_tokens_to_ids(["<｜Assistant｜>", "<｜tool▁outputs▁end｜>"])
    wanted = [bool(w) and t not in prompt_ends for t, w in zip(twin["input_ids"], twin["assistant_masks"])]
    assert got.train == wanted
    prompt = ours.render(messages, add_generation_prompt=True, enable_thinking=True).tokens
    assert prompt == rendered(oracle, as_read, template("deepseekv3_training"), add_generation_prompt=True)
    for more in ({}, {"add_generation_prompt": True}, {"add_generation_prompt": True, "enable_thinking": True}):
        assert ours.render(messages, **more).tokens == rendered(oracle, messages, ours.chat_template, **more)


def rendered(oracle, messages, source, **options):
    return oracle.apply_chat_template(messages, chat_template=source, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("conversation", ["reasoning", "reasoning in the text", "a call with text", "calls in turn"])
def test_deepseek_keeps_the_reasoning_of_every_turn(conversation, deepseek):
    ours, oracle = deepseek
    in_turn = [
        user("a"), {**call("now", {}), "reasoning_content": "so"}, {"role": "tool", "content": {"t": "ü"}},
        call("now", {"z": 1}), {"role": "tool", "content": "2"}, assistant("noon"),
    ]  # fmt: skip
    messages = (MORE | {"calls in turn": in_turn})[conversation]
    got = ours.render(messages)
    assert got.tokens == rendered(oracle, messages, ours.chat_template)
    learned = ours.decode([token for token, train in zip(got.tokens, got.train) if train])
    end, begin = DEEPSEEK[1], "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"
    stop = "\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>" + end
    assert (
        learned
        == {
            "reasoning": f"<think>\n hm\n</think>\n\nb{end}<think>\ny\n</think>\n\n\nd{end}",
            "reasoning in the text": f"<think>\nso\n</think>\n\nb{end}<think>\nx\n</think>\n\nd{end}",
            "a call with text": f"Let me look.{begin}get_weather\n```json\n"
            f'{{"city": "Zürich", "days": [1, {{"a": null}}]}}{stop}warm{end}',
            "calls in turn": f"<think>\nso\n</think>\n\n{begin}now\n```json\n{{}}{stop}"
            f'{begin}now\n```json\n{{"z": 1}}{stop}noon{end}',
        }[conversation]
    )


def test_deepseek_refuses_other_roles(deepseek):
    with pytest.raises(UserError, match="message 1: DeepSeek V3's chat format has no role 'ipython'"):
        deepseek[0].render([user("a"), {"role": "ipython", "content": "b"}, assistant("c")])
