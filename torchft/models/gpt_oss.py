"""gpt-oss: sinks in the attention's softmax, a window in every other layer, YaRN, biases everywhere, and experts whose
gated units are clamped. Their weights come in MXFP4 and are dequantised when they are read.

Paper: https://arxiv.org/abs/2508.10925. Weights: https://huggingface.co/openai
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchft.errors import UserError
from torchft.hub_names import HubNames
from torchft.models import llama3
from torchft.models.config_json import field, one_of, sizes, sizes_to_hub, windows, windows_to_hub
from torchft.models.config_rope import rope_from_hub, rope_to_hub
from torchft.modules.attention import Attention
from torchft.modules.decoder import Block, Decoder, DecoderConfig
from torchft.modules.masks import Sight
from torchft.modules.moe import Experts, MoE
from torchft.modules.norms import RMSNorm
from torchft.modules.rope import YarnRope
from torchft.modules.routers import ChosenSoftmaxRouter
from torchft.tokenizers.chat import REASONING, Message, Segment, join_parts
from torchft.tokenizers.harmony_tools import BUILTIN_TOOLS, namespace


@dataclass(frozen=True, kw_only=True)
class GptOssConfig(DecoderConfig):
    """``hidden_dim`` is an expert's."""

    num_experts: int
    top_k: int = 4  # experts per token
    attention_bias: bool = True
    alpha: float = 1.702  # sigmoid(alpha * gate), near GELU
    limit: float = 7.0  # of gates, and of the other half on both sides


def _size(num_layers: int, num_experts: int) -> GptOssConfig:
    return GptOssConfig(
        vocab_size=201_088, dim=2880, num_layers=num_layers, num_heads=64, num_kv_heads=8, head_dim=64,
        hidden_dim=2880, max_seq_len=131_072, num_experts=num_experts,
        rope=YarnRope(
            base=150_000.0, factor=32.0, original_max_seq_len=4096, attention_factor=1.3465735902799727, truncate=False
        ),
        windows=tuple(None if i % 2 else 128 for i in range(num_layers)),
    )  # fmt: skip


CONFIGS = {
    #              layers experts
    "gpt-oss-20b":  _size(24, 32),
    "gpt-oss-120b": _size(36, 128),
}  # fmt: skip

HUB = HubNames(
    llama3.HUB.renamed | {r"(\.experts\.\w+)\.weight$": r"\1", r"(\.experts\.\w+)\.bias$": r"\1_bias"},
    transposed=r"\.experts\.\w+\.weight$",
)


def clamped_swiglu(gate_up: Tensor, *, alpha: float, limit: float) -> Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate) of [..., 2 f], gates and ups in turn and bounded -> [..., f]."""
    gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def block(c: DecoderConfig, i: int) -> Block:
    assert isinstance(c, GptOssConfig)
    attn = Attention(
        c.dim, c.num_heads, c.num_kv_heads, c.head_dim, bias=c.attention_bias, out_bias=c.attention_bias, has_sinks=True
    )
    act = partial(clamped_swiglu, alpha=c.alpha, limit=c.limit)
    return Block(
        attn,
        MoE(
            ChosenSoftmaxRouter(c.dim, c.num_experts, c.top_k, bias=True),
            Experts(c.num_experts, c.dim, c.hidden_dim, act=act, bias=True),
        ),
        attn_norm=RMSNorm(c.dim, c.norm_eps),
        mlp_norm=RMSNorm(c.dim, c.norm_eps),
        rope=c.rope,
        sight=Sight(window=c.window(i)),
    )


def build(c: GptOssConfig) -> Decoder:
    return Decoder(c, block, RMSNorm(c.dim, c.norm_eps))


def from_hub(json: dict[str, Any]) -> GptOssConfig:
    """Sizes from a config.json, by a fixed list of its fields. Raises UserError for what gpt-oss does not have."""
    one_of(json, "hidden_act", "silu", default="silu")
    for key in ("initial_context_length", "experts_per_token"):  # said by rope_scaling and num_experts_per_tok, too
        json.get(key)
    return GptOssConfig(
        **sizes(json, eps=1e-5, context=131_072, head_dim=64),
        rope=rope_from_hub(json, base=150_000.0),
        windows=windows(json, lambda i: i % 2 == 0, size=128),
        num_experts=field(json, "num_local_experts", int, default=128),
        top_k=field(json, "num_experts_per_tok", int, default=4),
        attention_bias=field(json, "attention_bias", bool, default=True),
        alpha=field(json, "swiglu_alpha", float, default=1.702),
        limit=field(json, "swiglu_limit", float, default=7.0),
    )


def to_hub(c: GptOssConfig) -> dict[str, Any]:
    """The inverse of ``from_hub``."""
    return {
        **sizes_to_hub(c, "GptOssForCausalLM", "gpt_oss"),
        **windows_to_hub(c),
        "num_local_experts": c.num_experts,
        "num_experts_per_tok": c.top_k,
        "attention_bias": c.attention_bias,
        "swiglu_limit": c.limit,
        "hidden_act": "silu",
        **rope_to_hub(c.rope),
    }


# Chat: harmony (https://github.com/openai/harmony), as the released template renders it. An answer may be several
# messages: reasoning on the channel analysis, then a call on commentary, or final. Reasoning is forgotten once the
# question is answered: rendered is that of the conversation's last answer, and of calls that none follows.


def harmony(
    messages: Sequence[Message], *, tools: list[Any] | None = None, add_generation_prompt: bool = False,
    model_identity: str = "You are ChatGPT, a large language model trained by OpenAI.",
    reasoning_effort: str = "medium", builtin_tools: Sequence[str] = (), date_string: str | None = None,
) -> list[Segment]:  # fmt: skip
    """gpt-oss's format. The system turn holds today's date: give ``date_string`` where runs must repeat exactly.

    Learned is what the model writes behind ``<|start|>assistant``, later headers of the same answer included.
    ``builtin_tools``: of OpenAI's own, "browser" and "python".
    """
    builtin = "".join(text for name, text in BUILTIN_TOOLS.items() if name in builtin_tools)
    heading = "# Tools\n\n" if builtin_tools else ""
    system = (
        f"{model_identity}\nKnowledge cutoff: 2024-06\nCurrent date: {date_string or f'{datetime.now():%Y-%m-%d}'}\n\n"
        f"Reasoning: {reasoning_effort}\n\n{heading}{builtin}"
        "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    )
    if tools:
        system += "\nCalls to these tools must go to the commentary channel: 'functions'."
    has_developer = messages[0]["role"] in ("system", "developer")
    instructions = join_parts(messages[0]["content"], 0) if has_developer else ""
    developer = f"# Instructions\n\n{instructions}\n\n" if instructions else ""
    developer += "# Tools\n\n" + namespace("functions", tools) if tools else ""
    segments = _turn("system", system) + (_turn("developer", developer) if developer else [])
    called = None  # the tool whose result may follow
    for i, message in list(enumerate(messages))[has_developer:]:
        match message["role"]:
            case "user":
                segments += _turn("user", join_parts(message["content"], i))
            case "assistant":
                is_last = i + 1 == len(messages) and not add_generation_prompt
                segments += [_control("<|start|>assistant"), *_answer(message, i, messages[i + 1 :], is_last=is_last)]
                called = message["tool_calls"][0]["function"]["name"] if "tool_calls" in message else None
            case "tool" if called is not None:
                result = json.dumps(message["content"], ensure_ascii=False)
                segments += _turn(f"functions.{called} to=assistant", result, "<|channel|>commentary<|message|>")
            case "tool":
                raise UserError(f"message {i}: a tool's result needs an assistant's message before it that calls one")
            case role:
                raise UserError(f"message {i}: gpt-oss's chat format has no role {role!r}")
    return segments + [_control("<|start|>assistant")] * add_generation_prompt


def _control(text: str, *, train: bool = False) -> Segment:
    return Segment(text, control=True, train=train)


def _turn(role: str, text: str, before: str = "<|message|>") -> list[Segment]:
    return [_control("<|start|>"), Segment(role), _control(before), Segment(text), _control("<|end|>")]


def _answer(message: Message, i: int, later: Sequence[Message], *, is_last: bool) -> list[Segment]:
    """What the model must produce. ``later``: the messages behind."""
    (thought, content), calls = _split(message, i), message.get("tool_calls", [])
    if calls:
        if len(calls) > 1:
            raise UserError(f"message {i} has {len(calls)} tool calls; gpt-oss's chat format knows one at a time")
        if content and thought:
            raise UserError(f"message {i}: beside a tool call either content or reasoning has a place, as analysis")
        is_answered = any(m["role"] == "assistant" and "tool_calls" not in m for m in later)
        thought = None if is_answered else content or thought or None
    parts = []
    if thought is not None and (calls or is_last):
        parts = [("<|channel|>analysis<|message|>", True), (thought, False), ("<|end|><|start|>assistant", True)]
    for function in (call["function"] for call in calls):
        parts += [(f" to=functions.{function['name']}", False), ("<|channel|>", True)]
        parts += [(f"commentary {function.get('content_type', 'json')}", False), ("<|message|>", True)]
        parts += [(json.dumps(function["arguments"], ensure_ascii=False), False), ("<|call|>", True)]
    if not calls:
        parts += [
            ("<|channel|>final<|message|>", True),
            (content, False),
            ("<|return|>" if is_last else "<|end|>", True),
        ]
    return [Segment(text, control=control, train=message.get("train", True)) for text, control in parts]


def _split(message: Message, i: int) -> tuple[str | None, str]:
    """An answer's reasoning, None if it has none, and its text: from fields of their own, or from all that was said."""
    content = join_parts(message.get("content") or "", i)
    thought = next((message[key] for key in REASONING if key in message), None)
    before, final, text = content.partition("<|channel|>final<|message|>")
    if thought is not None or not final:
        return thought, content
    thought = before.partition("<|channel|>analysis<|message|>")[2].partition("<|end|>")[0]
    return thought or None, text.removesuffix("<|return|>")
