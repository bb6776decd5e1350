"""Reading a checkpoint's config.json as data: named fields of a known type, and RoPE in its three spellings."""

from typing import Any, TypeVar

from torchft.errors import UserError
from torchft.modules.rope import LinearRope, Llama3Rope, Rope

T = TypeVar("T", int, float, bool)


def field(json: dict[str, Any], key: str, kind: type[T], default: T | None = None) -> T:
    """``json[key]`` checked to be a positive int, a positive float or a bool. Null and absent mean ``default``."""
    value = json.get(key)
    if value is None:
        if default is None:
            raise UserError(f"config.json lacks {key!r}")
        return default
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (not isinstance(value, bool) and not value > 0):
        wanted = "true or false" if kind is bool else f"a positive {kind.__name__}"
        raise UserError(f"config.json: {key} is {value!r}, expected {wanted}")
    return value


def one_of(json: dict[str, Any], key: str, *values: Any, default: Any) -> Any:
    """``json[key]``, which must be one of ``values``: the structures that the family has."""
    if (value := json.get(key, default)) not in values:
        raise UserError(f"config.json: {key} is {value!r}, but this family has only {', '.join(map(repr, values))}")
    return value


def rope_from_hub(json: dict[str, Any], max_seq_len: int) -> Rope:
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
        return Llama3Rope(
            base=base,
            factor=field(section, "factor", float),
            low_freq_factor=field(section, "low_freq_factor", float),
            high_freq_factor=field(section, "high_freq_factor", float),
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
