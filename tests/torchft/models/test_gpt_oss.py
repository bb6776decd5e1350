"""harmony against the released template and trl's twin of it, which marks what an answer learns; and tools' types."""

import random

import pytest
from conversations import PLAIN, TOOL_USE, TOOLS, assistant, call, user
from transformers.utils.chat_template_utils import _compile_jinja_template
from vocabularies import pair, template

from torchft.errors import UserError
from torchft.models import gpt_oss
from torchft.tokenizers.harmony_tools import namespace

SPECIAL = ["<|startoftext|>", "<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|call|>", "<|return|>"]


def thinks(message, thought):
    return {**message, "thinking": thought}


RESULT = {"role": "tool", "content": "21"}
MORE = {
    "developer": [{"role": "developer", "content": "Rhyme."}, user("a"), assistant("b")],
    "reasoning": [user("a"), thinks(assistant("b"), " hm\n"), user("c"), thinks(assistant("d"), "so")],
    "reasoning, then a question": [user("a"), thinks(assistant("b"), "hm"), user("c")],
    "reasoning before a call": [user("a"), thinks(call("now", {}), "I must look"), RESULT],
    "a call with text": [user("a"), {**call("now", {"z": {"a": [1, None]}}), "content": "Let me look"}, RESULT],
    "reasoning of an answered call": [
        user("a"), thinks(call("now", {}), "look"), RESULT, thinks(call("get_weather", {"city": "ü"}), "and there"),
        {"role": "tool", "content": {"t": [1.5, "ü"]}}, thinks(assistant("noon"), "done"),
    ],
    "two questions with calls": [
        user("a"), call("now", {}), RESULT, assistant("noon"), user("b"), thinks(call("now", {}), "again"), RESULT,
    ],
    "parts": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), assistant("c")],
}  # fmt: skip
ALL = PLAIN | {k: v for k, v in TOOL_USE.items() if k != "ipython"} | MORE
OPTIONS = [
    {}, {"tools": TOOLS}, {"reasoning_effort": "high", "model_identity": "You are Ä."},
    {"builtin_tools": ["python", "browser"], "tools": TOOLS}, {"builtin_tools": ["python"]},
]  # fmt: skip


@pytest.fixture(scope="module")
def harmony(tmp_path_factory):
    return pair(tmp_path_factory.mktemp("harmony"), template("gptoss"), SPECIAL, [], "<|return|>")


def as_text(messages):
    """Parts joined: the template adds strings."""
    return [
        {**m, "content": "".join(p["text"] for p in m["content"])} if isinstance(m.get("content"), list) else m
        for m in messages
    ]


def without_headers(mask, ids, header):
    """trl's mask without the first header of each marked stretch, which a generation prompt gives."""
    wanted = list(map(bool, mask))
    for i in range(len(ids)):
        if mask[i] and not (i and mask[i - 1]):
            assert ids[i : i + len(header)] == header
            wanted[i : i + len(header)] = [False] * len(header)
    return wanted


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "tools", "system", "built-in tools", "python"])
@pytest.mark.parametrize("conversation", ALL)
def test_ids_and_mask_are_the_templates(conversation, options, harmony):
    (ours, oracle), messages = harmony, ALL[conversation]
    assert ours._chat is gpt_oss.harmony
    twin = oracle.apply_chat_template(
        as_text(messages), chat_template=template("gptoss_training"), tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True, **options,
    )  # fmt: skip
    got = ours.render(messages, **options)
    assert got.tokens == twin["input_ids"]
    assert got.train == without_headers(twin["assistant_masks"], twin["input_ids"], ours.encode("<|start|>assistant"))
    prompt = oracle.apply_chat_template(
        as_text(messages), add_generation_prompt=True, tokenize=True, return_dict=False, **options
    )
    assert ours.render(messages, add_generation_prompt=True, **options).tokens == prompt


def learned(ours, messages):
    got = ours.render(messages)
    return ours.decode([token for token, train in zip(got.tokens, got.train) if train])


def test_what_is_learned(harmony):
    """Of earlier turns the answer alone; of the last one its reasoning too, and the header between."""
    ours, _ = harmony
    assert learned(ours, MORE["reasoning"]) == (
        "<|channel|>final<|message|>b<|end|>"
        "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>d<|return|>"
    )
    assert learned(ours, MORE["reasoning before a call"]) == (
        "<|channel|>analysis<|message|>I must look<|end|><|start|>assistant to=functions.now<|channel|>commentary json"
        "<|message|>{}<|call|>"
    )
    last = [*MORE["reasoning"][:1], {**MORE["reasoning"][1], "train": False}, *MORE["reasoning"][2:]]
    assert learned(ours, last).startswith("<|channel|>analysis")


def test_reasoning_has_other_names_and_the_day_can_be_given(harmony):
    ours, _ = harmony
    one, other = (
        ours.render([user("a"), {**assistant("b"), key: "c"}], date_string="2025-06-28")
        for key in ("thinking", "reasoning_content")
    )
    assert one == other
    assert "Current date: 2025-06-28\n" in ours.decode(one.tokens)


def test_what_a_model_wrote_is_read_again(harmony):
    """A reply in a conversation that goes on, and data of raw replies; the template refuses them."""
    ours, _ = harmony
    written = learned(ours, MORE["reasoning"][2:])
    assert "<|channel|>analysis<|message|>so" in written
    for reply in (written, written.removesuffix("<|return|>")):
        got, want = ours.render([user("c"), assistant(reply)]), ours.render(MORE["reasoning"][2:])
        assert (got.tokens, got.train) == (want.tokens, want.train)
    answer = assistant("<|channel|>final<|message|>d")
    assert ours.render([user("c"), answer, user("e")], add_generation_prompt=True).tokens == (
        ours.render([user("c"), assistant("d"), user("e")], add_generation_prompt=True).tokens
    )


@pytest.mark.parametrize(
    ("messages", "options", "why"),
    [
        (TOOL_USE["ipython"], {}, "message 2: gpt-oss's chat format has no role 'ipython'"),
        ([user("a"), RESULT, assistant("b")], {}, "message 1: a tool's result needs an assistant's message before it"),
        ([*MORE["two questions with calls"][:4], RESULT, assistant("b")], {}, "message 4: a tool's result needs"),
        ([user("a"), {**thinks(call("now", {}), "x"), "content": "y"}], {}, "either content or reasoning has a place"),
        ([user("a"), {**call("f", {}), "tool_calls": call("f", {})["tool_calls"] * 2}], {}, "1 has 2 tool calls"),
        ([user("a"), assistant("b")], {"tools": [{"function": {"name": "f"}}]}, "tool 0: needs a function with a name"),
        ([user("a"), assistant("b")], {"effort": "low"}, "no option 'effort'"),
    ],
)  # fmt: skip
def test_refusals(messages, options, why, harmony):
    with pytest.raises(UserError, match=why):
        harmony[0].render(messages, **options)


def schema(rng, depth=0):
    """A JSON schema of all the kinds that the template tells apart."""
    found = {}
    kinds = ["array", "string", "number", "integer", "boolean", "object", "null", None, ["string", "null"], ["integer"]]
    match rng.choice([*kinds, "union"]):
        case "union":
            found["oneOf"] = [schema(rng, depth + 1) for _ in range(rng.randrange(1, 4))] if depth < 3 else [{}]
        case None:
            pass
        case kind:
            found["type"] = kind
            if kind == "array" and rng.random() < 0.8 and depth < 4:
                found["items"] = schema(rng, depth + 1)
            if kind == "object" and rng.random() < 0.8 and depth < 4:
                found["properties"] = {f"p{i}": schema(rng, depth + 1) for i in range(rng.randrange(4))}
                found |= {"required": ["p0", "p1"]} if rng.random() < 0.5 else {}
            if kind == "string" and rng.random() < 0.3:
                found["enum"] = ["a", "b"][: rng.randrange(1, 3)]
    found |= {"nullable": rng.random() < 0.7} if rng.random() < 0.2 else {}
    found |= {"description": "dé <x>"} if rng.random() < 0.3 else {}
    if rng.random() < 0.2:  # the template adds a default of an enum or of a union to text
        found["default"] = "a" if {"enum", "oneOf"} & found.keys() else rng.choice([1, None, "x", {"a": 1}])
    return found


def test_types_of_tools_are_the_templates():
    source = template("gptoss")
    macros = source[: source.index("{#- System Message Construction")]
    oracle = _compile_jinja_template(macros + "{{- render_tool_namespace('functions', tools) -}}")
    rng = random.Random(0)
    for _ in range(1000):
        fields = {f"a{i}": schema(rng) for i in range(3)}
        some = [None, {}, {"type": "object", "properties": {}}, {"properties": fields, "required": ["a0"]}]
        tools = [{"function": {"name": "f", "description": "D", "parameters": p}} for p in rng.sample(some, k=2)]
        assert namespace("functions", tools) == oracle.render(tools=tools)
