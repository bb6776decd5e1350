"""A reward model as a reward: what `reward_modeling` exports, or another *ForSequenceClassification folder."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from torchft import hub, models, tokenizers
from torchft.adapters.score import apply_score_head
from torchft.errors import UserError
from torchft.files import read_json
from torchft.modules.decoder import Decoder, Project
from torchft.rl.rewards import Attempt, Reward
from torchft.training.environment import pick_device


def reward_model(
    *,
    checkpoint_dir: str,
    chat_format: str | None = None,
    dtype: Literal["bf16", "fp32"] = "bf16",
    device: str = "auto",
) -> Reward:
    """The score of prompt and answer together, at the last token. Each rank loads the whole model."""
    folder = Path(checkpoint_dir).expanduser()
    model = load_score_model(folder, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], device=device)
    tokenizer = tokenizers.load(folder, chat_format=chat_format)

    @torch.no_grad()
    def reward(attempt: Attempt) -> float:
        messages = [*attempt.prompt.messages, {"role": "assistant", "content": attempt.text}]
        tokens = torch.tensor([tokenizer.render(messages).tokens], device=model.embed_tokens.weight.device)
        return model(tokens, head=_last).item()

    return reward


def load_score_model(folder: Path, *, dtype: torch.dtype, device: str) -> Decoder:
    """In eval mode, its output the score. UserError for a folder of another kind, or of several scores."""
    json = read_json(folder / "config.json")
    match json.get("architectures"), json.get("id2label", {}):
        case [str(name)], dict(labels) if name.endswith("ForSequenceClassification") and len(labels) == 1:
            base = json | {"architectures": [name.replace("ForSequenceClassification", "ForCausalLM")]}
        case found, labels:
            raise UserError(
                f"{folder} is {found} with {len(labels)} labels; a reward model is a *ForSequenceClassification with "
                "one score, such as the recipe reward_modeling exports"
            )
    model = models.build(base).to(dtype)
    apply_score_head(model, ["reward"], per_token=False, pad_id=None)
    names = replace(model.hub_format.names, fresh=None)  # here the score is among what is loaded
    model.hub_format = replace(model.hub_format, names=names)
    model.to_empty(device=pick_device(device))
    hub.load_weights(model, folder)
    return model.eval()


def _last(hidden: Tensor, project: Project) -> Tensor:
    return project(hidden[:, -1])
