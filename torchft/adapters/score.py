"""A score in place of the words: the model of a *ForSequenceClassification or *ForTokenClassification folder."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchft.errors import UserError
from torchft.modules.decoder import Decoder
from torchft.ranks import copy_part, local

# Families of which transformers has no class that scores whole documents.
WITHOUT = {"Cohere2", "Gemma4", "Glm4Moe", "Granite", "Llama4", "Olmoe", "Qwen3_5Moe"}


class ScoreHead(nn.Linear):
    """[..., d] in any dtype -> scores [..., k] fp32."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias)


def apply_score_head(model: Decoder, labels: list[str], *, per_token: bool, pad_id: int | None) -> None:
    """Replace the output weight of ``model`` by a trained one with a row for each of ``labels``.

    Call it after other surgery, before FSDP and loading, which then leaves it out, and ``init_score_head`` after. What
    `hub.save` writes is transformers' model for documents, which reads the last token that is not ``pad_id``, or
    ``per_token`` the one for tokens. UserError for a family that has no such model.
    """
    json: dict[str, Any] = model.hub_format.config_json
    name = json["architectures"][0]
    kind = "ForTokenClassification" if per_token else "ForSequenceClassification"
    if not name.endswith("ForCausalLM") or name.removesuffix("ForCausalLM") in WITHOUT:
        raise UserError(f"checkpoint_dir: transformers has no model of {name} that gives scores; take another family")
    model.lm_head = ScoreHead(
        model.config.dim, len(labels), bias=per_token, device=model.embed_tokens.weight.device, dtype=torch.float32
    )
    names = model.hub_format.names
    names = replace(
        names,
        renamed={**names.renamed, r"^lm_head\.": "score."},
        ignored=rf"{names.ignored}|(^|\.)lm_head\.weight$",
        fresh=r"^lm_head\.",
        stacked=None,
    )
    about = {
        "architectures": [name.replace("ForCausalLM", kind)],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "pad_token_id": pad_id,
        "classifier_dropout": 0.0,
    }
    model.hub_format = replace(model.hub_format, names=names, config_json=json | about)


@torch.no_grad()
def init_score_head(model: Decoder, seed: int) -> None:
    """Random scores of size 1 for hidden states of size 1; the bias, if any, 0. All ranks get parts of the same."""
    head = model.lm_head
    assert isinstance(head, ScoreHead)
    generator = torch.Generator().manual_seed(seed)
    copy_part(
        head.weight,
        (torch.randn(head.weight.shape, generator=generator) / head.in_features**0.5).to(head.weight.device),
    )
    if head.bias is not None:
        local(head.bias).zero_()
