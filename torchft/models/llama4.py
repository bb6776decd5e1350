"""Llama 4 text (Scout, Maverick): chunked attention with interleaved RoPE, every fourth layer whole and without it, one
expert for each token beside one that all use. Of the multimodal checkpoints the text model.

Model card: https://github.com/meta-llama/llama-models/tree/main/models/llama4. Weights: https://huggingface.co/meta-llama
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchft.errors import UserError
from torchft.hub_names import HubNames
from torchft.models import llama3
from torchft.models.config_json import field, one_of, optional, sizes, sizes_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.models.llama3 import RESPOND, TOOLS_IN_SYSTEM, TOOLS_IN_USER
from torchft.models.smollm3 import layers_with_rope
from torchft.modules.attention import Attention, QueryGrowth
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.masks import Sight
from torchft.modules.mlp import GatedMLP
from torchft.modules.moe import Experts, MoE
from torchft.modules.norms import BareRMSNorm, RMSNorm
from torchft.modules.rope import Llama3Rope, Rope
from torchft.modules.routers import SigmoidRouter
from torchft.tokenizers.chat import Message, Segment, join_parts

GROWTH = QueryGrowth(beta=0.1, every=8192, first=1)


@dataclass(frozen=True, kw_only=True)
class Llama4Config(DecoderConfig):
    """``hidden_dim`` is an expert's."""

    num_experts: int
    top_k: int = 1  # experts per token
    dense_dim: int = 16_384  # of the MLP in layers without experts
    moe_layers: tuple[int, ...]  # those with experts
    has_rope: tuple[bool, ...]  # of each layer; those that have it see chunks only
    chunk: int | None = 8192  # tokens
    has_qk_norm: bool  # in layers with RoPE, without weights
    growth: QueryGrowth | None = GROWTH  # in layers without RoPE
    attention_bias: bool = False


def _size(num_experts: int, every: int, context: int, rope: Rope, has_qk_norm: bool) -> Llama4Config:
    return Llama4Config(
        vocab_size=202_048, dim=5120, num_layers=48, num_heads=40, num_kv_heads=8, head_dim=128, hidden_dim=8192,
        max_seq_len=context, rope=rope, num_experts=num_experts, moe_layers=tuple(range(every - 1, 48, every)),
        has_rope=tuple((i + 1) % 4 != 0 for i in range(48)), has_qk_norm=has_qk_norm,
    )  # fmt: skip


CONFIGS = {
    #                                         experts every context    RoPE  qk norm
    "Llama-4-Scout-17B-16E":              _size(16, 1, 262_144, Llama3Rope(base=5e5, factor=8.0), True),
    "Llama-4-Scout-17B-16E-Instruct":
        _size(16, 1, 10_485_760, Llama3Rope(base=5e5, factor=16.0, high_freq_factor=1.0), True),
    "Llama-4-Maverick-17B-128E":          _size(128, 2, 262_144, Rope(base=5e5), False),
    "Llama-4-Maverick-17B-128E-Instruct": _size(128, 2, 1_048_576, Rope(base=5e5), False),
}  # fmt: skip

HUB = HubNames(
    llama3.HUB.renamed
    | {r"\.mlp\b": ".feed_forward", r"\.shared\b": ".shared_expert", r"(\.experts\.\w+)\.weight$": r"\1"},
    transposed=r"\.experts\.\w+\.weight$",
    peft_swaps=True,
)


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, Llama4Config)
    is_local = c.has_rope[i]
    norm = BareRMSNorm(c.norm_eps) if c.has_qk_norm and is_local else None  # a rotation keeps lengths: before is after
    attn = Attention(
        c.dim,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        bias=c.attention_bias,
        out_bias=c.attention_bias,
        q_norm=norm,
        k_norm=norm,
        interleaved=True,
        growth=None if is_local else c.growth,
    )
    return Block(
        attn,
        _experts(c) if i in c.moe_layers else GatedMLP(c.dim, c.dense_dim),
        attn_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_norm=RMSNorm(c.dim, c.norm_eps),
        rope=c.rope if is_local else None,
        sight=Sight(chunk=c.chunk if is_local else None),
    )


def _experts(c: Llama4Config) -> MoE:
    router = SigmoidRouter(c.dim, c.num_experts, c.top_k)
    shared = GatedMLP(c.dim, c.hidden_dim)
    return MoE(router, Experts(c.num_experts, c.dim, c.hidden_dim, weighs_input=True), shared=shared)


def build(c: Llama4Config) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> Llama4Config:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Llama 4 does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    json.get("router_jitter_noise")  # transformers does not use it
    one_of(json, "for_llm_compressor", False, default=False)
    num_layers = field(json, "num_hidden_layers", int)
    every = field(json, "interleave_moe_layer_step", int, default=1)
    moe_layers = json.get("moe_layers")
    if moe_layers is None:
        moe_layers = list(range(every - 1, num_layers, every))
    if not isinstance(moe_layers, list) or any(i not in range(num_layers) for i in moe_layers):
        raise UserError(f"config.json: moe_layers is {moe_layers!r:.80}, expected numbers of {num_layers} layers")
    rope_layers = layers_with_rope(json)
    chunk = optional(json, "attention_chunk_size", int, default=8192)
    kinds = ["chunked_attention" if has and chunk else "full_attention" for has in rope_layers]
    one_of(json, "layer_types", kinds, None, default=None)
    growth = QueryGrowth(
        beta=field(json, "attn_scale", float, default=0.1), every=field(json, "floor_scale", int, default=8192), first=1
    )
    return Llama4Config(
        **sizes(json, eps=1e-5, context=131_072, head_dim=128),
        rope=rope_from_hub(json, base=5e5),
        num_experts=field(json, "num_local_experts", int, default=16),
        top_k=field(json, "num_experts_per_tok", int, default=1),
        dense_dim=field(json, "intermediate_size_mlp", int, default=16_384),
        moe_layers=tuple(moe_layers),
        has_rope=rope_layers,
        chunk=chunk,
        has_qk_norm=field(json, "use_qk_norm", bool, default=True),
        growth=growth if json.get("attn_temperature_tuning", True) else None,  # true, or 4 in the released files
        attention_bias=field(json, "attention_bias", bool, default=False),
    )


def to_hub(c: Llama4Config) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    growth = c.growth or GROWTH
    return {
        **sizes_to_hub(c, "Llama4ForCausalLM", "llama4_text"),
        "num_local_experts": c.num_experts,
        "num_experts_per_tok": c.top_k,
        "intermediate_size_mlp": c.dense_dim,
        "moe_layers": list(c.moe_layers),
        "no_rope_layers": [int(has) for has in c.has_rope],
        "attention_chunk_size": c.chunk,
        "use_qk_norm": c.has_qk_norm,
        "attn_temperature_tuning": c.growth is not None,
        "attn_scale": growth.beta,
        "floor_scale": growth.every,
        "attention_bias": c.attention_bias,
        "hidden_act": "silu",
        **rope_to_hub(c.rope),
    }


# Chat: what the released template renders: Llama 3.1's without a date, in other tokens; only a system turn is stripped.

CHAT_TEMPLATE = """\
{%- set offered = tools is defined and tools is not none -%}
{%- set in_user = offered and (tools_in_user_message is not defined or tools_in_user_message) -%}
{%- set schemas = namespace(text='') -%}
{%- for t in tools or [] -%}{%- set schemas.text = schemas.text + (t | tojson(indent=4)) + '\\n\\n' -%}{%- endfor -%}
{{- '<|begin_of_text|>' -}}
{%- set rest = messages -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set rest = messages[1:] -%}
    {{- '<|header_start|>system<|header_end|>\\n\\n' + ('Environment: ipython\\n' if offered else '') -}}
    {{- IN_SYSTEM + schemas.text if offered and not in_user else '' -}}
    {{- messages[0]['content'] | trim + '<|eot|>' -}}
{%- endif -%}
{%- if in_user and (not rest or rest[0]['role'] != 'user') -%}
    {{- raise_exception('tools are put into the first user message') -}}
{%- endif -%}
{%- for message in rest -%}
    {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] -%}
    {%- set content = message['content'] if message['content'] is string else '' -%}
    {{- '<|header_start|>' + role + '<|header_end|>\\n\\n' -}}
    {%- if role == 'ipython' -%}
        {{- message['content'] | tojson if message['content'] is iterable else message['content'] -}}
    {%- elif message['tool_calls'] -%}
        {{- '<|python_start|>' + content + '<|python_end|>' -}}
        {%- for call in message['tool_calls'] -%}
            {{- '{"name": "' + call['function']['name'] + '", "parameters": ' -}}
            {{- (call['function']['arguments'] | tojson) + '}' -}}
        {%- endfor -%}
    {%- elif loop.first and in_user -%}
        {{- IN_USER + schemas.text + content | trim -}}
    {%- else -%}{{- content -}}{%- endif -%}
    {{- '<|eot|>' -}}
{%- endfor -%}
{{- '<|header_start|>assistant<|header_end|>\\n\\n' if add_generation_prompt else '' -}}
""".replace("IN_SYSTEM", repr(TOOLS_IN_SYSTEM + RESPOND)).replace("IN_USER", repr(TOOLS_IN_USER + RESPOND))


def chat(
    messages: Sequence[Message], *, tools: list[Any] | None = None, add_generation_prompt: bool = False,
    tools_in_user_message: bool = True,
) -> list[Segment]:  # fmt: skip
    """Llama 4's format. Offered tools go into the first user message, or into the system turn, if there is one."""
    schemas = "".join(json.dumps(tool, indent=4, ensure_ascii=False) + "\n\n" for tool in tools or [])
    segments, rest = [Segment("<|begin_of_text|>", control=True)], list(enumerate(messages))
    if messages[0]["role"] == "system":
        system = "Environment: ipython\n" if tools is not None else ""
        if tools is not None and not tools_in_user_message:
            system += TOOLS_IN_SYSTEM + RESPOND + schemas
        segments += _turn("system", [(system + join_parts(messages[0]["content"], 0).strip(), False)])
        rest = rest[1:]
    if tools is not None and tools_in_user_message:
        if not rest or rest[0][1]["role"] != "user":
            raise UserError("tools are put into the first user message, but the conversation does not start with one")
        i, first = rest.pop(0)
        asked = TOOLS_IN_USER + RESPOND + schemas + join_parts(first["content"], i).strip()
        segments += _turn("user", [(asked, False)])
    for i, message in rest:
        match message["role"]:
            case "assistant":
                segments += _turn("assistant", _answer(message, i), train=message.get("train", True))
            case "tool" | "ipython":
                content = message["content"]  # numbers as they are, all else, text too, as JSON
                is_json = isinstance(content, str | list | dict)
                text = json.dumps(content, ensure_ascii=False) if is_json else str(content)
                segments += _turn("ipython", [(text, False)])
            case role:
                segments += _turn(role, [(join_parts(message["content"], i), False)])
    return segments + _turn("assistant", [])[:1] * add_generation_prompt


def _turn(role: str, parts: list[tuple[str, bool]], *, train: bool = False) -> list[Segment]:
    """``parts``: texts, and whether they are control tokens."""
    segments = [Segment(text, control=control, train=train) for text, control in (*parts, ("<|eot|>", True))]
    return [Segment(f"<|header_start|>{role}<|header_end|>\n\n", control=True), *segments]


def _answer(message: Message, i: int) -> list[tuple[str, bool]]:
    """What the model must produce, but for the token that ends it."""
    content = (join_parts(message.get("content") or "", i), False)
    if not (calls := message.get("tool_calls")):
        return [content]
    texts = [
        f'{{"name": "{f["name"]}", "parameters": {json.dumps(f["arguments"], ensure_ascii=False)}}}'
        for f in (call["function"] for call in calls)
    ]
    return [("<|python_start|>", True), content, ("<|python_end|>", True), *((text, False) for text in texts)]
