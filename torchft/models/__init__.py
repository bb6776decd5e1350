"""The families by name, and how a checkpoint folder or a config becomes a model."""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from torchft.errors import UserError
from torchft.files import read_json
from torchft.hub import HubFormat, load_weights
from torchft.models import llama2, llama3
from torchft.modules.decoder import Decoder, DecoderConfig
from torchft.names import nearest

FAMILIES: dict[str, ModuleType] = {"llama2": llama2, "llama3": llama3}  # folder names under configs/
ARCHITECTURES: dict[str, ModuleType] = {"LlamaForCausalLM": llama3}  # config.json's word -> who reads it


def load(checkpoint_dir: str | Path, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Decoder:
    """The model of a Hub folder, in eval mode: ``model(tokens [b, s]) -> logits [b, s, v]``.

    Raises UserError for a folder that is incomplete, of an unknown family, or whose weights do not fit its config.json.
    """
    folder = Path(checkpoint_dir).expanduser()
    model = build(config_json(folder)).to(dtype).to_empty(device=device)
    load_weights(model, folder)
    return model.eval()


def build(name_or_config_json: str | dict[str, Any], *, device: str = "meta") -> Decoder:
    """A model without weights: of a released size (``"llama3/Llama-3.1-8B"``) or of a config.json's contents.

    On a device other than meta its parameters are random, as the modules' own initialisation leaves them.
    """
    if isinstance(name_or_config_json, str):
        family, config = _released(name_or_config_json)
        json = family.to_hub(config)
    else:
        json = name_or_config_json
        family = _family(json)
        config = family.from_hub(json)
    with torch.device(device):
        model: Decoder = family.build(config)
    model.hub_format = HubFormat(family.HUB, json)
    return model


def config_json(folder: Path) -> dict[str, Any]:
    """A checkpoint folder's config.json. UserError when it is missing, of quantised weights or no model of ours."""
    if not folder.is_dir():
        raise UserError(f"checkpoint_dir {folder} is not a folder; `tune download ORG/MODEL` makes one")
    json = read_json(folder / "config.json")
    if quantized := json.get("quantization_config"):
        kind = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
        raise UserError(
            f"{folder} holds quantised weights (quant_method {kind!r}), which cannot be trained: take the original "
            "checkpoint, and `nf4` or `fp8` in the config to train on a quantised base"
        )
    try:
        _family(json).from_hub(json)
    except UserError as e:
        raise UserError(*(f"{folder}/{problem}" for problem in e.problems)) from None  # each begins with "config.json"
    return json


def sizes(folder: Path) -> DecoderConfig:
    """The sizes that a checkpoint folder's config.json gives."""
    json = config_json(folder)
    config: DecoderConfig = _family(json).from_hub(json)
    return config


def _released(name: str) -> tuple[ModuleType, Any]:
    known = {f"{family}/{size}": (module, size) for family, module in FAMILIES.items() for size in module.CONFIGS}
    if name not in known:
        raise UserError(f"no model {name!r}{nearest(name, known)}; known are {', '.join(known)}")
    module, size = known[name]
    return module, module.CONFIGS[size]


def _family(json: dict[str, Any]) -> ModuleType:
    match json.get("architectures"):
        case [str(name)] if name in ARCHITECTURES:
            return ARCHITECTURES[name]
        case [str(name)]:
            hint = nearest(name, ARCHITECTURES)
        case _:
            hint = ""
    known = ", ".join(sorted(ARCHITECTURES))
    raise UserError(f"config.json: architectures is {json.get('architectures')}{hint}; torchft trains {known}")
