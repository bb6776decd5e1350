"""PEFT's adapter folders as they are on disk: settings by a fixed list of fields, tensors by their names."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchft.errors import UserError
from torchft.files import read_json
from torchft.weights import open_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"  # whole rows, whatever PEFT calls them
SUFFIXES = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight", "lora_magnitude": ".lora_magnitude_vector"}

# Fields of adapter_config.json that mean nothing here (layers and ranks are taken from the tensors). Any other field
# that is not in SETTINGS must be empty or false.
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_alphas(value: object) -> bool:
    """PEFT's keys are regexes, but a regex of others can run forever."""
    return value is None or (
        isinstance(value, dict) and all(re.fullmatch(r"[\w.-]+", p) and _is_number(a) for p, a in value.items())
    )


def _are_names(value: object) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(v, str) for v in value))


SETTINGS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {  # PEFT's default, what we can read, in words
    "peft_type": ("LORA", lambda v: v == "LORA", "'LORA'"),
    "r": (8, lambda v: type(v) is int and v > 0, "a positive integer"),
    "lora_alpha": (8, _is_number, "a number"),
    "lora_dropout": (0.0, lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to 1"),
    "use_rslora": (False, lambda v: isinstance(v, bool), "true or false"),
    "use_dora": (False, lambda v: isinstance(v, bool), "true or false"),
    "target_parameters": ([], _are_names, "plain names of parameters"),
    "alpha_pattern": ({}, _is_alphas, "plain module names, each with a number"),
    "bias": ("none", lambda v: v == "none", "'none'"),
    # The other ways to initialise, such as pissa, change the base.
    "init_lora_weights": (True, lambda v: v in (True, False, "gaussian", "orthogonal", "eva"), "true"),
}


@dataclass(frozen=True)
class Adapter:
    settings: dict[str, Any]  # by the names of SETTINGS
    file: Any  # open safetensors
    ranks: dict[str, int]  # rows of A, by PEFT's names of what it wraps
    origins: dict[str, str] = field(default_factory=dict)  # of parts of a layer: what the file calls that

    def alpha(self, name: str) -> float:
        """Of the layer that the Hub calls ``name``."""
        name = self.origins.get(name, name)
        patterns = (self.settings["alpha_pattern"] or {}).items()
        return next((a for p, a in patterns if f".{name}".endswith(f".{p}")), self.settings["lora_alpha"])


def open_adapter(folder: Path) -> Adapter:
    """A PEFT folder's settings, by a fixed list of fields, and file. Raises UserError for what we do not have."""
    path = folder / CONFIG
    fields = read_json(path)
    settings = {key: fields.get(key, default) for key, (default, _, _) in SETTINGS.items()}
    problems = [
        f"{path}: {key} is {settings[key]!r}; torchft reads {words}"
        for key, (_, fits, words) in SETTINGS.items()
        if not fits(settings[key])
    ]
    problems += [
        f"{path}: {key} is {value!r}, which torchft does not support"
        for key, value in fields.items()
        if value and key not in SETTINGS and key not in IGNORED
    ]
    if problems:
        raise UserError(*problems)
    file = open_safetensors(folder / WEIGHTS)
    shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a dict)
    endings = tuple(SUFFIXES.values())
    if strange := [k for k, s in shapes.items() if not k.startswith(PREFIX) or not k.endswith(endings) or 0 in s]:
        raise UserError(
            f"{folder / WEIGHTS} holds tensors that are no LoRA of a linear layer, such as {strange[:3]}; "
            "PEFT leaves the base's own out with save_pretrained(..., save_embedding_layers=False)"
        )
    suffix = SUFFIXES["lora_a"]
    ranks = {key[len(PREFIX) : -len(suffix)]: shape[0] for key, shape in shapes.items() if key.endswith(suffix)}
    return Adapter(settings, file, ranks)
