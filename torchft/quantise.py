"""A Hub folder whose linear layers have weights in few bits, made of a Hub folder: tensor by tensor, no model is built.

The files are in torchao's layout of safetensors, which transformers and vLLM load by the ``quantization_config`` in
config.json; torchft reads them too (dequantise.py).
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchft import models
from torchft.adapters.formats import torchao_config, unfit
from torchft.adapters.targets import ALL_LINEAR, find_linears
from torchft.dequantise import open_weights
from torchft.errors import UserError
from torchft.files import new_folder
from torchft.hub import base_parameters, hub_format, save_side_files
from torchft.hub_names import pieces
from torchft.tokenizers.export import save_tokenizer
from torchft.tokenizers.tokenizer import Tokenizer
from torchft.weights import WeightFiles, write_shards


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """What becomes of a checkpoint's linear layers."""

    format: str  # adapters/formats.py
    group_size: int = 32  # weights of a row that share a scale, in int4
    search_scales: bool = False  # of int4, by HQQ
    targets: str | Sequence[str] = ALL_LINEAR
    section: str = ""  # in front of the names of these fields in messages, such as "qat."


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Hub names of the weights of a model's linear layers, and of what is stored as it is, whatever the rest."""

    chosen: set[str]
    left: set[str]
    keep_dtype: set[str]


def save_quantised(
    source: Path, folder: Path, how: Quantisation, tokenizer: Tokenizer, *, device: torch.device, dtype: torch.dtype
) -> list[str]:
    """`quantise_folder`, with all else that a Hub folder has; ``folder`` is written whole or not at all."""
    with new_folder(folder) as new:
        names = quantise_folder(source, new, how, device=device, dtype=dtype)
        save_side_files(source, new, stop_ids=tokenizer.stop_ids)
        save_tokenizer(tokenizer, new)
    return names


def quantise_folder(
    source: Path, folder: Path, how: Quantisation, *, device: torch.device, dtype: torch.dtype
) -> list[str]:
    """Write to ``folder``, which exists, the config.json and the weights of ``source`` in fewer bits.

    Weights are rounded on ``device`` from their values in ``dtype``, in which the rest is stored. Returns the names of
    the quantised Hub tensors. Raises UserError for layers that do not fit, and for what ``device`` cannot do. One
    process calls it.
    """
    layers = hub_layers(source, how, device=device, dtype=dtype)
    files = open_weights(source)
    if missing := sorted(layers.chosen - files.names()):
        raise UserError(f"{source} lacks {missing[:5]}: the folder is incomplete; download it again")
    config = torchao_config(how.format, group_size=how.group_size, search_scales=how.search_scales)
    names = sorted(name for name in files.names() if not name.endswith(".inv_freq"))
    examples: dict[tuple[int, ...], Tensor] = {}  # a quantised tensor of each shape
    about = {"tensor_names": json.dumps(names)}  # every file says it of all: readers look at one
    sizes: dict[str, int] = {}
    whose: dict[str, str] = {}  # part -> the tensor that it is a part of
    for name in names:
        shape = files.shape(name)
        if name in layers.chosen and shape not in examples:
            examples[shape] = _quantised(torch.zeros(shape, dtype=dtype), config, device)
        kept = torch.empty(shape, dtype=_kept(files, name, layers, dtype), device="meta")
        stored = examples[shape] if name in layers.chosen else kept
        parts, described = _flat(name, stored)
        about[name] = described[name]
        sizes |= {part: tensor.nbytes for part, tensor in parts.items()}
        whose |= dict.fromkeys(parts, name)
    last: tuple[str, dict[str, Tensor]] = "", {}  # a weight is quantised once for all its parts

    def read(part: str) -> Tensor:
        nonlocal last
        name = whose[part]
        if name not in layers.chosen:
            return files.read(name).to(_kept(files, name, layers, dtype))
        if name != last[0]:
            last = name, _flat(name, _quantised(files.read(name).to(dtype), config, device))[0]
        return last[1][part].cpu()

    write_shards(folder, sizes, read, metadata=about)
    _write_config(source, folder, config, layers, dtype=dtype)
    return sorted(layers.chosen)


def hub_layers(source: Path, how: Quantisation, *, device: torch.device, dtype: torch.dtype) -> Layers:
    """Which tensors of the Hub folder ``source`` are quantised. UserError for those that do not fit."""
    model = models.build(models.config_json(source))
    linears = find_linears(model, how.targets, key=f"{how.section}targets")
    problems = unfit(linears, how.format, group_size=how.group_size, device=device, dtype=dtype, section=how.section)
    if problems:
        raise UserError(*problems)
    every = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = hub_format(model).names
    keeps = re.compile(names.keeps_dtype or r"(?!)")
    ours: dict[str, set[str]] = {}  # Hub tensor -> the parameters that it holds, several where it is fused
    for piece in pieces(base_parameters(model), names):
        ours.setdefault(piece.hub, set()).add(piece.name)
    wanted = {f"{name}.weight" for name in linears}
    halves = [hub for hub, parts in ours.items() if parts & wanted and not parts <= wanted]
    if halves:
        raise UserError(
            f"{how.section}targets: a Hub checkpoint stores {', '.join(sorted(ours[halves[0]]))} as one tensor, "
            f"{halves[0]}, in one format: name all of them or none"
        )
    return Layers(
        chosen={hub for hub, parts in ours.items() if parts <= wanted},
        left={hub for hub, parts in ours.items() if parts <= every - wanted},
        keep_dtype={hub for hub, parts in ours.items() if any(keeps.search(name) for name in parts)},
    )


def _quantised(weight: Tensor, config: Any, device: torch.device) -> Tensor:
    """[out, in] -> torchao's tensor of the same shape and dtype."""
    from torchao.quantization import quantize_  # slow to import

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.to(device), requires_grad=False)
    holder = nn.ModuleDict({"layer": layer})
    quantize_(holder, config)
    quantised: Tensor = holder.state_dict()["layer.weight"]
    assert type(quantised) is not Tensor, "torchao leaves a weight that does not fit as it is; `unfit` names it"
    return quantised


def _flat(name: str, tensor: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The plain tensors that a file holds for ``tensor``, by their names in it, and what its header says of them."""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

    return flatten_tensor_state_dict({name: tensor})


def _kept(files: WeightFiles, name: str, layers: Layers, dtype: torch.dtype) -> torch.dtype:
    """In which dtype a tensor is stored that is not quantised."""
    return torch.float32 if name in layers.keep_dtype and files.dtype(name) == "F32" else dtype


def _write_config(source: Path, folder: Path, config: Any, layers: Layers, *, dtype: torch.dtype) -> None:
    from torchao.core.config import config_to_dict

    json_ = models.config_json(source)
    key = "torch_dtype" if "torch_dtype" in json_ else "dtype"
    json_[key] = str(dtype).removeprefix("torch.")
    json_["quantization_config"] = {
        "quant_method": "torchao",
        "quant_type": {"default": config_to_dict(config)},
        "modules_to_not_convert": sorted(name.removesuffix(".weight") for name in layers.left),
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }
    (folder / "config.json").write_text(json.dumps(json_, indent=2) + "\n")
