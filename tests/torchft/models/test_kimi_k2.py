"""Kimi K2's chat format against the released template, of which no package ships a copy."""

import pytest
from conversations import PLAIN, TOOL_USE, TOOLS, assistant, call, user
from vocabularies import pair

from torchft.errors import UserError
from torchft.models import kimi_k2

SPECIAL = ["[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>"]
CALLS = ["s_section_begin", "s_section_end", "_begin", "_argument_begin", "_end"]
# What chat_template.jinja of moonshotai/Kimi-K2-Instruct-0905 renders of text. Its copies differ in white space.
TEMPLATE = """\
{%- if tools -%}
  <|im_system|>tool_declare<|im_middle|>{{ tools | tojson(separators=(',', ':')) }}<|im_end|>
{%- endif -%}
{%- for message in messages -%}
  {%- if loop.first and messages[0]['role'] != 'system' -%}
    <|im_system|>system<|im_middle|>You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>
  {% endif %}
  {%- set role_name =  message.get('name') or  message['role'] -%}
  {%- if message['role'] == 'user' -%}
    <|im_user|>{{role_name}}<|im_middle|>
  {%- elif message['role'] == 'assistant' -%}
    <|im_assistant|>{{role_name}}<|im_middle|>
  {%- else -%}
    <|im_system|>{{role_name}}<|im_middle|>
  {%- endif -%}
  {%- if message['role'] == 'assistant' and message.get('tool_calls') -%}
    {%- if message['content'] -%}{{ message['content'] }}{%- endif -%}
    <|tool_calls_section_begin|>
    {%- for tool_call in message['tool_calls'] -%}
      {%- set formatted_id = tool_call['id'] -%}
      <|tool_call_begin|>{{ formatted_id }}<|tool_call_argument_begin|>{% if tool_call['function']['arguments'] is string %}{{ tool_call['function']['arguments'] }}{% else %}{{ tool_call['function']['arguments'] | tojson }}{% endif %}<|tool_call_end|>
    {%- endfor -%}
    <|tool_calls_section_end|>
  {%- elif message['role'] == 'tool' -%}
    ## Return of {{ message.tool_call_id }}
{{ message['content'] }}
  {%- elif message['content'] is string -%}
    {{ message['content'] }}
  {%- elif message['content'] is not none -%}
    {% for content in message['content'] -%}
      {{ content['text'] }}
    {%- endfor -%}
  {%- endif -%}
  <|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
  <|im_assistant|>assistant<|im_middle|>
{%- endif -%}
"""  # noqa: E501


RESULT = {"role": "tool", "content": "21"}
ASKED = {"id": "functions.now:0", "type": "function", "function": {"name": "now", "arguments": {"z": [1, {"ü": None}]}}}
MORE = {
    "calls": [
        user("a"), {**assistant("Let me look."), "tool_calls": [ASKED, {**ASKED, "id": "functions.now:1"}]},
        {**RESULT, "tool_call_id": "functions.now:0", "name": "now"}, {**RESULT, "tool_call_id": "functions.now:1"},
        assistant("noon"), user("and?"), {"role": "assistant", "tool_calls": [{**ASKED, "id": "x"}]},
    ],
    "names": [{**user("a"), "name": "Ann"}, {**assistant("b"), "name": "Kim"}],
}  # fmt: skip
NO_IDS = [
    user("a"), call("now", {}), RESULT, {**assistant("b"), "tool_calls": call("f", {"x": 1})["tool_calls"] * 2},
    {"role": "tool", "content": {"t": "ü"}}, RESULT, assistant("c"),
]  # fmt: skip


@pytest.fixture(scope="module")
def kimi(tmp_path_factory):
    special = [*SPECIAL, *(f"<|tool_call{word}|>" for word in CALLS)]
    root = tmp_path_factory.mktemp("kimi")
    released, oracle = pair(root / "released", TEMPLATE, special, [], "[EOS]", bos="[BOS]")
    return (
        released,
        oracle,
        pair(root / "named", "{{ 1 }}", special, [], "[EOS]", bos="[BOS]", chat_format="kimi_k2")[0],
    )


def rendered(oracle, messages, source, **options):
    return oracle.apply_chat_template(messages, chat_template=source, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("conversation", [*PLAIN, *MORE])
def test_ids_are_the_templates_and_answers_are_learned(conversation, tools, kimi):
    (ours, oracle, named), messages = kimi, (PLAIN | MORE)[conversation]
    assert ours._chat is named._chat is kimi_k2.chat
    for prompt in (False, True):
        options = {"tools": tools, "add_generation_prompt": prompt}
        got = ours.render(messages, **options)
        assert got.tokens == rendered(oracle, messages, TEMPLATE, **options)
        assert got.tokens == rendered(oracle, messages, named.chat_template, **options)  # ours, which is exported
    got = ours.render(messages, tools=tools)
    learned = ours.decode([token for token, train in zip(got.tokens, got.train) if train])
    assert learned == "".join(answer(m) for m in messages if m["role"] == "assistant")
    assert ours.stop_ids == tuple(oracle.convert_tokens_to_ids(["[EOS]", "<|im_end|>"]))


def answer(message):
    calls = [
        f'<|tool_call_begin|>{c["id"]}<|tool_call_argument_begin|>{{"z": [1, {{"ü": null}}]}}<|tool_call_end|>'
        for c in message.get("tool_calls", [])
    ]
    section = f"<|tool_calls_section_begin|>{''.join(calls)}<|tool_calls_section_end|>" if calls else ""
    return f"{message.get('content', '')}{section}<|im_end|>"


def test_calls_without_ids_are_numbered(kimi):
    """The name of what is called stands in the id alone."""
    ours, oracle, named = kimi
    text = ours.decode(ours.render(NO_IDS).tokens)
    ids = ["functions.now:0", "functions.f:1", "functions.f:2"]
    assert [text.count(f"<|tool_call_begin|>{i}<|") for i in ids] == [1, 1, 1]
    places = [text.index(f"## Return of {i}\n{result}<|im_end|>") for i, result in zip(ids, ("21", '{"t": "ü"}', "21"))]
    assert places == sorted(places)
    assert ours.render(NO_IDS).tokens == rendered(oracle, NO_IDS, named.chat_template)


def test_refuses_other_roles(kimi):
    with pytest.raises(UserError, match="message 2: Kimi K2's chat format has no role 'ipython'"):
        kimi[0].render(TOOL_USE["ipython"])
