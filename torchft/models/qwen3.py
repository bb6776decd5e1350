"""Qwen 3 (dense) and its 2507 releases: Llama's block with normed queries and keys, and heads wider than dim / heads.

Paper: https://arxiv.org/abs/2505.09388. Weights: https://huggingface.co/Qwen
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchft.errors import UserError
from torchft.models import llama3
from torchft.models.config_json import field, one_of, sizes, sizes_to_hub, windows_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.models.qwen2 import optional_windows
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.masks import Sight
from torchft.modules.mlp import GatedMLP
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import Rope
from torchft.tokenizers.chat import Message, Segment, join_parts, split_thought


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(DecoderConfig):
    attention_bias: bool = False


def _size(
    dim: int, num_layers: int, num_heads: int, num_kv_heads: int, hidden_dim: int, context: int, base: float, tied: bool
) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151_936, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=128, hidden_dim=hidden_dim, max_seq_len=context, norm_eps=1e-6, rope=Rope(base=base),
        tie_embeddings=tied,
    )  # fmt: skip


CONFIGS = {
    #                             dim layers heads kv hidden context   base  tied
    "Qwen3-0.6B-Base":     _size(1024, 28, 16, 8,  3_072,  32_768, 1e6, True),
    "Qwen3-1.7B-Base":     _size(2048, 28, 16, 8,  6_144,  32_768, 1e6, True),
    "Qwen3-4B-Base":       _size(2560, 36, 32, 8,  9_728,  32_768, 1e6, True),
    "Qwen3-8B-Base":       _size(4096, 36, 32, 8, 12_288,  32_768, 1e6, False),
    "Qwen3-14B-Base":      _size(5120, 40, 40, 8, 17_408,  32_768, 1e6, False),
    "Qwen3-0.6B":          _size(1024, 28, 16, 8,  3_072,  40_960, 1e6, True),
    "Qwen3-1.7B":          _size(2048, 28, 16, 8,  6_144,  40_960, 1e6, True),
    "Qwen3-4B":            _size(2560, 36, 32, 8,  9_728,  40_960, 1e6, True),
    "Qwen3-8B":            _size(4096, 36, 32, 8, 12_288,  40_960, 1e6, False),
    "Qwen3-14B":           _size(5120, 40, 40, 8, 17_408,  40_960, 1e6, False),
    "Qwen3-32B":           _size(5120, 64, 64, 8, 25_600,  40_960, 1e6, False),
    "Qwen3-4B-Instruct-2507": _size(2560, 36, 32, 8, 9_728, 262_144, 5e6, True),
    "Qwen3-4B-Thinking-2507": _size(2560, 36, 32, 8, 9_728, 262_144, 5e6, True),
}  # fmt: skip

HUB = llama3.HUB


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, Qwen3Config)
    attn = Attention(
        c.dim,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        bias=c.attention_bias,
        out_bias=c.attention_bias,
        q_norm=RMSNorm(c.head_dim, c.norm_eps),
        k_norm=RMSNorm(c.head_dim, c.norm_eps),
    )
    return Block(
        attn,
        GatedMLP(c.dim, c.hidden_dim),
        attn_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_norm=RMSNorm(c.dim, c.norm_eps),
        rope=c.rope,
        sight=Sight(window=c.window(i)),
    )


def build(c: Qwen3Config) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> Qwen3Config:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Qwen 3 does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    return Qwen3Config(
        **sizes(json, context=32_768, head_dim=128),
        rope=rope_from_hub(json),
        windows=optional_windows(json, from_layer=28),
        attention_bias=field(json, "attention_bias", bool, default=False),
    )


def to_hub(c: Qwen3Config) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, "Qwen3ForCausalLM", "qwen3"),
        **windows_to_hub(c),
        "use_sliding_window": bool(c.windows),
        "attention_bias": c.attention_bias,
        "hidden_act": "silu",
        **rope_to_hub(c.rope),
    }


# Chat: the released template drops the reasoning of all but the last turn, so that what earlier turns must learn cannot
# be told; here, and in what is exported after training with ``chat_format: qwen3``, every turn keeps it.

_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>",
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
)
CHAT_TEMPLATE = """\
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else none -%}
{%- if tools -%}
    {{- '<|im_start|>system\\n' + (system + '\\n\\n' if system is not none else '') -}}
    {{- BEFORE -}}
    {%- for tool in tools -%}
        {{- '\\n' + (tool | tojson) -}}
    {%- endfor -%}
    {{- AFTER + '<|im_end|>\\n' -}}
{%- elif system is not none -%}
    {{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set content = message['content'] if message['content'] is string else '' -%}
    {%- if message['role'] == 'user' -%}
        {{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' -}}
    {%- elif message['role'] == 'tool' -%}
        {%- if loop.previtem['role'] != 'tool' -%}
            {{- '<|im_start|>user' -}}
        {%- endif -%}
        {%- set content = content if message['content'] is string else message['content'] | tojson -%}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' -}}
        {%- if loop.last or loop.nextitem['role'] != 'tool' -%}
            {{- '<|im_end|>\\n' -}}
        {%- endif -%}
    {%- elif message['role'] == 'assistant' -%}
        {%- set thought = message['reasoning_content'] if message['reasoning_content'] is string else '' -%}
        {%- if not message['reasoning_content'] is string and '</think>' in content -%}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {{- '<|im_start|>assistant\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}
        {{- content.lstrip('\\n') -}}
        {%- for call in message['tool_calls'] or [] -%}
            {%- set arguments = call['function']['arguments'] -%}
            {{- ('\\n' if content or not loop.first else '') + '<tool_call>\\n{"name": "' + call['function']['name'] -}}
            {{- '", "arguments": ' + (arguments if arguments is string else arguments | tojson) + '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- elif not loop.first -%}
        {{- raise_exception('no role ' + message['role'] + ' here') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}
        {{- '<think>\\n\\n</think>\\n\\n' -}}
    {%- endif -%}
{%- endif -%}
""".replace("BEFORE", repr(_TOOLS[0])).replace("AFTER", repr(_TOOLS[1]))


def chat(
    messages: Sequence[Message], *, tools: list[Any] | None = None, add_generation_prompt: bool = False,
    enable_thinking: bool = True,
) -> list[Segment]:  # fmt: skip
    """Qwen 3's format with the reasoning of every turn. ``enable_thinking`` false: the prompt closes it at once."""
    has_system = messages[0]["role"] == "system"
    system = join_parts(messages[0]["content"], 0) if has_system else None
    segments = []
    if tools:
        schemas = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
        before = "" if system is None else system + "\n\n"
        head, foot = (Segment(text, control=True) for text in _TOOLS)
        segments = [*begin("system"), Segment(before), head, Segment(schemas), foot, end()]
    elif system is not None:
        segments = [*begin("system"), Segment(system), end()]
    for i, message in list(enumerate(messages))[has_system:]:
        match message["role"]:
            case "user":
                segments += [*begin("user"), Segment(join_parts(message["content"], i)), end()]
            case "assistant":
                segments += begin("assistant") + _answer(message, i)
            case "tool":
                is_first = messages[i - 1]["role"] != "tool"
                is_last = i + 1 == len(messages) or messages[i + 1]["role"] != "tool"
                segments += result(message["content"], is_first=is_first) + [end()] * is_last
            case role:
                raise UserError(f"message {i}: Qwen 3's chat format has no role {role!r}")
    if add_generation_prompt:
        segments += begin("assistant")
        segments += [Segment("<think>\n\n</think>\n\n", control=True)] * (not enable_thinking)
    return segments


def begin(role: str) -> list[Segment]:
    return [Segment(f"<|im_start|>{role}\n", control=True)]


def end(*, train: bool = False) -> Segment:
    return Segment("<|im_end|>\n", control=True, train=train)


def _answer(message: Message, i: int) -> list[Segment]:
    train, (thought, content) = message.get("train", True), split_thought(message, i)
    segments = [
        Segment("<think>\n", control=True, train=train),
        Segment(thought.strip("\n"), train=train),
        Segment("\n</think>\n\n", control=True, train=train),
        Segment(content.lstrip("\n"), train=train),
    ]
    for k, call in enumerate(message.get("tool_calls", [])):
        name, arguments = call["function"]["name"], json.dumps(call["function"]["arguments"], ensure_ascii=False)
        before = "\n" if k or content else ""
        segments += [
            Segment(f"{before}<tool_call>\n", control=True, train=train),
            Segment(f'{{"name": "{name}", "arguments": {arguments}}}', train=train),
            Segment("\n</tool_call>", control=True, train=train),
        ]
    return [*segments, end(train=train)]


def result(content: Any, *, is_first: bool) -> list[Segment]:
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    begin = Segment("<|im_start|>user" * is_first + "\n<tool_response>\n", control=True)
    return [begin, Segment(text), Segment("\n</tool_response>", control=True)]
