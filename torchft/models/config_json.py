"""Reading a checkpoint's config.json as data: named fields of a known type, heads that fit, RoPE in its spellings."""

import math
from typing import Any, TypeVar

from torchft.errors import UserError
from torchft.modules.rope import LinearRope, Llama3Rope, Rope

T = TypeVar("T", int, float, bool)


def field(json: dict[str, Any], key: str, kind: type[T], default: T | None = None) -> T:
    """``json[key]``: a positive int, a positive finite float or a bool. Null and absent mean ``default``."""
    value = json.get(key)
    if value is None:
        if default is None:
            raise UserError(f"config.json lacks {key!r}: the file is damaged or of another family; download it again")
        return default
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (not isinstance(value, bool) and not 0 < value < math.inf):
        wanted = "true or false" if kind is bool else f"a positive {kind.__name__}"
        raise UserError(f"config.json: {key} is {value!r}, expected {wanted}")
    return value


def one_of(json: dict[str, Any], key: str, *values: Any, default: Any) -> Any:
    """``json[key]``, which must be one of ``values``: the structures that the family has."""
    if (value := json.get(key, default)) not in values:
        raise UserError(f"config.json: {key} is {value!r}, but this family has only {', '.join(map(repr, values))}")
    return value


def heads(json: dict[str, Any]) -> tuple[int, int, int]:
    """Number of query heads, number of key/value heads and size of a head, checked to fit together."""
    dim, num_heads = field(json, "hidden_size", int), field(json, "num_attention_heads", int)
    num_kv_heads = field(json, "num_key_value_heads", int, default=num_heads)
    head_dim = field(json, "head_dim", int, default=dim // num_heads)
    if json.get("head_dim") is None and dim % num_heads:
        raise UserError(
            f"config.json: hidden_size ({dim}) is not a multiple of num_attention_heads ({num_heads}); set head_dim"
        )
    if num_heads % num_kv_heads:
        raise UserError(
            f"config.json: num_attention_heads ({num_heads}) is not a multiple of num_key_value_heads ({num_kv_heads})"
        )
    if head_dim % 2:
        raise UserError(f"config.json: head_dim is {head_dim}, but RoPE rotates pairs and needs an even one")
    return num_heads, num_kv_heads, head_dim


def rope_from_hub(json: dict[str, Any]) -> Rope:
    """The RoPE of a config.json: ``rope_parameters`` (transformers 5), or ``rope_theta`` and ``rope_scaling``."""
    section = json.get("rope_parameters") or json.get("rope_scaling") or {}
    if not isinstance(section, dict):
        raise UserError(f"config.json: the RoPE section is {section!r}, expected an object")
    base = field(section, "rope_theta", float, default=field(json, "rope_theta", float, default=10_000.0))
    kind = section.get("rope_type", section.get("type", "default"))
    if kind == "default":
        return Rope(base=base)
    if kind == "linear":
        return LinearRope(base=base, factor=field(section, "factor", float))
    if kind == "llama3":
        low, high = field(section, "low_freq_factor", float), field(section, "high_freq_factor", float)
        if low >= high:
            raise UserError(f"config.json: low_freq_factor ({low}) must be less than high_freq_factor ({high})")
        return Llama3Rope(
            base=base,
            factor=field(section, "factor", float),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_seq_len=field(section, "original_max_position_embeddings", int),
        )
    raise UserError(f"config.json: RoPE type {kind!r} is not supported; known are 'default', 'linear' and 'llama3'")


def rope_to_hub(rope: Rope) -> dict[str, Any]:
    """The older spelling, which every reader of config.json understands."""
    scaling: dict[str, Any] | None = None
    if isinstance(rope, LinearRope):
        scaling = {"rope_type": "linear", "factor": rope.factor}
    elif isinstance(rope, Llama3Rope):
        scaling = {
            "rope_type": "llama3",
            "factor": rope.factor,
            "low_freq_factor": rope.low_freq_factor,
            "high_freq_factor": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_seq_len,
        }
    return {"rope_theta": rope.base, "rope_scaling": scaling}
