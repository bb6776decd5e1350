"""Adapters in PEFT's format, in and out: ``peft.PeftModel.from_pretrained`` and vLLM read what ``save_peft`` writes.

The safetensors file also carries two fingerprints of the base, so that an adapter is not put on another one, nor on a
checkpoint that it is merged into already. vLLM has one alpha / rank for all layers and no DoRA: merge such adapters.
"""

import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from torchft.adapters.fingerprint import differences, fingerprints
from torchft.adapters.lora import LoRAConfig, LoRALinear, lora_layers
from torchft.errors import UserError
from torchft.files import new_folder, read_json
from torchft.ranks import is_main, whole
from torchft.weights import open_safetensors, save_tensors

log = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIXES = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight", "lora_magnitude": ".lora_magnitude_vector"}

# Fields of adapter_config.json that mean nothing here (layers and ranks are taken from the tensors). Any other field
# that is not in SETTINGS must be empty or false.
IGNORED = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type",
}  # fmt: skip

HubName = Callable[[str], str]  # our module name -> the Hub's
Value = TypeVar("Value")


def save_peft(model: nn.Module, folder: Path, *, hub_name: HubName, base_model_name_or_path: str) -> None:
    """Write ``model``'s adapters to ``folder``, whole or not at all; an existing one is replaced. All ranks call it."""
    linears = [hub_name(name) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    layers = {hub_name(name): layer for name, layer in lora_layers(model).items()}
    first = next(iter(layers.values()))
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    dora = first.lora_magnitude is not None
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "target_modules": sorted(_shortest(dict.fromkeys(layers, True), linears)),
        "rank_pattern": _other_than(rank, {name: layer.rank for name, layer in layers.items()}),
        "alpha_pattern": _other_than(_plain(alpha), {name: _plain(layer.alpha) for name, layer in layers.items()}),
        "use_rslora": first.rslora,
        "use_dora": dora,
        "lora_dropout": first.dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if dora or config["rank_pattern"] or config["alpha_pattern"]:
        log.warning("vLLM cannot serve this adapter (DoRA, or rank or alpha by layer): export the merged model for it")
    tensors = {key: whole(parameter).cpu().contiguous() for key, parameter in _parameters(layers).items()}
    metadata = fingerprints(model)
    if not is_main():
        return
    with new_folder(folder) as new:
        save_tensors(tensors, new / WEIGHTS, metadata=metadata)
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def peft_config(model: nn.Module, folder: Path, *, hub_name: HubName) -> LoRAConfig:
    """What to give ``apply_lora`` so that ``model`` (on meta or not) gets the adapters of a PEFT ``folder``.

    Layers and ranks come from the tensors: no pattern from the file is run. Raises UserError for a kind of adapter
    that we do not have, and for layers that the model has not.
    """
    adapter = _open(folder)
    ours = {hub_name(name): name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if absent := [name for name in adapter.ranks if name not in ours]:
        raise UserError(
            f"{folder} adapts {len(absent)} layers that this model has not, such as {absent[:3]}: "
            "it was trained on another base; set checkpoint_dir to that one"
        )
    ranks = {ours[name]: rank for name, rank in adapter.ranks.items()}
    alphas = {ours[name]: alpha for name, alpha in adapter.alphas.items()}
    return LoRAConfig(
        rank=adapter.settings["r"],
        alpha=adapter.settings["lora_alpha"],
        targets=sorted(_shortest(dict.fromkeys(ranks, True), list(ours.values()))),
        dropout=adapter.settings["lora_dropout"],
        rslora=adapter.settings["use_rslora"],
        dora=adapter.settings["use_dora"],
        rank_pattern=_other_than(adapter.settings["r"], ranks),
        alpha_pattern=_other_than(adapter.settings["lora_alpha"], alphas),
    )


@torch.no_grad()
def load_peft(model: nn.Module, folder: Path, *, hub_name: HubName, check_base: bool = True) -> None:
    """Copy the adapters of a PEFT ``folder`` into those that ``apply_lora`` gave ``model``; load its weights before.

    Nothing is copied unless everything fits. ``check_base=False`` accepts a base with other weights of the same shapes.
    Raises UserError for tensors that are missing, unexpected, misshapen or not finite, and for another base or scaling.
    """
    adapter = _open(folder)
    layers = {hub_name(name): layer for name, layer in lora_layers(model).items()}
    parameters = _parameters(layers)
    tensors = {key: adapter.file.get_tensor(key) for key in adapter.file.keys()}  # noqa: SIM118 (not a dict)
    problems = []
    if missing := [key for key in parameters if key not in tensors]:
        problems.append(f"lacks {len(missing)} tensors of the model's adapters, such as {missing[:3]}")
    if extra := [key for key in tensors if key not in parameters]:
        problems.append(f"holds {len(extra)} tensors that the model has no adapter for, such as {extra[:3]}")
    for key in [key for key in parameters if key in tensors]:
        got, want = list(tensors[key].shape), list(parameters[key].shape)
        if got != want:
            problems.append(f"{key} has shape {got}, but this model needs {want}: the rank or the base is another")
        elif not tensors[key].isfinite().all():
            problems.append(f"{key} holds NaN or infinity: the adapter is broken")
    for name, layer in layers.items():
        alpha, rslora = adapter.alphas.get(name, layer.alpha), adapter.settings["use_rslora"]
        if (layer.alpha, layer.rslora) != (alpha, rslora):
            problems.append(f"{name} has alpha {alpha}, rslora {rslora}; the config says {layer.alpha}, {layer.rslora}")
    if len(problems) > 10:
        problems = [*problems[:10], f"... and {len(problems) - 10} more problems"]
    if check_base and not problems:
        problems += differences(adapter.file.metadata() or {}, model)
    if problems:
        raise UserError(*(f"{folder}: {problem}" for problem in problems))
    for key, parameter in parameters.items():
        parameter.copy_(tensors[key])


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_alphas(value: object) -> bool:
    """PEFT's keys are regexes, but a regex of others can run forever."""
    return value is None or (
        isinstance(value, dict) and all(re.fullmatch(r"[\w.-]+", p) and _is_number(a) for p, a in value.items())
    )


SETTINGS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {  # PEFT's default, what we can read, in words
    "peft_type": ("LORA", lambda v: v == "LORA", "'LORA'"),
    "r": (8, lambda v: type(v) is int and v > 0, "a positive integer"),
    "lora_alpha": (8, _is_number, "a number"),
    "lora_dropout": (0.0, lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to 1"),
    "use_rslora": (False, lambda v: isinstance(v, bool), "true or false"),
    "use_dora": (False, lambda v: isinstance(v, bool), "true or false"),
    "alpha_pattern": ({}, _is_alphas, "plain module names, each with a number"),
    "bias": ("none", lambda v: v == "none", "'none'"),
    # The other ways to initialise, such as pissa, change the base.
    "init_lora_weights": (True, lambda v: v in (True, False, "gaussian", "orthogonal", "eva"), "true"),
}


@dataclass(frozen=True)
class _Adapter:
    settings: dict[str, Any]  # by the names of SETTINGS
    file: Any  # open safetensors
    ranks: dict[str, int]  # by the Hub's module names
    alphas: dict[str, float]


def _open(folder: Path) -> _Adapter:
    """A PEFT folder's settings, by a fixed list of fields, and file. Raises UserError for what we do not have."""
    path = folder / CONFIG
    fields = read_json(path)
    settings = {field: fields.get(field, default) for field, (default, _, _) in SETTINGS.items()}
    problems = [
        f"{path}: {field} is {settings[field]!r}; torchft reads {words}"
        for field, (_, fits, words) in SETTINGS.items()
        if not fits(settings[field])
    ]
    problems += [
        f"{path}: {field} is {value!r}, which torchft does not support"
        for field, value in fields.items()
        if value and field not in SETTINGS and field not in IGNORED
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
    patterns = (settings["alpha_pattern"] or {}).items()
    alphas = {
        name: next((a for p, a in patterns if f".{name}".endswith(f".{p}")), settings["lora_alpha"]) for name in ranks
    }
    return _Adapter(settings, file, ranks, alphas)


def _parameters(layers: Mapping[str, LoRALinear]) -> dict[str, nn.Parameter]:
    """The adapters' parameters by PEFT's tensor names."""
    return {
        PREFIX + name + SUFFIXES[child]: parameter
        for name, layer in layers.items()
        for child, parameter in layer.named_parameters(recurse=False)
        if child in SUFFIXES
    }


def _shortest(values: Mapping[str, Value], names: Iterable[str]) -> dict[str, Value]:
    """``values`` by module name, keyed by the last word alone where all ``names`` that end in it have that value."""
    short: dict[str, Value] = {}
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.rpartition(".")[2], []).append(name)
    for name, value in values.items():
        word = name.rpartition(".")[2]
        same = all(values.get(other) == value for other in groups[word])
        short[word if same else name] = value
    return short


def _other_than(default: Value, values: Mapping[str, Value]) -> dict[str, Value]:
    return {name: value for name, value in _shortest(values, values).items() if value != default}


def _plain(number: float) -> int | float:
    """PEFT and vLLM declare lora_alpha as an int."""
    return int(number) if number == int(number) else number
