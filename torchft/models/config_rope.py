"""The RoPE of a config.json in its spellings: ``rope_parameters`` (transformers 5; by kind of layer if need be), or
``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor`` beside each other."""

import math
from typing import Any

from torchft.errors import UserError
from torchft.models.config_json import field, heads, section
from torchft.modules.rope import LinearRope, Llama3Rope, LongRope, ProportionalRope, Rope, YarnRope

Json = dict[str, Any]


def rope_from_hub(json: Json, *, base: float = 10_000.0, partial: float = 1.0, original: int | None = None) -> Rope:
    """The RoPE of all layers; ``base``, ``partial`` and LongRoPE's ``original`` context where the file has none."""
    found = section(json, "rope_parameters") or section(json, "rope_scaling")
    return _rope(json, found, base=base, partial=partial, original=original)


def ropes_from_hub(json: Json, *, full: Rope, sliding: Rope) -> tuple[Rope, Rope]:
    """The RoPE of full and of sliding layers, from ``rope_parameters``; ``full`` and ``sliding`` where it has none."""
    found = section(json, "rope_parameters")
    if not found:
        return full, sliding
    if not {"full_attention", "sliding_attention"} & found.keys():
        raise UserError(
            f"config.json: rope_parameters is {found!r:.80}, expected an object for 'full_attention' and one for "
            "'sliding_attention'"
        )
    sections = [section(found, "full_attention"), section(found, "sliding_attention")]
    ropes = [
        _rope(json, own, base=rope.base, partial=1.0) if own else rope for own, rope in zip(sections, (full, sliding))
    ]
    return ropes[0], ropes[1]


def rope_to_hub(rope: Rope) -> Json:
    """The older spelling, which every reader of config.json understands."""
    scaling = section_to_hub(rope)
    top = {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    if rope.partial != 1.0:
        top["partial_rotary_factor"] = scaling.pop("partial_rotary_factor")
    if len(scaling) == 1:  # the plain kind
        top["rope_scaling"] = None
    return top


def section_to_hub(rope: Rope) -> Json:
    """One RoPE as transformers 5 spells it."""
    own: Json = {"rope_type": "default", "rope_theta": rope.base}
    if rope.partial != 1.0:
        own["partial_rotary_factor"] = rope.partial
    match rope:
        case LinearRope():
            own |= {"rope_type": "linear", "factor": rope.factor}
        case ProportionalRope():
            own |= {"rope_type": "proportional", "factor": rope.factor}
        case Llama3Rope():
            own |= {
                "rope_type": "llama3",
                "factor": rope.factor,
                "low_freq_factor": rope.low_freq_factor,
                "high_freq_factor": rope.high_freq_factor,
                "original_max_position_embeddings": rope.original_max_seq_len,
            }
        case YarnRope():
            own |= {
                "rope_type": "yarn",
                "factor": rope.factor,
                "original_max_position_embeddings": rope.original_max_seq_len,
                "beta_fast": rope.fast,
                "beta_slow": rope.slow,
                "attention_factor": rope.attention_factor,
                "truncate": rope.truncate,
            }
        case LongRope():
            own |= {
                "rope_type": "longrope",
                "short_factor": list(rope.short_factors),
                "long_factor": list(rope.long_factors),
                "original_max_position_embeddings": rope.original_max_seq_len,
                "attention_factor": rope.attention_factor,
            }
    return own


def _rope(json: Json, own: Json, *, base: float, partial: float, original: int | None = None) -> Rope:
    base = field(own, "rope_theta", float, default=field(json, "rope_theta", float, default=base))
    partial = field(json, "partial_rotary_factor", float, default=partial)
    partial = field(own, "partial_rotary_factor", float, default=partial)
    if partial > 1:
        raise UserError(f"config.json: partial_rotary_factor is {partial}, but it is a share of a head's channels")
    plain = {"base": base, "partial": partial}
    match kind := own.get("rope_type", own.get("type", "default")):
        case "default":
            return Rope(**plain)
        case "linear":
            return LinearRope(**plain, factor=field(own, "factor", float))
        case "proportional":
            return ProportionalRope(**plain, factor=field(own, "factor", float, default=1.0))
        case "llama3":
            return _llama3(own, plain)
        case "yarn":
            return _yarn(json, own, plain)
        case "longrope" | "su":
            return _longrope(json, own, plain, original)
    raise UserError(
        f"config.json: RoPE type {kind!r} is not supported; known are 'default', 'linear', 'llama3', 'yarn', "
        "'longrope', 'proportional'"
    )


def _llama3(own: Json, plain: Json) -> Rope:
    low, high = field(own, "low_freq_factor", float), field(own, "high_freq_factor", float)
    if low > high:  # equal in Llama 4: no ramp between kept and stretched waves
        raise UserError(f"config.json: low_freq_factor ({low}) must not be more than high_freq_factor ({high})")
    return Llama3Rope(
        **plain,
        factor=field(own, "factor", float),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_seq_len=field(own, "original_max_position_embeddings", int),
    )


def _yarn(json: Json, own: Json, plain: Json) -> Rope:
    context = field(json, "max_position_embeddings", int)
    original = field(own, "original_max_position_embeddings", int, default=context)
    factor = field(own, "factor", float, default=context / original)
    scale = yarn_scale(factor)
    if all([own.get("mscale"), own.get("mscale_all_dim")]):  # both are read
        scale, of_all = (yarn_scale(factor, field(own, key, float)) for key in ("mscale", "mscale_all_dim"))
        scale /= of_all
    if (weight := field(own, "attn_factor", float, default=1.0)) != 1:
        raise UserError(
            f"config.json: the RoPE's attn_factor is {weight!r}, which transformers does not read and vLLM multiplies "
            f"by {scale:.6g}. In its place write what you want: attention_factor: {scale:.6g}, as transformers "
            f"computes it, or {scale * weight:.6g}, as vLLM does"
        )
    return YarnRope(
        **plain,
        factor=factor,
        original_max_seq_len=original,
        fast=field(own, "beta_fast", float, default=32.0),
        slow=field(own, "beta_slow", float, default=1.0),
        attention_factor=field(own, "attention_factor", float, default=scale),
        truncate=field(own, "truncate", bool, default=True),
    )


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """YaRN's factor of queries and keys for contexts that are ``factor`` times longer."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(json: Json, own: Json, plain: Json, original: int | None) -> Rope:
    context = field(json, "max_position_embeddings", int)
    found = field(own, "original_max_position_embeddings", int, default=context)
    original = field(json, "original_max_position_embeddings", int, default=original or found)  # Phi's place for it
    factor = field(own, "factor", float, default=context / original)
    rope = LongRope(
        **plain,
        short_factors=_numbers(own, "short_factor"),
        long_factors=_numbers(own, "long_factor"),
        original_max_seq_len=original,
        attention_factor=field(own, "attention_factor", float, default=longrope_scale(factor, original)),
    )
    pairs = rope.rotary_dim(heads(json)[2]) // 2
    for key, factors in {"short_factor": rope.short_factors, "long_factor": rope.long_factors}.items():
        if len(factors) != pairs:
            raise UserError(f"config.json: {key} has {len(factors)} numbers, but {pairs} pairs of channels rotate")
    return rope


def longrope_scale(factor: float, original: int) -> float:
    """LongRoPE's factor of queries and keys for contexts ``factor`` times longer than the ``original`` tokens."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _numbers(own: Json, key: str) -> tuple[float, ...]:
    values = own.get(key)
    if not isinstance(values, list) or not all(isinstance(v, (int, float)) and v > 0 for v in values):
        raise UserError(f"config.json: {key} is {values!r:.80}, expected a list of positive numbers")
    return tuple(map(float, values))
