"""Greedy decoding of a batch of prompts with a static KV cache."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchft.modules.decoder import Decoder, Head
from torchft.modules.kv_cache import KVCache


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # blocks compiled for training would compile again for every length
def generate(
    model: Decoder, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_ids: Sequence[int]
) -> list[list[int]]:
    """The most likely continuation of each prompt, without the stop token that ended it.

    Prompts are padded on the right and may differ in length. ``max_new_tokens`` bounds each answer; the model's mode
    (train or eval) is left as it is found. Raises ValueError for an empty prompt.
    """
    if not all(prompts):
        raise ValueError(f"prompt {[len(p) for p in prompts].index(0)} is empty: give it at least a BOS token")
    device = model.embed_tokens.weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    longest = int(lengths.max())
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
    cache = KVCache(len(model.layers), num_slots=longest + max_new_tokens)
    was_training = model.training
    model.eval()
    positions = torch.arange(longest, device=device).expand_as(tokens)
    token = model(tokens, positions, head=_last(lengths - 1), cache=cache)  # [b]
    stops = torch.tensor(list(stop_ids), device=device)
    done = torch.isin(token, stops)
    answers = [token]
    for i in range(max_new_tokens - 1):
        if bool(done.all()):
            break
        position = (lengths + i)[:, None]  # padding's slots are written over from here
        token = model(token[:, None], position, head=_last(torch.zeros_like(lengths)), cache=cache)
        done |= torch.isin(token, stops)
        answers.append(token)
    model.train(was_training)
    ends = set(stop_ids)
    return [_until(row, ends) for row in torch.stack(answers, dim=1).tolist()]


def _last(index: Tensor) -> Head:
    """A head that takes the most likely token after position ``index`` [b] of each row: [b]."""
    rows = torch.arange(len(index), device=index.device)
    return lambda hidden, project: project(hidden[rows, index]).argmax(-1)


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:end]
