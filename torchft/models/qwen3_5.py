"""Qwen 3.5 text, dense and with experts: Qwen 3 Next with DeltaNet's projections in plain order. Of the multimodal
checkpoints the text model, whose three-dimensional RoPE is the plain one for text.

Weights: https://huggingface.co/Qwen
"""

import json
from collections.abc import Sequence
from typing import Any

from torchft.errors import UserError
from torchft.models import qwen3_next
from torchft.models.config_json import field, one_of, section, sizes, sizes_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.models.qwen3 import begin, end, result
from torchft.models.qwen3_next import HUB, Qwen3NextConfig, block, build, mixers_from_hub  # noqa: F401
from torchft.modules.rope import Rope
from torchft.tokenizers.chat import Message, Segment, join_parts, split_thought

DENSE, MOE = "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"


def _size(
    dim: int, num_layers: int, num_heads: int, num_kv_heads: int, hidden_dim: int, delta_heads: int, **more: Any
) -> Qwen3NextConfig:
    return Qwen3NextConfig(
        vocab_size=248_320, dim=dim, num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_kv_heads,
        head_dim=256, hidden_dim=hidden_dim, max_seq_len=262_144, norm_eps=1e-6, rope=Rope(base=1e7, partial=0.25),
        is_recurrent=tuple((i + 1) % 4 != 0 for i in range(num_layers)), delta_heads=delta_heads, is_grouped=False,
        **more,
    )  # fmt: skip


def _experts(num_experts: int, top_k: int, expert_dim: int) -> dict[str, Any]:
    return {"num_experts": num_experts, "top_k": top_k, "expert_dim": expert_dim, "shared_dim": expert_dim}


CONFIGS = {
    #                       dim layers heads kv hidden delta heads
    "Qwen3.5-0.8B":      _size(1024, 24,  8, 2,  3_584, 16, tie_embeddings=True),
    "Qwen3.5-2B":        _size(2048, 24,  8, 2,  6_144, 16, tie_embeddings=True),
    "Qwen3.5-4B":        _size(2560, 32, 16, 4,  9_216, 32, tie_embeddings=True),
    "Qwen3.5-9B":        _size(4096, 32, 16, 4, 12_288, 32),
    "Qwen3.5-27B":       _size(5120, 64, 24, 4, 17_408, 48),
    "Qwen3.5-35B-A3B":   _size(2048, 40, 16, 2,    512, 32, **_experts(256, 8, 512)),
    "Qwen3.5-122B-A10B": _size(3072, 48, 32, 2,  1_024, 64, **_experts(256, 8, 1024)),
    "Qwen3.5-397B-A17B": _size(4096, 60, 32, 2,  1_024, 64, **_experts(512, 10, 1024)),
}  # fmt: skip


def from_hub(json: dict[str, Any]) -> Qwen3NextConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what Qwen 3.5 does not have."""
    rope = section(json, "rope_parameters")
    for key in ("mrope_section", "mrope_interleaved"):  # how images' positions are spread; text has one position
        rope.get(key)
    for key in ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "mamba_ssm_dtype"):  # not of what is trained
        json.get(key)
    one_of(json, "mlp_only_layers", [], None, default=[])
    one_of(json, "norm_topk_prob", True, default=True)
    one_of(json, "attn_output_gate", True, default=True)
    experts: dict[str, Any] = {}
    if json["architectures"] == [MOE]:
        expert_dim = field(json, "moe_intermediate_size", int, default=512)
        experts = {
            "num_experts": field(json, "num_experts", int, default=field(json, "num_local_experts", int, default=256)),
            "top_k": field(json, "num_experts_per_tok", int, default=8),
            "expert_dim": expert_dim,
            "shared_dim": field(json, "shared_expert_intermediate_size", int, default=512),
        }
    return Qwen3NextConfig(
        **sizes(json, context=32_768, head_dim=256, hidden=experts.get("expert_dim")),  # with experts, of no MLP
        **mixers_from_hub(json),
        **experts,
        rope=rope_from_hub(json, partial=0.25),
        is_grouped=False,
    )


def to_hub(c: Qwen3NextConfig) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    names = (MOE, "qwen3_5_moe_text") if c.num_experts else (DENSE, "qwen3_5_text")
    experts = {
        "num_experts": c.num_experts,
        "num_experts_per_tok": c.top_k,
        "moe_intermediate_size": c.expert_dim,
        "shared_expert_intermediate_size": c.shared_dim,
    }
    return {
        **sizes_to_hub(c, *names),
        **qwen3_next.mixers_to_hub(c),
        **(experts if c.num_experts else {}),
        **rope_to_hub(c.rope),
    }


# Chat: the released template drops the reasoning of all but the last turn; here, and in what is exported after training
# with ``chat_format: qwen3_5``, every turn keeps it, as in Qwen 3's format. Calls are written as XML.

_TOOLS = (
    "# Tools\n\nYou have access to the following functions:\n\n<tools>",
    "\n</tools>\n\nIf you choose to call a function ONLY reply in the following format with NO suffix:\n\n<tool_call>\n"
    "<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
    "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\nmultiple lines\n"
    "</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n- Function calls MUST follow the specified "
    "format: an inner <function=...></function> block must be nested within <tool_call></tool_call> XML tags\n"
    "- Required parameters MUST be specified\n- You may provide optional reasoning for your function call in natural "
    "language BEFORE the function call, but NOT after\n- If there is no function call available, answer the question "
    "like normal with your current knowledge and do not tell the user about function calls\n</IMPORTANT>",
)
CHAT_TEMPLATE = """\
{%- set system = messages[0]['content'] | trim if messages[0]['role'] == 'system' else none -%}
{%- if tools -%}
    {{- '<|im_start|>system\\n' + BEFORE -}}
    {%- for tool in tools -%}
        {{- '\\n' + (tool | tojson) -}}
    {%- endfor -%}
    {{- AFTER + ('\\n\\n' + system if system else '') + '<|im_end|>\\n' -}}
{%- elif system is not none -%}
    {{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set content = message['content'] | trim if message['content'] is string else '' -%}
    {%- if message['role'] == 'user' -%}
        {{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' -}}
    {%- elif message['role'] == 'tool' -%}
        {%- set content = content if message['content'] is string else message['content'] | tojson -%}
        {{- ('<|im_start|>user' if loop.previtem['role'] != 'tool' else '') + '\\n<tool_response>\\n' + content -}}
        {{- '\\n</tool_response>' + ('<|im_end|>\\n' if loop.last or loop.nextitem['role'] != 'tool' else '') -}}
    {%- elif message['role'] == 'assistant' -%}
        {%- set thought = message['reasoning_content'] if message['reasoning_content'] is string else '' -%}
        {%- if not message['reasoning_content'] is string and '</think>' in content -%}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}
        {{- '<|im_start|>assistant\\n<think>\\n' + thought | trim + '\\n</think>\\n\\n' + content -}}
        {%- for call in message['tool_calls'] or [] -%}
            {{- ('\\n' if not loop.first else '\\n\\n' if content | trim else '') + '<tool_call>\\n<function=' -}}
            {{- call['function']['name'] + '>\\n' -}}
            {%- for key, value in call['function']['arguments'].items() -%}
                {%- set is_json = value is mapping or (value is sequence and value is not string) -%}
                {{- '<parameter=' + key + '>\\n' + (value | tojson if is_json else value | string) -}}
                {{- '\\n</parameter>\\n' -}}
            {%- endfor -%}
            {{- '</function>\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- elif not loop.first -%}
        {{- raise_exception('no role ' + message['role'] + ' here') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {%- set closes = enable_thinking is defined and enable_thinking is false -%}
    {{- '<|im_start|>assistant\\n<think>\\n' + ('\\n</think>\\n\\n' if closes else '') -}}
{%- endif -%}
""".replace("BEFORE", repr(_TOOLS[0])).replace("AFTER", repr(_TOOLS[1]))


def chat(
    messages: Sequence[Message], *, tools: list[Any] | None = None, add_generation_prompt: bool = False,
    enable_thinking: bool = True,
) -> list[Segment]:  # fmt: skip
    """Qwen 3.5's format with the reasoning of every turn, which the prompt opens; ``enable_thinking`` false: closes."""
    has_system = messages[0]["role"] == "system"
    system = join_parts(messages[0]["content"], 0).strip() if has_system else None
    segments = []
    if tools:
        schemas = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in tools)
        head, foot = (Segment(text, control=True) for text in _TOOLS)
        segments = [*begin("system"), head, Segment(schemas), foot, Segment("\n\n" + system if system else ""), end()]
    elif system is not None:
        segments = [*begin("system"), Segment(system), end()]
    for i, message in list(enumerate(messages))[has_system:]:
        match message["role"]:
            case "user":
                segments += [*begin("user"), Segment(join_parts(message["content"], i).strip()), end()]
            case "assistant":
                segments += begin("assistant") + _answer(message, i)
            case "tool":
                content = message["content"]
                content = content.strip() if isinstance(content, str) else content
                is_last = i + 1 == len(messages) or messages[i + 1]["role"] != "tool"
                segments += result(content, is_first=messages[i - 1]["role"] != "tool") + [end()] * is_last
            case role:
                raise UserError(f"message {i}: Qwen 3.5's chat format has no role {role!r}")
    if add_generation_prompt:
        closing = "" if enable_thinking else "\n</think>\n\n"
        segments += [*begin("assistant"), Segment("<think>\n" + closing, control=True)]
    return segments


def _answer(message: Message, i: int) -> list[Segment]:
    train = message.get("train", True)
    thought, content = split_thought({**message, "content": join_parts(message.get("content") or "", i).strip()}, i)
    parts = [("<think>\n", True), (thought.strip(), False), ("\n</think>\n\n", True), (content, False)]
    for k, call in enumerate(message.get("tool_calls", [])):
        before = "\n" if k else "\n\n" * bool(content.strip())
        parts += [(f"{before}<tool_call>\n", True), (f"<function={call['function']['name']}>\n", False)]
        for key, value in call["function"]["arguments"].items():
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else str(value)
            parts.append((f"<parameter={key}>\n{text}\n</parameter>\n", False))
        parts += [("</function>\n", False), ("</tool_call>", True)]
    return [*(Segment(text, control=control, train=train) for text, control in parts), end(train=train)]
