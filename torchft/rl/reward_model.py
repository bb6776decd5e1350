"""A reward model as a reward: what `reward_modeling` exports, or another *ForSequenceClassification folder."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from torchft import hub, models, tokenizers
from torchft.adapters.score import apply_score_head
from torchft.errors import UserError
from torchft.files import read_json
from torchft.modules.decoder import Decoder, Project
from torchft.rl.rewards import Attempt, BatchReward, Reward
from torchft.training.environment import pick_device


def reward_model(
    *,
    checkpoint_dir: str,
    chat_format: str | None = None,
    dtype: Literal["bf16", "fp32"] = "bf16",
    device: str = "auto",
    batch_size: int = 16,
) -> Reward:
    """The score of prompt and answer together, at the last token. Each rank loads the whole model.

    ``batch_size``: answers scored together, those of like length, padded to the longest.
    """
    folder = Path(checkpoint_dir).expanduser()
    model = load_score_model(folder, dtype={"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], device=device)
    tokenizer = tokenizers.load(folder, chat_format=chat_format)

    @torch.no_grad()
    def score(attempts: Sequence[Attempt]) -> list[float]:
        asked = [[*a.prompt.messages, {"role": "assistant", "content": a.text}] for a in attempts]
        rows = [torch.tensor(tokenizer.render(messages).tokens) for messages in asked]
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # the longest fit, or none
        found = torch.zeros(len(rows))
        for start in range(0, len(order), batch_size):
            own = order[start : start + batch_size]
            tokens = pad_sequence([rows[i] for i in own], batch_first=True).to(model.embed_tokens.weight.device)
            last = torch.tensor([len(rows[i]) - 1 for i in own], device=tokens.device)
            found[own] = model(tokens, head=partial(_at, places=last)).flatten().float().cpu()
        return found.tolist()

    return BatchReward(score=score)


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
    names = replace(model.hub_format.names, fresh=None)  # here the score must be among what is loaded
    model.hub_format = replace(model.hub_format, names=names)
    model.to_empty(device=pick_device(device))
    hub.load_weights(model, folder)
    return model.eval()


def _at(hidden: Tensor, project: Project, *, places: Tensor) -> Tensor:
    """The scores [b, 1] at ``places`` [b]; padding behind them is not seen."""
    return project(hidden[torch.arange(len(places), device=hidden.device), places])
