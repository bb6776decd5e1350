"""Kimi K2 and Moonlight: DeepSeek V3's architecture with other numbers, a tokenizer and a chat format of their own.

Paper: https://arxiv.org/abs/2507.20534. Weights: https://huggingface.co/moonshotai
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torchft.errors import UserError
from torchft.models.deepseek_v3 import (  # noqa: F401  the same architecture
    HUB,
    MSCALES,
    DeepseekV3Config,
    block,
    build,
    from_hub,
    size,
    to_hub,
    yarn,
)
from torchft.modules.rope import Rope
from torchft.tokenizers.chat import Message, Segment, join_parts

_K2_SIZES = (163_840, 7168, 61, 64, 18_432, 384, 2048, 1, 2.827)
_K2 = size(*_K2_SIZES, 131_072, yarn(5e4, 32.0, 1.0), **MSCALES)
_K2_LONG = size(*_K2_SIZES, 262_144, yarn(5e4, 64.0, 1.0), **MSCALES)
_MOONLIGHT = size(
    163_840, 2048, 27, 16, 11_264, 64, 1408, 1, 2.446, 8_192, Rope(base=5e4, partial=1 / 3), top_k=6, num_shared=2,
    query_latent=None,
)  # fmt: skip
CONFIGS = {
    **dict.fromkeys(["Kimi-K2-Base", "Kimi-K2-Instruct"], _K2),
    "Kimi-K2-Instruct-0905": _K2_LONG,
    "Kimi-K2-Thinking": replace(_K2_LONG, norm_eps=1e-5),
    **dict.fromkeys(["Moonlight-16B-A3B", "Moonlight-16B-A3B-Instruct"], replace(_MOONLIGHT, norm_eps=1e-5)),
}


# Chat: what the released template renders. A call is named by its id alone, functions.NAME:NUMBER, which is given to
# those that have none (the template writes an empty one, so that the model would not learn what it calls).

SYSTEM = "You are Kimi, an AI assistant created by Moonshot AI."  # where a conversation has none
CHAT_TEMPLATE = """\
{%- if tools -%}
    {{- '<|im_system|>tool_declare<|im_middle|>' + (tools | tojson(separators=(',', ':'))) + '<|im_end|>' -}}
{%- endif -%}
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_system|>system<|im_middle|>SYSTEM<|im_end|>\\n' -}}
{%- endif -%}
{%- set ns = namespace(calls=0, results=0, ids=[]) -%}
{%- for message in messages -%}
    {%- set role = message['role'] -%}
    {{- '<|im_' + (role if role in ['user', 'assistant'] else 'system') + '|>' -}}
    {{- (message['name'] or role) + '<|im_middle|>' -}}
    {%- set content = message['content'] if message['content'] is string else '' -%}
    {%- if role == 'tool' -%}
        {%- set content = content if message['content'] is string else message['content'] | tojson -%}
        {%- set asked = ns.ids[ns.results] if ns.results < ns.ids | length else '' -%}
        {{- '## Return of ' + (message['tool_call_id'] or asked) + '\\n' -}}
        {%- set ns.results = ns.results + 1 -%}
    {%- endif -%}
    {{- content -}}
    {%- for call in message['tool_calls'] or [] -%}
        {%- set arguments = call['function']['arguments'] -%}
        {%- set id = call['id'] or 'functions.' + call['function']['name'] + ':' + (ns.calls | string) -%}
        {%- set ns.calls = ns.calls + 1 -%}
        {%- set ns.ids = ns.ids + [id] -%}
        {{- ('<|tool_calls_section_begin|>' if loop.first else '') + '<|tool_call_begin|>' + id -}}
        {{- '<|tool_call_argument_begin|>' + (arguments if arguments is string else arguments | tojson) -}}
        {{- '<|tool_call_end|>' + ('<|tool_calls_section_end|>' if loop.last else '') -}}
    {%- endfor -%}
    {{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_assistant|>assistant<|im_middle|>' -}}
{%- endif -%}
""".replace("SYSTEM", SYSTEM)


def chat(
    messages: Sequence[Message], *, tools: list[Any] | None = None, add_generation_prompt: bool = False
) -> list[Segment]:
    """Kimi K2's format. A result without ``tool_call_id`` is that of the first call without a result."""
    segments: list[Segment] = []
    if tools:
        segments += _turn("system", "tool_declare", json.dumps(tools, ensure_ascii=False, separators=(",", ":")))
    if messages[0]["role"] != "system":
        segments += [*_turn("system", "system", SYSTEM), Segment("\n")]
    ids: list[str] = []
    num_results = 0
    for i, message in enumerate(messages):
        name = str(message.get("name") or message["role"])
        match message["role"]:
            case "user" | "system" as role:
                segments += _turn(role, name, join_parts(message["content"], i))
            case "tool":
                content = message["content"]
                text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
                asked = ids[num_results] if num_results < len(ids) else ""
                segments += _turn("system", name, f"## Return of {message.get('tool_call_id') or asked}\n{text}")
                num_results += 1
            case "assistant":
                segments += _begin("assistant", name) + _answer(message, i, ids)
            case role:
                raise UserError(f"message {i}: Kimi K2's chat format has no role {role!r}")
    return segments + _begin("assistant", "assistant") * add_generation_prompt


def _begin(kind: str, name: str) -> list[Segment]:
    return [Segment(f"<|im_{kind}|>", control=True), Segment(name), Segment("<|im_middle|>", control=True)]


def _turn(kind: str, name: str, text: str) -> list[Segment]:
    return [*_begin(kind, name), Segment(text), Segment("<|im_end|>", control=True)]


def _answer(message: Message, i: int, ids: list[str]) -> list[Segment]:
    """What the model must produce. Adds its calls' ids to ``ids``."""
    parts = [(join_parts(message.get("content") or "", i), False)]
    calls = message.get("tool_calls", [])
    for k, call in enumerate(calls):
        function, arguments = call["function"], json.dumps(call["function"]["arguments"], ensure_ascii=False)
        ids.append(call.get("id") or f"functions.{function['name']}:{len(ids)}")
        parts += [("<|tool_calls_section_begin|>" * (k == 0) + "<|tool_call_begin|>", True), (ids[-1], False)]
        parts += [("<|tool_call_argument_begin|>", True), (arguments, False)]
        parts.append(("<|tool_call_end|>" + "<|tool_calls_section_end|>" * (k + 1 == len(calls)), True))
    parts.append(("<|im_end|>", True))
    return [Segment(text, control=control, train=message.get("train", True)) for text, control in parts]
