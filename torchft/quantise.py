"""A Hub folder whose linear layers have weights in few bits, made of a Hub folder: tensor by tensor, no model is built.

The files are in torchao's layout of safetensors, NF4's in bitsandbytes', which transformers and vLLM load by the
``quantization_config`` in config.json; torchft reads them too (dequantise.py).
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchft import models, nf4_files
from torchft.adapters.formats import packed_int4, packed_int4_config, torchao_config, unfit
from torchft.adapters.targets import ALL_LINEAR, find_linears
from torchft.awq import column_scales
from torchft.dequantise import open_weights
from torchft.errors import UserError, collecting
from torchft.files import new_folder, read_json
from torchft.hub import hub_format, places, save_side_files
from torchft.modules.decoder import Decoder
from torchft.tokenizers.export import save_tokenizer
from torchft.tokenizers.tokenizer import Tokenizer
from torchft.weights import WeightFiles, write_shards

NAME = "layer.weight"  # in place of a weight's own, where only its shape counts


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """What becomes of a checkpoint's linear layers."""

    format: str  # adapters/formats.py
    group_size: int = 32  # weights of a row that share a scale, in int4
    search_scales: bool = False  # of int4, by HQQ
    packed: bool = False  # int4: two codes in a byte, not one
    targets: str | Sequence[str] = ALL_LINEAR
    ignore: Sequence[str] = ()  # targets that are left as they are all the same
    section: str = ""  # in front of the names of these fields in messages, such as "qat."


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Hub names of the weights of a model's linear layers, and of what is stored as it is, whatever the rest."""

    chosen: dict[str, list[str]]  # and our layers whose rows they hold
    left: set[str]
    keep_dtype: set[str]


def save_quantised(source: Path, folder: Path, how: Quantisation, tokenizer: Tokenizer, **options: Any) -> list[str]:
    """``quantise_folder``, with all else that a Hub folder has; ``folder`` is written whole or not at all."""
    with new_folder(folder) as new:
        names = quantise_folder(source, new, how, **options)
        save_side_files(source, new, stop_ids=tokenizer.stop_ids)
        save_tokenizer(tokenizer, new)
    return names


def quantise_folder(
    source: Path,
    folder: Path,
    how: Quantisation,
    *,
    device: torch.device,
    dtype: torch.dtype,
    scales: Mapping[str, Tensor] | None = None,
) -> list[str]:
    """Write to ``folder``, which exists, the config.json and the weights of ``source`` in fewer bits.

    Weights are rounded on ``device`` from their values in ``dtype``, in which the rest is stored; packed int4 with
    their columns multiplied by ``scales`` (`calibrated`). Returns the names of the quantised Hub tensors. Raises
    UserError for layers that do not fit, and for what ``device`` cannot do. One process calls it.
    """
    layers, files = hub_layers(source, how, device=device, dtype=dtype), open_weights(source)
    encode = partial(_encoded, how=how, device=device)
    names = sorted(name for name in files.names() if not name.endswith(".inv_freq"))
    examples: dict[tuple[int, ...], tuple[dict[str, int], str]] = {}  # of weights of one shape
    about = {} if how.format == "nf4" else {"tensor_names": json.dumps(names)}  # in every file: readers look at one
    sizes: dict[str, int] = {}
    whose: dict[str, str] = {}  # part -> the tensor that it is a part of
    for name in names:
        shape = files.shape(name)
        if name in layers.chosen:
            if shape not in examples:
                parts, described = encode(torch.zeros(shape, dtype=dtype), scales[name] if scales else None)
                examples[shape] = {part: tensor.nbytes for part, tensor in parts.items()}, described
            bytes_of, described = examples[shape]
            bytes_of = {_part(name, part): size for part, size in bytes_of.items()}
        else:
            described = json.dumps({"_type": "Tensor"})
            bytes_of = {name: math.prod(shape) * _kept(files, name, layers, dtype).itemsize}
        if about:
            about[name] = described
        sizes |= bytes_of
        whose |= dict.fromkeys(bytes_of, name)
    last: tuple[str, dict[str, Tensor]] = "", {}  # a weight is quantised once for all its parts

    def read(part: str) -> Tensor:
        nonlocal last
        name = whose[part]
        if name not in layers.chosen:
            return files.read(name).to(_kept(files, name, layers, dtype))
        if name != last[0]:
            parts, _ = encode(files.read(name).to(dtype), scales[name] if scales else None)
            last = name, {_part(name, part): tensor.cpu() for part, tensor in parts.items()}
        return last[1][part]

    write_shards(folder, sizes, read, metadata=about)
    _write_config(source, folder, how, layers, dtype=dtype)
    return sorted(layers.chosen)


def hub_layers(source: Path, how: Quantisation, *, device: torch.device, dtype: torch.dtype) -> Layers:
    """Which tensors of the Hub folder ``source`` are quantised. UserError with all that keeps them from it."""
    model = models.build(models.config_json(source))
    problems: list[str] = []
    linears: dict[str, nn.Linear] = {}
    ignored: dict[str, nn.Linear] = {}
    with collecting(problems):
        linears = find_linears(model, how.targets, key=f"{how.section}targets")
    with collecting(problems):
        ignored = find_linears(model, how.ignore, key=f"{how.section}ignore") if how.ignore else {}
    linears = {name: layer for name, layer in linears.items() if name not in ignored}
    problems += unfit(linears, how.format, group_size=how.group_size, device=device, dtype=dtype, section=how.section)
    ours: dict[str, set[str]] = {}  # Hub tensor -> the parameters that it holds, several where it is fused
    with collecting(problems):
        for piece in chain.from_iterable(places(model, open_weights(source)).values()):
            ours.setdefault(piece.hub, set()).add(piece.name)
    wanted = {f"{name}.weight" for name in linears}
    if halves := [hub for hub, parts in ours.items() if parts & wanted and not parts <= wanted]:
        problems.append(
            f"{how.section}targets: a Hub checkpoint stores {', '.join(sorted(ours[halves[0]]))} as one tensor, "
            f"{halves[0]}, in one format: name all of them or none"
        )
    if ignored and not linears:
        problems.append(f"{how.section}ignore: nothing is left to quantise: name fewer layers")
    if "quantization_config" in (json_ := read_json(source / "config.json")):
        kind = json_["quantization_config"].get("quant_method")
        if kind in ("torchao", "bitsandbytes"):
            problems.append(f"{source} is quantised already, by {kind}: give the checkpoint that it was made of")
    if problems:
        raise UserError(*problems)
    every = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    keeps = re.compile(hub_format(model).names.keeps_dtype or r"(?!)")
    return Layers(
        chosen={
            hub: sorted(name.removesuffix(".weight") for name in parts)
            for hub, parts in ours.items()
            if parts <= wanted
        },
        left={hub for hub, parts in ours.items() if parts <= every - wanted},
        keep_dtype={hub for hub, parts in ours.items() if any(keeps.search(name) for name in parts)},
    )


def calibrated(
    model: Decoder, samples: Sequence[Sequence[int]], source: Path, how: Quantisation, *, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The ``scales`` of AWQ (awq.py) for the weights in ``source``, of which ``model`` is loaded, by ``samples``."""
    layers, files = hub_layers(source, how, device=model.embed_tokens.weight.device, dtype=dtype), open_weights(source)
    config = torchao_config(how.format, group_size=how.group_size, search_scales=how.search_scales)
    return column_scales(model, samples, layers.chosen, files.read, config)


def _encoded(
    weight: Tensor, scale: Tensor | None, *, how: Quantisation, device: torch.device
) -> tuple[dict[str, Tensor], str]:
    """[out, in] -> the plain tensors that a file holds for it, and what its header says of it, if its name is NAME."""
    if how.format == "nf4":
        return nf4_files.quantised(NAME, weight.to(device)), ""
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization import quantize_  # slow to import

    inputs = None if scale is None else scale.reciprocal().to(weight.dtype)
    weight = weight if inputs is None else (weight.float() / inputs.float()).to(weight.dtype)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.to(device), requires_grad=False)
    holder = nn.ModuleDict({"layer": layer})
    config = torchao_config(how.format, group_size=how.group_size, search_scales=how.search_scales)
    config.set_inductor_config = False  # else torchao changes how all else in this process is compiled and multiplied
    quantize_(holder, config)
    quantised: Tensor = holder.state_dict()["layer.weight"]
    assert type(quantised) is not Tensor, "torchao leaves a weight that does not fit as it is; `unfit` names it"
    parts, about = flatten_tensor_state_dict({NAME: packed_int4(quantised, inputs) if how.packed else quantised})
    return parts, about[NAME]


def _part(name: str, part: str) -> str:
    """What a part of the weight ``name`` is called, if it is called ``part`` of NAME."""
    return name.removesuffix(".weight") + part.removeprefix(NAME.removesuffix(".weight"))


def _kept(files: WeightFiles, name: str, layers: Layers, dtype: torch.dtype) -> torch.dtype:
    """In which dtype a tensor is stored that is not quantised."""
    return torch.float32 if name in layers.keep_dtype and files.dtype(name) == "F32" else dtype


def _write_config(source: Path, folder: Path, how: Quantisation, layers: Layers, *, dtype: torch.dtype) -> None:
    json_ = models.config_json(source)
    key = "torch_dtype" if "torch_dtype" in json_ else "dtype"
    json_[key] = str(dtype).removeprefix("torch.")
    left = sorted(name.removesuffix(".weight") for name in layers.left)
    json_["quantization_config"] = nf4_files.config(left, dtype=dtype) if how.format == "nf4" else _config(how, left)
    (folder / "config.json").write_text(json.dumps(json_, indent=2) + "\n")


def _config(how: Quantisation, left: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of config.json, for what torchao reads."""
    from torchao.core.config import config_to_dict

    if how.packed:
        config = packed_int4_config(how.group_size)
    else:
        config = torchao_config(how.format, group_size=how.group_size, search_scales=how.search_scales)
    return {
        "quant_method": "torchao",
        "quant_type": {"default": config_to_dict(config)},
        "modules_to_not_convert": left,
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }
