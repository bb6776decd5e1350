"""A score in place of the words: the model of a *ForSequenceClassification or *ForTokenClassification folder."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchft.errors import UserError
from torchft.modules.decoder import Decoder
from torchft.modules.encoder import Encoder
from torchft.ranks import copy_part, local

# Families of which transformers has no class that scores whole documents.
WITHOUT = {"Cohere2", "Gemma4", "Glm4Moe", "Granite", "Llama4", "Olmoe", "Qwen3_5Moe"}


class ScoreHead(nn.Linear):
    """[..., d] in any dtype -> scores [..., k] fp32."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias)


def apply_score_head(
    model: Decoder, labels: list[str], *, per_token: bool, pad_id: int | None, problem: str | None = None
) -> None:
    """Replace the output weight of ``model`` by a trained one with a row for each of ``labels``.

    Call it after other surgery, before FSDP and loading, which then leaves out what the checkpoint does not hold, and
    ``init_score_head`` after. What `hub.save` writes is transformers' model for documents, which reads the last token
    that is not ``pad_id``, or ``per_token`` the one for tokens. Of an encoder it is the head that its family makes.
    UserError for a family that has no such model.

    Args:
        problem: transformers' word for what the scores are, by which it chooses a loss.
    """
    json: dict[str, Any] = model.hub_format.config_json
    if isinstance(model, Encoder):
        _apply_class_head(model, labels, per_token=per_token, problem=problem)
        return
    name = json["architectures"][0]
    kind = "ForTokenClassification" if per_token else "ForSequenceClassification"
    if not name.endswith("ForCausalLM") or name.removesuffix("ForCausalLM") in WITHOUT:
        raise UserError(f"checkpoint_dir: transformers has no model of {name} that gives scores; take another family")
    model.lm_head = ScoreHead(
        model.config.dim, len(labels), bias=per_token, device=model.embed_tokens.weight.device, dtype=torch.float32
    )
    names, head = model.hub_format.names, {r"^lm_head\.": "score."}
    names = replace(
        names,
        renamed={**names.renamed, **head},
        fresh=r"^lm_head\.",
        stacked=names.stacked
        and replace(names.stacked, renamed={**names.stacked.renamed, **head}, fresh=r"^lm_head\."),
    ).ignoring(r"(^|\.)lm_head\.weight$")
    about = _about(name.replace("ForCausalLM", kind), labels, problem) | {"pad_token_id": pad_id}
    model.hub_format = replace(model.hub_format, names=names, config_json=json | about)


def _apply_class_head(model: Encoder, labels: list[str], *, per_token: bool, problem: str | None) -> None:
    hub = model.hub_format
    name = hub.config_json["architectures"][0]
    if per_token:
        raise UserError(f"loss: {name} is an encoder, which sees the steps that follow; judge steps with a decoder")
    known = hub.config_json.get("id2label") or {}
    before = [known[i] for i in sorted(known, key=int)]
    if before != labels and sorted(before) == sorted(labels):
        raise UserError(f"dataset.labels: the checkpoint's head has them in the order {before}; write them so")
    with model.embed_tokens.weight.device:
        model.lm_head = model.make_head(len(labels)).to(torch.float32)
    model.hub_format = replace(
        hub,
        names=replace(hub.names, fresh=r"^lm_head\."),
        config_json=hub.config_json | _about(f"{name.removesuffix('Model')}ForSequenceClassification", labels, problem),
    )


def _about(architecture: str, labels: list[str], problem: str | None) -> dict[str, Any]:
    about: dict[str, Any] = {
        "architectures": [architecture],
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "classifier_dropout": 0.0,
    }
    return about | ({"problem_type": problem} if problem else {})


@torch.no_grad()
def init_score_head(model: Decoder, seed: int, *, lacking: Collection[str]) -> None:
    """Random weights for those parameters of the head that the checkpoint is ``lacking``.

    Outputs of size 1 for inputs of size 1, biases 0, norms 1. All ranks get parts of the same.
    """
    assert model.lm_head is not None
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.lm_head.named_parameters():
        if f"lm_head.{name}" not in lacking:
            continue
        if p.dim() == 2:
            copy_part(p, (torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5).to(p.device))
        else:
            local(p).fill_(float(name == "norm.weight"))
