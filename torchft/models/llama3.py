"""Llama 3, 3.1, 3.2 (text) and 3.3: the reference family, whose Hub names are ours but for the norms.

Paper: https://arxiv.org/abs/2407.21783. Weights: https://huggingface.co/meta-llama
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from torchft.errors import UserError
from torchft.hub_names import HubNames
from torchft.models.config_json import field, one_of, sizes, sizes_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.mlp import GatedMLP
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import Llama3Rope, Rope
from torchft.tokenizers.chat import Message, Segment, join_parts

MODEL_TYPE = "llama"  # in config.json


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(DecoderConfig):
    attention_bias: bool = False
    mlp_bias: bool = False


ROPE_3 = Rope(base=500_000.0)
ROPE_31 = Llama3Rope(base=500_000.0, factor=8.0)
ROPE_32 = Llama3Rope(base=500_000.0, factor=32.0)


def _size(dim: int, num_layers: int, num_heads: int, hidden_dim: int, rope: Rope, **more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128_256, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=8,
        head_dim=dim // num_heads, hidden_dim=hidden_dim, max_seq_len=8_192 if rope is ROPE_3 else 131_072,
        rope=rope, **more,
    )  # fmt: skip


CONFIGS = {
    #                            dim layers heads hidden  rope
    "Meta-Llama-3-8B":   _size( 4096,  32,  32, 14_336, ROPE_3),
    "Meta-Llama-3-70B":  _size( 8192,  80,  64, 28_672, ROPE_3),
    "Llama-3.1-8B":      _size( 4096,  32,  32, 14_336, ROPE_31),
    "Llama-3.1-70B":     _size( 8192,  80,  64, 28_672, ROPE_31),
    "Llama-3.1-405B":    _size(16384, 126, 128, 53_248, ROPE_31),
    "Llama-3.2-1B":      _size( 2048,  16,  32,  8_192, ROPE_32, tie_embeddings=True),
    "Llama-3.2-3B":      _size( 3072,  28,  24,  8_192, ROPE_32, tie_embeddings=True),
    "Llama-3.3-70B-Instruct": _size(8192, 80, 64, 28_672, ROPE_31),
}  # fmt: skip

HUB = HubNames(
    {
        r"^(?!lm_head)": "model.",
        r"\.attn_norm\b": ".input_layernorm",
        r"\.mlp_norm\b": ".post_attention_layernorm",
    }
)


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, LlamaConfig)
    return Block(
        Attention(c.dim, c.num_heads, c.num_kv_heads, c.head_dim, bias=c.attention_bias, out_bias=c.attention_bias),
        GatedMLP(c.dim, c.hidden_dim, bias=c.mlp_bias),
        attn_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_norm=RMSNorm(c.dim, c.norm_eps),
        rope=c.rope,
    )


def build(c: LlamaConfig) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> LlamaConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Llama does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    return LlamaConfig(
        **sizes(json, context=2048),
        rope=rope_from_hub(json),
        attention_bias=field(json, "attention_bias", bool, default=False),
        mlp_bias=field(json, "mlp_bias", bool, default=False),
    )


def to_hub(c: LlamaConfig) -> dict[str, Any]:
    """The config.json of a model that was built from a row of ``CONFIGS``; the inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, "LlamaForCausalLM", MODEL_TYPE),
        "hidden_act": "silu",
        "attention_bias": c.attention_bias,
        "mlp_bias": c.mlp_bias,
        **rope_to_hub(c.rope),
    }


# Chat: Llama 3's format, and 3.1's (3.3 too) and 3.2's, which open with a dated system turn and know tools.

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
    {{- message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

_BEGIN = Segment("<|begin_of_text|>", control=True)
RESPOND = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)
TOOLS_IN_SYSTEM = (
    "You have access to the following functions. To call a function, please respond with JSON for a function call."
)
TOOLS_IN_USER = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that best "
    "answers the given prompt.\n\n"
)


def chat(
    messages: Sequence[Message], *, tools: list[Any] | None = None, add_generation_prompt: bool = False
) -> list[Segment]:
    """Llama 3's format. It has no place for tools: they are left out, as the released template does."""
    segments = [_BEGIN]
    for i, message in enumerate(messages):
        if "tool_calls" in message:
            raise UserError(f"message {i} calls a tool, which Llama 3's chat format cannot say; Llama 3.1's can")
        segments += _turn(message["role"], _content(message, i), train=_is_learned(message))
    return segments + _header("assistant") * add_generation_prompt


def chat_3_1(
    messages: Sequence[Message], *, tools: list[Any] | None = None, add_generation_prompt: bool = False,
    date_string: str = "26 Jul 2024", tools_in_user_message: bool = True, builtin_tools: Sequence[str] | None = None,
) -> list[Segment]:  # fmt: skip
    """Llama 3.1's and 3.3's format. ``builtin_tools``: names of Meta's own, such as "code_interpreter"."""
    schemas = "".join(json.dumps(tool, indent=4, ensure_ascii=False) + "\n\n" for tool in tools or [])
    system = "Environment: ipython\n" if tools is not None or builtin_tools is not None else ""
    if builtin_tools is not None:
        system += "Tools: " + ", ".join(name for name in builtin_tools if name != "code_interpreter") + "\n\n"
    system += f"Cutting Knowledge Date: December 2023\nToday Date: {date_string}\n\n"
    if tools is not None and not tools_in_user_message:
        system += TOOLS_IN_SYSTEM + RESPOND + schemas
    rest = list(enumerate(messages))
    if messages[0]["role"] == "system":
        system += _content(messages[0], 0)
        rest = rest[1:]
    segments = [_BEGIN, *_turn("system", system)]
    if tools is not None and tools_in_user_message:
        if not rest or rest[0][1]["role"] != "user":
            raise UserError("tools are put into the first user message, but the conversation does not start with one")
        i, first = rest.pop(0)
        segments += _turn("user", TOOLS_IN_USER + RESPOND + schemas + _content(first, i))
    for i, message in rest:
        if "tool_calls" in message:
            segments += _tool_call(message, i, builtin_tools)
        elif message["role"] in ("tool", "ipython"):
            content = message["content"]  # numbers as they are, all else, text too, as JSON
            is_json = isinstance(content, str | list | dict)
            segments += _turn("ipython", json.dumps(content, ensure_ascii=False) if is_json else str(content))
        else:
            segments += _turn(message["role"], _content(message, i), train=_is_learned(message))
    return segments + _header("assistant") * add_generation_prompt


def chat_3_2(
    messages: Sequence[Message], *, tools: list[Any] | None = None, add_generation_prompt: bool = False,
    date_string: str | None = None, tools_in_user_message: bool = True,
) -> list[Segment]:  # fmt: skip
    """Llama 3.2's format: 3.1's with today's date, so give ``date_string`` where runs must repeat exactly."""
    return chat_3_1(
        messages, tools=tools, add_generation_prompt=add_generation_prompt, tools_in_user_message=tools_in_user_message,
        date_string=date_string or datetime.now().strftime("%d %b %Y"),
    )  # fmt: skip


def _header(role: str) -> list[Segment]:
    return [Segment(f"<|start_header_id|>{role}<|end_header_id|>\n\n", control=True)]


def _turn(role: str, text: str, *, train: bool = False) -> list[Segment]:
    return [*_header(role), Segment(text, train=train), Segment("<|eot_id|>", control=True, train=train)]


def _tool_call(message: Message, i: int, builtin_tools: Sequence[str] | None) -> list[Segment]:
    if len(message["tool_calls"]) != 1:
        raise UserError(
            f"message {i} has {len(message['tool_calls'])} tool calls; Llama 3's chat formats know one at a time"
        )
    function, train = message["tool_calls"][0]["function"], _is_learned(message)
    name, arguments = function["name"], function["arguments"]
    end = Segment("<|eot_id|>" if builtin_tools is None else "<|eom_id|>", control=True, train=train)
    if builtin_tools is not None and name in builtin_tools:
        call = ", ".join(f'{key}="{value}"' for key, value in arguments.items())
        tag = Segment("<|python_tag|>", control=True, train=train)
        return [*_header("assistant"), tag, Segment(f"{name}.call({call})", train=train), end]
    call = json.dumps(arguments, ensure_ascii=False)
    return [*_header("assistant"), Segment(f'{{"name": "{name}", "parameters": {call}}}', train=train), end]


def _content(message: Message, i: int) -> str:
    return join_parts(message["content"], i).strip()


def _is_learned(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("train", True)
