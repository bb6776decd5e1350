# ruff: noqa: RUF001  DeepSeek's tokens are written so
"""DeepSeek V3, its later releases and R1: latent attention, and many experts chosen by corrected
sigmoids from some of their groups. Weights in blocks of FP8 are dequantised when they are read.

Paper: https://arxiv.org/abs/2412.19437. Weights: https://huggingface.co/deepseek-ai
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchft.errors import UserError
from torchft.hub_names import HubNames
from torchft.models import glm4_moe
from torchft.models.config_experts import experts_from_hub, experts_to_hub
from torchft.models.config_json import field, one_of, section, sizes, sizes_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub, yarn_scale
from torchft.models.glm4_moe import Glm4MoEConfig, mlp
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.masks import Sight
from torchft.modules.mla import LatentAttention
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import Rope, YarnRope
from torchft.tokenizers.chat import Message, Segment, join_parts, split_thought


@dataclass(frozen=True, kw_only=True)
class DeepseekV3Config(Glm4MoEConfig):
    """``head_dim`` is of queries and keys: ``rope.partial`` of it rotates. GLM's fields of the experts."""

    value_dim: int = 128  # of a head
    latent: int = 512  # that keys and values of all heads come from
    query_latent: int | None = 1536
    interleaved: bool = True  # RoPE's convention
    mscale: float = 0.0  # YaRN's weights for the rotation's amplitude, 0 as if absent, and
    mscale_all_dim: float = 0.0  # for that of whole queries and keys
    attention_bias: bool = False

    @property
    def rope_dim(self) -> int:
        return self.rope.rotary_dim(self.head_dim)


def size(
    vocab: int, dim: int, num_layers: int, num_heads: int, hidden_dim: int, num_experts: int, expert_dim: int,
    num_dense: int, expert_scale: float, context: int, rope: Rope, **more: Any,
) -> DeepseekV3Config:  # fmt: skip
    return DeepseekV3Config(
        vocab_size=vocab, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_heads, head_dim=192,
        hidden_dim=hidden_dim, max_seq_len=context, norm_eps=1e-6, num_experts=num_experts, top_k=more.pop("top_k", 8),
        expert_dim=expert_dim, num_dense=num_dense, expert_scale=expert_scale, rope=rope, **more,
    )  # fmt: skip


def yarn(base: float, factor: float, fast: float) -> YarnRope:
    return YarnRope(
        base=base, partial=1 / 3, factor=factor, original_max_seq_len=4096, fast=fast, slow=1.0, attention_factor=1.0
    )


MSCALES: dict[str, Any] = {"mscale": 1.0, "mscale_all_dim": 1.0}
_V3 = size(
    129_280, 7168, 61, 128, 18_432, 256, 2048, 3, 2.5, 163_840, yarn(1e4, 40.0, 32.0), num_groups=8, top_groups=4,
    **MSCALES,
)  # fmt: skip
CONFIGS = {
    **dict.fromkeys([f"DeepSeek-{name}" for name in ("V3-Base", "V3", "V3-0324", "R1", "R1-0528")], _V3),
    **dict.fromkeys(["DeepSeek-V3.1-Base", "DeepSeek-V3.1"], _V3),
}


def _names(names: HubNames) -> HubNames:
    latent = {r"\.(q|kv)_a_norm\b": r".\1_a_layernorm", r"\.kv_a_proj\b": ".kv_a_proj_with_mqa"}
    return replace(names, renamed=names.renamed | latent, stacked=names.stacked and _names(names.stacked))


HUB = _names(glm4_moe.HUB)


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, DeepseekV3Config)
    scale = c.head_dim**-0.5
    if isinstance(c.rope, YarnRope) and c.mscale_all_dim:
        scale *= yarn_scale(c.rope.factor, c.mscale_all_dim) ** 2
    attn = LatentAttention(
        c.dim, c.num_heads, plain_dim=c.head_dim - c.rope_dim, rope_dim=c.rope_dim, value_dim=c.value_dim,
        latent=c.latent, query_latent=c.query_latent, scale=scale, interleaved=c.interleaved, bias=c.attention_bias,
    )  # fmt: skip
    return Block(
        attn,
        mlp(c, i),
        attn_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_norm=RMSNorm(c.dim, c.norm_eps),
        rope=c.rope,
        sight=Sight(head_dim=c.head_dim),
    )


def build(c: DeepseekV3Config) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> DeepseekV3Config:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what DeepSeek V3 does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    one_of(json, "scoring_func", "sigmoid", default="sigmoid")
    one_of(json, "topk_method", "noaux_tc", default="noaux_tc")
    one_of(json, "moe_layer_freq", 1, default=1)
    rope_dim = field(json, "qk_rope_head_dim", int, default=64)
    head_dim = field(json, "qk_nope_head_dim", int, default=128) + rope_dim
    for key in ("head_dim", "qk_head_dim"):  # as transformers writes them, from the two above
        one_of(json, key, rope_dim, head_dim, None, default=None)
    yarn = section(json, "rope_parameters") or section(json, "rope_scaling")
    has_query_latent = "q_lora_rank" not in json or json.get("q_lora_rank") is not None
    shape = sizes(json, context=4096, head_dim=head_dim) | {"head_dim": head_dim}
    return DeepseekV3Config(
        **shape,
        rope=rope_from_hub(json, partial=rope_dim / head_dim),
        **experts_from_hub(json, num_experts=256, num_dense=3, scale=2.5, groups=(8, 4)),
        value_dim=field(json, "v_head_dim", int, default=128),
        latent=field(json, "kv_lora_rank", int, default=512),
        query_latent=field(json, "q_lora_rank", int, default=1536) if has_query_latent else None,
        interleaved=field(json, "rope_interleave", bool, default=True),
        mscale=field(yarn, "mscale", float) if yarn.get("mscale") else 0.0,
        mscale_all_dim=field(yarn, "mscale_all_dim", float) if yarn.get("mscale_all_dim") else 0.0,
        attention_bias=field(json, "attention_bias", bool, default=False),
    )


def to_hub(c: DeepseekV3Config) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    rope = rope_to_hub(replace(c.rope, partial=1.0))
    if c.mscale:
        rope["rope_scaling"] |= {"mscale": c.mscale, "mscale_all_dim": c.mscale_all_dim}
    fields = sizes_to_hub(c, "DeepseekV3ForCausalLM", "deepseek_v3")
    del fields["head_dim"]
    return {
        **fields,
        **experts_to_hub(c),
        "qk_rope_head_dim": c.rope_dim,
        "qk_nope_head_dim": c.head_dim - c.rope_dim,
        "v_head_dim": c.value_dim,
        "kv_lora_rank": c.latent,
        "q_lora_rank": c.query_latent,
        "rope_interleave": c.interleaved,
        "attention_bias": c.attention_bias,
        "hidden_act": "silu",
        **rope,
    }


# Chat: V3's format, where every turn keeps its reasoning as R1 writes it. The released templates drop it, or open it in
# the generation prompt, so that what answers must learn cannot be told; of tools they know calls and results alone.

CHAT_TEMPLATE = """\
{{- '<｜begin▁of▁sentence｜>' + (messages[0]['content'] if messages[0]['role'] == 'system' else '') -}}
{%- for message in messages -%}
    {%- set content = message['content'] if message['content'] is string else '' -%}
    {%- set before = messages[loop.index0 - 1]['role'] if not loop.first else 'user' -%}
    {%- if message['role'] == 'user' -%}
        {{- '<｜User｜>' + content -}}
    {%- elif message['role'] == 'tool' -%}
        {%- set content = content if message['content'] is string else message['content'] | tojson -%}
        {{- '' if before == 'tool' else '<｜tool▁outputs▁begin｜>' -}}
        {{- '<｜tool▁output▁begin｜>' + content + '<｜tool▁output▁end｜>' -}}
        {{- '<｜tool▁outputs▁end｜>' if loop.last or loop.nextitem['role'] != 'tool' else '' -}}
    {%- elif message['role'] == 'assistant' -%}
        {%- set thought = message['reasoning_content'] if message['reasoning_content'] is string else '' -%}
        {%- if not message['reasoning_content'] is string and '</think>' in content -%}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {{- '' if before == 'tool' else '<｜Assistant｜>' -}}
        {{- ('<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' if thought.strip('\\n') else '') + content -}}
        {%- for call in message['tool_calls'] or [] -%}
            {%- set arguments = call['function']['arguments'] -%}
            {{- '<｜tool▁calls▁begin｜>' if loop.first else '\\n' -}}
            {{- '<｜tool▁call▁begin｜>function<｜tool▁sep｜>' + call['function']['name'] + '\\n```json\\n' -}}
            {{- (arguments if arguments is string else arguments | tojson) + '\\n```<｜tool▁call▁end｜>' -}}
            {{- '<｜tool▁calls▁end｜>' if loop.last else '' -}}
        {%- endfor -%}
        {{- '<｜end▁of▁sentence｜>' -}}
    {%- elif not loop.first or message['role'] != 'system' -%}
        {{- raise_exception('no role ' + message['role'] + ' here') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '' if messages[-1]['role'] == 'tool' else '<｜Assistant｜>' -}}
    {{- '<think>\\n' if enable_thinking is defined and enable_thinking else '' -}}
{%- endif -%}
"""


def chat(
    messages: Sequence[Message], *, tools: list[Any] | None = None, add_generation_prompt: bool = False,
    enable_thinking: bool = False,
) -> list[Segment]:  # fmt: skip
    """DeepSeek V3's and R1's format with the reasoning of every turn. It has no place for ``tools``: they are left out,
    as the released templates do. ``enable_thinking``: the prompt opens the reasoning."""
    segments = [Segment("<｜begin▁of▁sentence｜>", control=True)]
    for i, message in enumerate(messages):
        follows_tool = i > 0 and messages[i - 1]["role"] == "tool"  # whose end is then the answer's beginning
        match message["role"]:
            case "system" | "user" as role:
                mark = [Segment("<｜User｜>", control=True)] * (role == "user")
                segments += [*mark, Segment(join_parts(message["content"], i))]
            case "assistant":
                segments += [Segment("<｜Assistant｜>", control=True)] * (not follows_tool) + _answer(message, i)
            case "tool":
                content = message["content"]
                text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
                is_last = i + 1 == len(messages) or messages[i + 1]["role"] != "tool"
                begin = "<｜tool▁outputs▁begin｜>" * (not follows_tool) + "<｜tool▁output▁begin｜>"
                end = "<｜tool▁output▁end｜>" + "<｜tool▁outputs▁end｜>" * is_last
                segments += [Segment(begin, control=True), Segment(text), Segment(end, control=True)]
            case role:
                raise UserError(f"message {i}: DeepSeek V3's chat format has no role {role!r}")
    if add_generation_prompt:
        follows_tool = messages[-1]["role"] == "tool"
        segments.append(Segment("<｜Assistant｜>" * (not follows_tool) + "<think>\n" * enable_thinking, control=True))
    return segments


def _answer(message: Message, i: int) -> list[Segment]:
    """What the model must produce."""
    (thought, content), calls = split_thought(message, i), message.get("tool_calls", [])
    thought = thought.strip("\n")
    parts = [("<think>\n", True), (thought, False), ("\n</think>\n\n", True)] * bool(thought) + [(content, False)]
    for k, call in enumerate(calls):
        text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        parts += [
            ("\n" if k else "<｜tool▁calls▁begin｜>", True),
            ("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", True),
        ]
        parts += [(f"{call['function']['name']}\n```json\n{text}\n```", False), ("<｜tool▁call▁end｜>", True)]
    parts.append(("<｜tool▁calls▁end｜>" * bool(calls) + "<｜end▁of▁sentence｜>", True))
    return [Segment(text, control=control, train=message.get("train", True)) for text, control in parts]
