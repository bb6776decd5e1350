"""The text model of a multimodal checkpoint: its part of config.json. Towers for images and sound are left out, of what
is loaded and of what is exported (weights.py reads the text model's tensors alone)."""

from typing import Any

from torchft.errors import UserError

# Architecture of the whole -> model_type of its text_config -> architecture of that alone.
TEXT_MODELS = {
    "Gemma3ForConditionalGeneration": {"gemma3_text": "Gemma3ForCausalLM"},
    "Gemma4ForConditionalGeneration": {"gemma4_text": "Gemma4ForCausalLM"},
    "Gemma4UnifiedForConditionalGeneration": {"gemma4_unified_text": "Gemma4UnifiedForCausalLM"},
    "Llama4ForConditionalGeneration": {"llama4_text": "Llama4ForCausalLM"},
    "Qwen3_5ForConditionalGeneration": {"qwen3_5_text": "Qwen3_5ForCausalLM"},
    "Qwen3_5MoeForConditionalGeneration": {"qwen3_5_moe_text": "Qwen3_5MoeForCausalLM"},
    "Mistral3ForConditionalGeneration": {"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"},
}
# Of the file, not of one of its parts.
OF_THE_WHOLE = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config")
# What released files leave out because it is transformers' default.
DEFAULTS = {"gemma3_text": {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4}}


WITH_HEADS = {  # encoders with a head, of which only one for scores may be kept -> the encoder alone
    "BertForMaskedLM": "BertModel", "BertForPreTraining": "BertModel", "BertForSequenceClassification": "BertModel",
    "ModernBertForMaskedLM": "ModernBertModel", "ModernBertForSequenceClassification": "ModernBertModel",
    "XLMRobertaForMaskedLM": "XLMRobertaModel", "XLMRobertaForSequenceClassification": "XLMRobertaModel",
}  # fmt: skip


def text_config(json: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the text model alone; ``json`` itself where it is of one already."""
    match json.get("architectures"):
        case [str(name)] if name in TEXT_MODELS:
            kinds = TEXT_MODELS[name]
        case [str(name)] if name in WITH_HEADS:
            return json | {"architectures": [WITH_HEADS[name]]}
        case _:
            return json
    text = json.get("text_config")
    if not isinstance(text, dict) or text.get("model_type") not in kinds:
        found = text.get("model_type") if isinstance(text, dict) else text
        raise UserError(
            f"config.json: text_config of {name} is of model_type {found!r}; torchft trains {', '.join(kinds)}"
        )
    kind = text["model_type"]
    outer = {key: json[key] for key in OF_THE_WHOLE if key in json}
    return {**DEFAULTS.get(kind, {}), **text, **outer, "architectures": [kinds[kind]]}
