"""Chat of the families with experts: GLM 4.5's own format is trl's twin of the released template, which learns where an
answer ends; the others train on the template of the checkpoint, whose ids are transformers'."""

import re

import pytest
from conversations import PLAIN, TOOL_USE, TOOLS, assistant, call, user
from vocabularies import byte_level, hub, template, write

from torchft.errors import UserError
from torchft.models import glm4_moe
from torchft.tokenizers import bpe, load

MARKUP = [
    f"<{end}{word}>" for word in ("think", "tool_call", "tool_response", "arg_key", "arg_value") for end in ("", "/")
]
GLM_SPECIAL = ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
HARMONY = ["<|startoftext|>", "<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|call|>", "<|return|>"]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATES = {  # name -> template, special tokens, the one that ends an answer
    "gpt_oss": ("gptoss", HARMONY, "<|return|>"),
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


def pair(folder, source, special, markup, eos, **options):
    write(folder, tokenizer_config={"bos_token": None, "eos_token": eos}, chat_template=source)
    byte_level(bpe.PATTERNS["Llama 3"], special=special, markup=markup).save(str(folder / "tokenizer.json"))
    return load(folder, **options), hub(folder)


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
