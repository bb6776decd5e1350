"""Llama 2: Llama 3's architecture with a 32k sentencepiece vocabulary and plain RoPE.

Paper: https://arxiv.org/abs/2307.09288. Weights: https://huggingface.co/meta-llama
"""

from collections.abc import Sequence
from typing import Any

from torchft.errors import UserError
from torchft.models.llama3 import (  # noqa: F401  the same architecture
    HUB,
    MODEL_TYPE,
    LlamaConfig,
    block,
    build,
    from_hub,
    to_hub,
)
from torchft.tokenizers.chat import Message, Segment, join_parts


def _size(dim: int, num_layers: int, num_heads: int, num_kv_heads: int, hidden_dim: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32_000, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=dim // num_heads, hidden_dim=hidden_dim, max_seq_len=4096,
    )  # fmt: skip


CONFIGS = {
    #                        dim layers heads kv hidden
    "Llama-2-7b-hf":  _size(4096, 32, 32, 32, 11_008),
    "Llama-2-13b-hf": _size(5120, 40, 40, 40, 13_824),
    "Llama-2-70b-hf": _size(8192, 80, 64,  8, 28_672),
}  # fmt: skip


# Chat: [INST] and <<SYS>> are plain text; only <s> and </s> around each exchange are tokens of their own.

CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' -%}
    {%- set system, turns = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n', messages[1:] -%}
{%- else -%}
    {%- set system, turns = '', messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if message['role'] != ('user' if loop.index0 is even else 'assistant') -%}
        {{- raise_exception('after the system message, user and assistant must take turns') -}}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + ((system if loop.first else '') + message['content']).strip() + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + message['content'].strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""


def chat(
    messages: Sequence[Message], *, tools: list[Any] | None = None, add_generation_prompt: bool = False
) -> list[Segment]:
    """Llama 2's format, which knows no tools and whose generation prompt is empty."""
    has_system = messages[0]["role"] == "system"
    system = f"<<SYS>>\n{join_parts(messages[0]['content'], 0)}\n<</SYS>>\n\n" if has_system else ""
    segments = []
    for i, message in enumerate(messages[has_system:]):
        if message["role"] != ("user", "assistant")[i % 2] or "tool_calls" in message:
            raise UserError(
                f"message {i + has_system} ({message['role']}): Llama 2's chat format has only user and assistant "
                "messages in turn, after an optional system message, and no tool calls"
            )
        text = join_parts(message["content"], i + has_system)
        if message["role"] == "user":
            segments += [Segment("<s>", control=True), Segment(f"[INST] {(system + text).strip()} [/INST]")]
            system = ""
        else:
            train = message.get("train", True)
            segments += [Segment(f" {text.strip()} ", train=train), Segment("</s>", control=True, train=train)]
    return segments
