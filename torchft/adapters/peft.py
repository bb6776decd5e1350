"""Adapters in PEFT's format, in and out: ``peft.PeftModel.from_pretrained`` and vLLM read what ``save_peft`` writes.

The safetensors file also carries two fingerprints of the base, so that an adapter is not put on another one, nor on a
checkpoint that it is merged into already. vLLM has one alpha / rank for all layers and no DoRA: merge such adapters.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from torchft.adapters.fingerprint import differences, fingerprints
from torchft.adapters.lora import LoRAConfig, lora_layers
from torchft.adapters.peft_files import CONFIG, PREFIX, ROWS, WEIGHTS, open_adapter
from torchft.adapters.peft_fused import NONE, Fused, hub_module, joined, split
from torchft.adapters.peft_names import adapted, expert_names, expert_tensors, slots
from torchft.adapters.stacked import StackedLoRA
from torchft.adapters.token_rows import token_rows
from torchft.errors import UserError
from torchft.files import new_folder
from torchft.modules.grouped import StackedLinear
from torchft.ranks import is_main, whole
from torchft.weights import save_tensors

log = logging.getLogger(__name__)

HubName = Callable[[str], str]  # our module name -> the Hub's
Value = TypeVar("Value")


def save_peft(
    model: nn.Module, folder: Path, *, hub_name: HubName, base_model_name_or_path: str, each_expert: bool = False,
    fused: Fused = NONE, swaps: bool = False,
) -> None:  # fmt: skip
    """Write ``model``'s adapters to ``folder``, whole or not at all; an existing one is replaced. All ranks call it.

    ``fused``: which of our layers are one on the Hub (``HubNames.fused``). ``each_expert``: those of stacked experts as
    one per expert, for vLLM, instead of PEFT's target_parameters. ``swaps``: ``HubNames.peft_swaps``.
    """
    layers = {hub_name(name): layer for name, layer in joined(model, lora_layers(model), fused).items()}
    stacked = {name: layer for name, layer in layers.items() if isinstance(layer, StackedLoRA)}
    linears = {name: layer for name, layer in layers.items() if name not in stacked}
    modules = dict(linears)  # that are targets, by the names of the file
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    others = [hub_name(hub_module(name, fused)) for name in names]
    if each_expert:
        modules |= {name: layer for own, layer in stacked.items() for name in expert_names(own, layer)}
        others += [name for name in modules if name not in others]
    first = next(iter(layers.values()))
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    dora = first.lora_magnitude is not None
    named = modules if each_expert else layers
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model_name_or_path,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "target_modules": sorted(_shortest(dict.fromkeys(modules, True), others)),
        "rank_pattern": _other_than(rank, {name: layer.rank for name, layer in named.items()}),
        "alpha_pattern": _other_than(_plain(alpha), {name: _plain(layer.alpha) for name, layer in named.items()}),
        "use_rslora": first.rslora,
        "use_dora": dora,
        "lora_dropout": 0.0 if stacked else first.dropout,  # PEFT has none for parameters
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    if stacked and not each_expert:
        config["target_parameters"] = sorted(_shortest(dict.fromkeys(stacked, True), _stacks(model, hub_name)))
    if dora or config["rank_pattern"] or config["alpha_pattern"]:
        log.warning("vLLM cannot serve this adapter (DoRA, or rank or alpha by layer): export the merged model for it")
    tensors: dict[str, Tensor] = {}
    for name, layer in stacked.items() if each_expert else ():
        tensors |= expert_tensors(name, layer, whole(layer.lora_a), whole(layer.lora_b))
    for key, slot in slots(linears if each_expert else layers, swaps=swaps).items():
        tensors[key] = slot.to_peft(whole(slot.parameter))
    rows = {hub_name(name): layer for name, layer in token_rows(model).items()}
    if rows:
        indices = {name.rpartition(".")[2]: list(layer.ids) for name, layer in rows.items()}
        config["trainable_token_indices"] = indices
        tensors |= {PREFIX + name + ROWS: whole(layer.lora_rows) for name, layer in rows.items()}
        log.warning("vLLM cannot serve an adapter with trained token rows: export the merged model for it")
    tensors = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
    metadata = fingerprints(model, fused)
    if not is_main():
        return
    with new_folder(folder) as new:
        save_tensors(tensors, new / WEIGHTS, metadata=metadata)
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def peft_config(model: nn.Module, folder: Path, *, hub_name: HubName, fused: Fused = NONE) -> LoRAConfig:
    """What to give ``apply_lora`` so that ``model`` (on meta or not) gets the adapters of a PEFT ``folder``.

    Layers and ranks come from the tensors: no pattern from the file is run. Raises UserError for a kind of adapter
    that we do not have, and for layers that the model has not.
    """
    adapter = split(open_adapter(folder), model, fused, hub_name)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, StackedLinear))}
    ours = {hub_name(name): name for name in layers}
    by_name, absent = adapted(adapter, {hub_name(name): layer for name, layer in layers.items()})
    if absent:
        raise UserError(
            f"{folder} adapts {len(absent)} layers that this model has not, such as {absent[:3]}: "
            "it was trained on another base; set checkpoint_dir to that one"
        )
    ranks = {ours[name]: rank for name, rank in by_name.items()}
    alphas = {ours[name]: adapter.alpha(name) for name in by_name}
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
def load_peft(
    model: nn.Module,
    folder: Path,
    *,
    hub_name: HubName,
    check_base: bool = True,
    fused: Fused = NONE,
    swaps: bool = False,
) -> None:
    """Copy the adapters of a PEFT ``folder`` into those that ``apply_lora`` gave ``model``; load its weights before.

    Nothing is copied unless everything fits. ``check_base=False`` accepts a base with other weights of the same shapes.
    Raises UserError for tensors that are missing, unexpected, misshapen or not finite, and for another base or scaling.
    """
    adapter = split(open_adapter(folder), model, fused, hub_name)
    layers = {hub_name(name): layer for name, layer in lora_layers(model).items()}
    places = slots(layers, swaps=swaps)
    tensors = {key: adapter.file.get_tensor(key) for key in adapter.file.keys()}  # noqa: SIM118 (not a dict)
    problems = []
    if missing := [key for key in places if key not in tensors]:
        problems.append(f"lacks {len(missing)} tensors of the model's adapters, such as {missing[:3]}")
    if extra := [key for key in tensors if key not in places]:
        problems.append(f"holds {len(extra)} tensors that the model has no adapter for, such as {extra[:3]}")
    for key in [key for key in places if key in tensors]:
        got, want = list(tensors[key].shape), places[key].shape
        if got != want:
            problems.append(f"{key} has shape {got}, but this model needs {want}: the rank or the base is another")
        elif not tensors[key].isfinite().all():
            problems.append(f"{key} holds NaN or infinity: the adapter is broken")
    for name, layer in layers.items():
        alpha, rslora = adapter.alpha(name), adapter.settings["use_rslora"]
        if (layer.alpha, layer.rslora) != (alpha, rslora):
            problems.append(f"{name} has alpha {alpha}, rslora {rslora}; the config says {layer.alpha}, {layer.rslora}")
    if len(problems) > 10:
        problems = [*problems[:10], f"... and {len(problems) - 10} more problems"]
    if check_base and not problems:
        problems += differences(adapter.file.metadata() or {}, model, fused)
    if problems:
        raise UserError(*(f"{folder}: {problem}" for problem in problems))
    for key, slot in places.items():
        slot.parameter.copy_(slot.from_peft(tensors[key]))


def _stacks(model: nn.Module, hub_name: HubName) -> list[str]:
    return [hub_name(name) for name, module in model.named_modules() if isinstance(module, StackedLinear)]


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
