"""GLM 4.5 (Air too) and 4.6: DeepSeek V3's mixture of experts in blocks with grouped-query attention; the first layers
are dense, half of each head rotates.

Paper: https://arxiv.org/abs/2508.06471. Weights: https://huggingface.co/zai-org
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchft.errors import UserError
from torchft.hub_names import STACKED, HubNames
from torchft.models import llama3
from torchft.models.config_experts import experts_from_hub, experts_to_hub
from torchft.models.config_json import field, one_of, sizes, sizes_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.mlp import GatedMLP
from torchft.modules.moe import Experts, MoE
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import Rope
from torchft.modules.routers import GroupedRouter
from torchft.tokenizers.chat import Message, Segment, join_parts, split_thought


@dataclass(frozen=True, kw_only=True)
class Glm4MoEConfig(DecoderConfig):
    """``hidden_dim`` is of the dense layers' MLPs."""

    num_experts: int
    top_k: int  # experts per token
    expert_dim: int
    num_shared: int = 1  # experts that all tokens use, as one MLP
    num_dense: int  # layers without experts, the first ones
    num_groups: int = 1
    top_groups: int = 1
    renormalises: bool = True
    expert_scale: float  # of the weights
    attention_bias: bool = True
    has_qk_norm: bool = False


def _size(
    dim: int, num_layers: int, hidden_dim: int, num_experts: int, expert_dim: int, num_dense: int, expert_scale: float,
    context: int, has_qk_norm: bool,
) -> Glm4MoEConfig:  # fmt: skip
    return Glm4MoEConfig(
        vocab_size=151_552, dim=dim, num_layers=num_layers, num_heads=96, num_kv_heads=8, head_dim=128,
        hidden_dim=hidden_dim, max_seq_len=context, rope=Rope(base=1e6, partial=0.5), num_experts=num_experts, top_k=8,
        expert_dim=expert_dim, num_dense=num_dense, expert_scale=expert_scale, has_qk_norm=has_qk_norm,
    )  # fmt: skip


_AIR = _size(4096, 46, 10_944, 128, 1408, 1, 1.0, 131_072, False)
_355B = _size(5120, 92, 12_288, 160, 1536, 3, 2.5, 131_072, True)
CONFIGS = {
    #                        dim layers hidden experts width dense scale context qk norm
    "GLM-4.5-Air":      _AIR,
    "GLM-4.5-Air-Base": _AIR,
    "GLM-4.5":          _355B,
    "GLM-4.5-Base":     _355B,
    "GLM-4.6":          _size(5120, 92, 12_288, 160, 1536, 3, 2.5, 202_752, True),
}  # fmt: skip

RENAMED = llama3.HUB.renamed | {
    r"\.router\.correction$": ".gate.e_score_correction_bias",
    r"\.router\b": ".gate",
    r"\.shared\b": ".shared_experts",
}
_EITHER: dict[str, Any] = {
    "keeps_dtype": r"\.correction$",
    "predictor": ("model.layers.{num_layers}.", "eh_proj."),
    "predictors": ("num_nextn_predict_layers", "num_mtp_layers"),
}
HUB = HubNames(
    RENAMED,
    per_expert=r"\.experts\b",
    split={"gate_up_proj": ("gate_proj", "up_proj")},
    stacked=HubNames(RENAMED | STACKED, **_EITHER),
    **_EITHER,
)


def mlp(c: Glm4MoEConfig, i: int) -> GatedMLP | MoE:
    if i < c.num_dense:
        return GatedMLP(c.dim, c.hidden_dim)
    router = GroupedRouter(
        c.dim, c.num_experts, c.top_k, num_groups=c.num_groups, top_groups=c.top_groups, renormalises=c.renormalises,
        scale=c.expert_scale,
    )  # fmt: skip
    return MoE(router, Experts(c.num_experts, c.dim, c.expert_dim), shared=GatedMLP(c.dim, c.num_shared * c.expert_dim))


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, Glm4MoEConfig)
    attn = Attention(
        c.dim,
        c.num_heads,
        c.num_kv_heads,
        c.head_dim,
        bias=c.attention_bias,
        q_norm=RMSNorm(c.head_dim, c.norm_eps) if c.has_qk_norm else None,
        k_norm=RMSNorm(c.head_dim, c.norm_eps) if c.has_qk_norm else None,
    )
    return Block(
        attn, mlp(c, i), attn_norm=RMSNorm(c.dim, c.norm_eps), mlp_norm=RMSNorm(c.dim, c.norm_eps), rope=c.rope
    )


def build(c: Glm4MoEConfig) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> Glm4MoEConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what GLM 4.5 does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    return Glm4MoEConfig(
        **sizes(json, eps=1e-5, context=131_072),
        rope=rope_from_hub(json, partial=0.5),
        **experts_from_hub(json, num_experts=128, num_dense=1, scale=1.0, groups=(1, 1)),
        attention_bias=field(json, "attention_bias", bool, default=False),
        has_qk_norm=field(json, "use_qk_norm", bool, default=False),
    )


def to_hub(c: Glm4MoEConfig) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, "Glm4MoeForCausalLM", "glm4_moe"),
        **experts_to_hub(c),
        "attention_bias": c.attention_bias,
        "use_qk_norm": c.has_qk_norm,
        "hidden_act": "silu",
        **rope_to_hub(c.rope),
    }


# Chat: no token ends a turn but the one that begins the next. It is learned as the end of an answer, and put behind the
# last one, so that the model learns to stop: what the released template renders, and that token.

_TOOLS = (
    "<|system|>\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
    "function signatures within <tools></tools> XML tags:\n<tools>\n",
    "</tools>\n\nFor each function call, output the function name and arguments within the following XML format:\n"
    "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>\n"
    "<arg_key>{arg-key-2}</arg_key>\n<arg_value>{arg-value-2}</arg_value>\n...\n</tool_call>",
)
CHAT_TEMPLATE = """\
{{- '[gMASK]<sop>' -}}
{%- if tools -%}
    {{- BEFORE -}}
    {%- for tool in tools -%}
        {{- (tool | tojson(ensure_ascii=False)) + '\\n' -}}
    {%- endfor -%}
    {{- AFTER -}}
{%- endif -%}
{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- set content = message['content'] if message['content'] is string else '' -%}
    {%- set is_open = not loop.first and messages[loop.index0 - 1]['role'] == 'assistant' -%}
    {%- if message['role'] == 'user' -%}
        {{- ('' if is_open else '<|user|>') + '\\n' + content -}}
        {%- if enable_thinking is defined and not enable_thinking and not content.endswith('/nothink') -%}
            {{- '/nothink' -}}
        {%- endif -%}
    {%- elif message['role'] == 'system' -%}
        {{- ('' if is_open else '<|system|>') + '\\n' + content -}}
    {%- elif message['role'] == 'tool' -%}
        {%- if not message['content'] is string -%}
            {%- set content = message['content'] | tojson(ensure_ascii=False) -%}
        {%- endif -%}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' -}}
    {%- else -%}
        {%- set thought = message['reasoning_content'] if message['reasoning_content'] is string else '' -%}
        {%- if not message['reasoning_content'] is string and '</think>' in content -%}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {{- '<|assistant|>\\n<think>' + (thought.strip() if loop.index0 > ns.last else '') + '</think>' -}}
        {{- '\\n' + content.strip() if content.strip() else '' -}}
        {%- for call in message['tool_calls'] or [] -%}
            {{- '\\n<tool_call>' + call['function']['name'] + '\\n' -}}
            {%- for key, value in call['function']['arguments'].items() -%}
                {%- set value = value if value is string else value | tojson(ensure_ascii=False) -%}
                {{- '<arg_key>' + key + '</arg_key>\\n<arg_value>' + value + '</arg_value>\\n' -}}
            {%- endfor -%}
            {{- '</tool_call>' -}}
        {%- endfor -%}
        {{- '<|observation|>' if message['tool_calls'] else '<|user|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' + ('\\n<think></think>' if enable_thinking is defined and not enable_thinking else '') -}}
{%- endif -%}
""".replace("BEFORE", repr(_TOOLS[0])).replace("AFTER", repr(_TOOLS[1]))


def chat(
    messages: Sequence[Message], *, tools: list[Any] | None = None, add_generation_prompt: bool = False,
    enable_thinking: bool = True,
) -> list[Segment]:  # fmt: skip
    """GLM 4.5's format. Reasoning is kept behind the last question only; ``enable_thinking`` false: none is wanted."""
    segments = [Segment("[gMASK]<sop>", control=True)]
    if tools:
        schemas = "".join(json.dumps(tool, ensure_ascii=False) + "\n" for tool in tools)
        segments += [Segment(_TOOLS[0], control=True), Segment(schemas), Segment(_TOOLS[1], control=True)]
    last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    for i, message in enumerate(messages):
        is_open = i > 0 and messages[i - 1]["role"] == "assistant"  # the answer's end is this turn's beginning
        match message["role"]:
            case "user" | "system" as role:
                text = join_parts(message["content"], i)
                wants_none = role == "user" and not enable_thinking and not text.endswith("/nothink")
                head = "\n" if is_open else f"<|{role}|>\n"
                segments += [Segment(head, control=True), Segment(text + "/nothink" * wants_none)]
            case "tool":
                content = message["content"]
                text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
                ends = [Segment(part, control=True) for part in ("\n<tool_response>\n", "\n</tool_response>")]
                segments += [ends[0], Segment(text), ends[1]]
            case "assistant":
                segments += [Segment("<|assistant|>", control=True), *_answer(message, i, keeps_thought=i > last_user)]
                end = "<|observation|>" if message.get("tool_calls") else "<|user|>"
                segments.append(Segment(end, control=True, train=message.get("train", True)))
            case role:
                raise UserError(f"message {i}: GLM 4.5's chat format has no role {role!r}")
    if add_generation_prompt:
        segments.append(Segment("<|assistant|>" + ("" if enable_thinking else "\n<think></think>"), control=True))
    return segments


def _answer(message: Message, i: int, *, keeps_thought: bool) -> list[Segment]:
    """What the model must produce, but for the token that ends it."""
    train, (thought, content) = message.get("train", True), split_thought(message, i)
    parts = [("\n<think>", True), (thought.strip() if keeps_thought else "", False), ("</think>", True)]
    parts += [("\n" + content.strip(), False)] if content.strip() else []
    for call in message.get("tool_calls", []):
        parts += [("\n<tool_call>", True), (call["function"]["name"] + "\n", False)]
        for key, value in call["function"]["arguments"].items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            parts += [("<arg_key>", True), (key, False), ("</arg_key>\n<arg_value>", True), (text, False)]
            parts.append(("</arg_value>\n", True))
        parts.append(("</tool_call>", True))
    return [Segment(text, control=control, train=train) for text, control in parts if text]
