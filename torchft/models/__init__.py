"""The families by name, and how a checkpoint folder or a config becomes a model."""

import difflib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from torchft.dequantise import check_readable
from torchft.errors import UserError
from torchft.files import read_json
from torchft.hub import HubFormat, load_weights
from torchft.models import (
    bert,
    command_r7b,
    deepseek_v3,
    gemma,
    gemma2,
    gemma3,
    gemma4,
    glm4,
    glm4_moe,
    gpt_oss,
    granite,
    kimi_k2,
    llama2,
    llama3,
    llama4,
    ministral3,
    mistral,
    mixtral,
    modernbert,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_moe,
    qwen3_next,
    smollm2,
    smollm3,
    xlm_roberta,
)
from torchft.models.config_json import ConfigJson, check_sizes, unread
from torchft.models.multimodal import TEXT_MODELS, text_config
from torchft.modules.decoder import Decoder, DecoderConfig
from torchft.names import nearest

FAMILIES: dict[str, ModuleType] = {  # names as they are in ``models.build`` and under configs/
    "command_r7b": command_r7b,
    "deepseek_v3": deepseek_v3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gemma4": gemma4,
    "glm4": glm4,
    "glm4_moe": glm4_moe,
    "gpt_oss": gpt_oss,
    "granite": granite,
    "kimi_k2": kimi_k2,
    "llama2": llama2,
    "llama3": llama3,
    "llama4": llama4,
    "ministral3": ministral3,
    "mistral": mistral,
    "mixtral": mixtral,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "olmoe": olmoe,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_5": qwen3_5,
    "qwen3_moe": qwen3_moe,
    "qwen3_next": qwen3_next,
    "smollm2": smollm2,
    "smollm3": smollm3,
}
ENCODERS: dict[str, ModuleType] = {"bert": bert, "modernbert": modernbert, "xlm_roberta": xlm_roberta}
ARCHITECTURES: dict[str, ModuleType] = {  # config.json's word -> who reads it
    "BertModel": bert,
    "Cohere2ForCausalLM": command_r7b,
    "DeepseekV3ForCausalLM": deepseek_v3,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "Gemma4ForCausalLM": gemma4,
    "Gemma4UnifiedForCausalLM": gemma4,
    "GemmaForCausalLM": gemma,
    "Glm4ForCausalLM": glm4,
    "Glm4MoeForCausalLM": glm4_moe,
    "GlmForCausalLM": glm4,
    "GptOssForCausalLM": gpt_oss,
    "GraniteForCausalLM": granite,
    "Llama4ForCausalLM": llama4,
    "LlamaForCausalLM": llama3,
    "Ministral3ForCausalLM": ministral3,
    "MistralForCausalLM": mistral,
    "MixtralForCausalLM": mixtral,
    "ModernBertModel": modernbert,
    "Olmo2ForCausalLM": olmo2,
    "Olmo3ForCausalLM": olmo3,
    "OlmoeForCausalLM": olmoe,
    "Phi3ForCausalLM": phi3,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "Qwen3NextForCausalLM": qwen3_next,
    "Qwen3_5ForCausalLM": qwen3_5,
    "Qwen3_5MoeForCausalLM": qwen3_5,
    "SmolLM3ForCausalLM": smollm3,
    "XLMRobertaModel": xlm_roberta,
}

REFUSED = {  # what keeps out architectures that people ask for
    "Gemma3nForCausalLM": "AltUp, LAuReL and sparse activations",
    "Gemma3nForConditionalGeneration": "AltUp, LAuReL and sparse activations",
    "Phi3SmallForCausalLM": "block-sparse attention and a gated GELU with bounds",
    "PhiMoEForCausalLM": "a SparseMixer router and layer norms",
}


def load(checkpoint_dir: str | Path, *, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Decoder:
    """The model of a Hub folder, in eval mode: ``model(tokens [b, s]) -> logits [b, s, v]``.

    Raises UserError for a folder that is incomplete, of an unknown family, or whose weights do not fit its config.json.
    """
    folder = Path(checkpoint_dir).expanduser()
    model = build(config_json(folder, encoders=True)).to(dtype).to_empty(device=device)
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
        json = text_config(name_or_config_json)
        family = architecture(json)
        config = _read(json)
    with torch.device(device):
        model: Decoder = family.build(config)
    model.hub_format = HubFormat(family.HUB, json)
    return model


def config_json(folder: Path, *, encoders: bool = False, separator: int | None = None) -> dict[str, Any]:
    """A checkpoint folder's config.json. UserError when it is missing, of quantised weights or no model of ours.

    ``encoders``: whether one may be there, which writes no text. ``separator``: the token that ends the first of two
    texts, of which an encoder's config.json says nothing.
    """
    if not folder.is_dir():
        raise UserError(f"checkpoint_dir {folder} is not a folder; `tune download ORG/MODEL` makes one")
    json = text_config(read_json(folder / "config.json"))
    if quantized := json.pop("quantization_config", None):
        check_readable(quantized, folder)  # dequantised when it is read, so that what is exported has no such section
    try:
        _read(json)
    except UserError as e:
        raise UserError(*(f"{folder}/{problem}" for problem in e.problems)) from None  # each begins with "config.json"
    if separator is not None and architecture(json) in ENCODERS.values():
        json["sep_token_id"] = separator
    if not encoders and architecture(json) in ENCODERS.values():
        raise UserError(
            f"{folder}/config.json: {json['architectures'][0]} is an encoder, which writes no text; "
            "embedding_finetune and reward_modeling train it"
        )
    return json


def sizes(folder: Path) -> DecoderConfig:
    """The sizes that a checkpoint folder's config.json gives."""
    json = config_json(folder, encoders=True)
    return _read(json)


def _read(json: dict[str, Any]) -> DecoderConfig:
    """The sizes of a config.json. UserError names every field that the family does not have."""
    fields = ConfigJson(json)
    config: DecoderConfig = architecture(json).from_hub(fields)
    if strange := unread(fields):
        raise UserError(
            *(
                f"config.json: {path} is {value!r:.80}, which torchft does not know in this family; "
                "remove the field if it does not change what the model computes"
                for path, value in strange.items()
            )
        )
    check_sizes(config)
    return config


def _released(name: str) -> tuple[ModuleType, Any]:
    known = {
        f"{family}/{size}": (module, size)
        for family, module in (FAMILIES | ENCODERS).items()
        for size in module.CONFIGS
    }
    if name not in known:
        raise UserError(f"no model {name!r}{nearest(name, known)}; known are {', '.join(known)}")
    module, size = known[name]
    return module, module.CONFIGS[size]


def _word(architecture: str) -> str:
    """Its model's name: what stands before "ForCausalLM", "Model" and the like."""
    return re.split("For|LMHead|Model", architecture)[0].lower()


def architecture(json: dict[str, Any]) -> ModuleType:
    """The family that reads a config.json. UserError names the nearest architecture to one that none reads."""
    known, hint = sorted(ARCHITECTURES) + sorted(TEXT_MODELS), ""
    match json.get("architectures"):
        case [str(name)] if name in ARCHITECTURES:
            return ARCHITECTURES[name]
        case [str(name)]:
            words = {_word(other): other for other in reversed(known)}
            word = _word(name)
            hint = f": it has {REFUSED[name]}" if name in REFUSED else ""
            near = difflib.get_close_matches(word, words, n=1, cutoff=0.61)  # less is no family's other spelling
            hint += f"; the nearest is {words[near[0]]}" if near else ""
    raise UserError(
        f"config.json: architectures is {json.get('architectures')}, which torchft does not train{hint}. "
        f"It trains {', '.join(known)}"
    )
