"""Reading a checkpoint's config.json as data: named fields of a known type, heads that fit, windows.

Every field that a family reads is known to it, and every other must be one that changes no number: see ``unread``.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

from torchft.errors import UserError
from torchft.modules.decoder import DecoderConfig

T = TypeVar("T", int, float, bool)

# Fields that say nothing about the computation, in config.json files of all ages; and all that begin with "_".
WITHOUT_EFFECT = {
    "architectures", "attn_implementation", "auto_map", "aux_loss_alpha", "bad_words_ids", "begin_suppress_tokens",
    "bos_token_id", "cache_implementation", "classifier_dropout", "decoder_start_token_id", "diversity_penalty",
    "dtype", "eos_token_id", "ep_size", "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range",
    "is_decoder", "is_llama_config", "keys_to_ignore_at_inference", "label2id", "language", "length_penalty", "license",
    "max_length", "min_length", "model_max_length", "model_type", "name_or_path", "num_beam_groups", "num_beams",
    "num_labels", "num_return_sequences", "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type",
    "repetition_penalty", "return_dict", "router_aux_loss_coef", "sep_token_id", "seq_aux", "suppress_tokens",
    "task_specific_params", "temperature", "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript",
    "transformers.js_config", "transformers_version", "trust_remote_code", "typical_p", "unk_token_id", "unsloth_fixed",
    "unsloth_version", "use_cache", "use_return_dict",
}  # fmt: skip


class ConfigJson(dict[str, Any]):
    """A config.json that remembers which of its fields were read, those of nested objects too."""

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__({k: ConfigJson(v) if isinstance(v, dict) else v for k, v in fields.items()})
        self.known: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.known.add(key)
        return super().get(key, default)


def unread(json: ConfigJson, path: str = "") -> dict[str, Any]:
    """The fields, by path, that nobody read and that may mean something: set, and not in ``WITHOUT_EFFECT``."""
    found: dict[str, Any] = {}
    for key, value in json.items():
        if key in json.known and isinstance(value, ConfigJson):
            found |= unread(value, f"{path}{key}.")
        elif value and key not in json.known and key not in WITHOUT_EFFECT and not key.startswith("_"):
            found[path + key] = value
    return found


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


def optional(json: dict[str, Any], key: str, kind: type[T], default: T | None = None) -> T | None:
    """As ``field``, where null (and an absent field without ``default``) means that the family's feature is off."""
    value = json.get(key, default)
    return None if value is None else field(json, key, kind, default=default)


def section(json: dict[str, Any], key: str) -> dict[str, Any]:
    """``json[key]``, an object; {} where it is absent or null."""
    value = json.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"config.json: {key} is {value!r:.80}, expected an object")
    return value


def one_of(json: dict[str, Any], key: str, *values: Any, default: Any) -> Any:
    """``json[key]``, which must be one of ``values``: the structures that the family has."""
    if (value := json.get(key, default)) not in values:
        raise UserError(f"config.json: {key} is {value!r}, but this family has only {', '.join(map(repr, values))}")
    return value


def sizes(
    json: dict[str, Any], *, eps: float = 1e-6, eps_key: str = "rms_norm_eps", tied: bool = False,
    context: int | None = None, head_dim: int | None = None,
    hidden: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The fields of ``DecoderConfig`` but the RoPE and windows, in Llama's spelling; what config.json may leave out."""
    num_heads, num_kv_heads, head_dim = heads(json, head_dim)
    return {
        "vocab_size": field(json, "vocab_size", int),
        "dim": field(json, "hidden_size", int),
        "num_layers": field(json, "num_hidden_layers", int),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_dim": field(json, "intermediate_size", int, default=hidden),
        "max_seq_len": field(json, "max_position_embeddings", int, default=context),
        "norm_eps": field(json, eps_key, float, default=eps),
        "tie_embeddings": field(json, "tie_word_embeddings", bool, default=tied),
    }


def sizes_to_hub(c: DecoderConfig, architecture: str, model_type: str) -> dict[str, Any]:
    """The inverse of ``sizes``."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.hidden_dim,
        "max_position_embeddings": c.max_seq_len,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
    }


def windows(json: dict[str, Any], slides: Callable[[int], bool], *, size: int | None = None) -> tuple[int | None, ...]:
    """The window of each layer, in tokens or None, from ``sliding_window`` and ``layer_types``; () if no layer has one.

    ``slides(i)``: whether layer i has one if there are no ``layer_types``. ``size``: of an absent ``sliding_window``.
    """
    num_layers = field(json, "num_hidden_layers", int)
    kinds = json.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if slides(i) else "full_attention" for i in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise UserError(f"config.json: layer_types must list num_hidden_layers ({num_layers}) kinds, found {kinds!r}")
    if unknown := [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]:
        raise UserError(
            f"config.json: layer_types has {unknown[0]!r}, but this family has only 'full_attention' and "
            "'sliding_attention'"
        )
    window = json.get("sliding_window", size)
    if "sliding_attention" not in kinds or window is None:
        return ()
    window = field(json, "sliding_window", int, default=size)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def windows_to_hub(c: DecoderConfig) -> dict[str, Any]:
    """The inverse of ``windows``."""
    kinds = ["full_attention" if c.window(i) is None else "sliding_attention" for i in range(c.num_layers)]
    return {"sliding_window": max((w for w in c.windows if w), default=None), "layer_types": kinds}


def check_sizes(c: DecoderConfig) -> None:
    """UserError for sizes, each possible, that do not go together."""
    num_experts, top_k = (vars(c).get(name, 0) for name in ("num_experts", "top_k"))  # of families that have some
    if num_experts and top_k > num_experts:
        raise UserError(f"config.json: num_experts_per_tok is {top_k}, but there are {num_experts} experts")
    if c.rope.rotary_dim(c.head_dim) < 2:
        raise UserError(
            f"config.json: partial_rotary_factor is {c.rope.partial:g}, with which no channel of a head's "
            f"{c.head_dim} rotates"
        )


def heads(json: dict[str, Any], head_dim: int | None = None) -> tuple[int, int, int]:
    """Number of query heads, number of key/value heads and size of a head, checked to fit together.

    ``head_dim``: where config.json has none; None for hidden_size / num_attention_heads.
    """
    is_given = head_dim is not None or json.get("head_dim") is not None
    dim, num_heads = field(json, "hidden_size", int), field(json, "num_attention_heads", int)
    num_kv_heads = field(json, "num_key_value_heads", int, default=num_heads)
    head_dim = field(json, "head_dim", int, default=head_dim or dim // num_heads)
    if not is_given and dim % num_heads:
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
