"""Exact match among ranks: the answers of one process, of which each rank gives a part."""

from dataclasses import replace

import pytest
import torch
from processes import run_ranks
from torch.distributed.fsdp import fully_shard

from torchft import shipped
from torchft.generation import exact_match
from torchft.generation.exact_match import ExactMatchConfig, answer_all, answer_sharded, share_right
from torchft.generation.loaded import load
from torchft.training.distributed import ParallelConfig, init

BASE = shipped.config_path("demo/base")
LIMITS = ExactMatchConfig(source="", max_new_tokens=12, batch_size=2)
QUESTIONS = [
    [
        {"role": "user", "content": f'Repeat the word "{word}".'},
        {"role": "assistant", "content": word},
    ]
    for word in ("red", "blue", "green", "one", "twelve")
]


def answers_of_rank(parallel, fits):
    """Twice, so that the first time leaves the model as it was; and how many questions this rank decoded."""
    decoded = 0

    def counted(model, tokenizer, conversations, limits):
        nonlocal decoded
        decoded += len(conversations)
        return answer_all(model, tokenizer, conversations, limits)

    exact_match.answer_all = counted
    with init(parallel, device="cpu") as world:
        model, tokenizer = load(
            BASE, dtype=torch.float32, device=world.device, tp_mesh=world.tp_mesh, tokens=world.tokens
        )
        for layer in model.layers:
            fully_shard(layer, mesh=world.mesh)
        fully_shard(model, mesh=world.root_mesh)
        for _ in range(2):
            found = answer_sharded(model, tokenizer, QUESTIONS, LIMITS, tp=world.tokens.tp, fits=fits)
    return found, decoded


@pytest.mark.parametrize(
    ("parallel", "fits", "parts"),
    [({}, True, [6, 4]), ({}, False, [10, 10]), ({"tp": 2}, True, [10, 10]), ({"cp": 2}, True, [6, 4])],
)
def test_ranks_answer_what_one_process_does(parallel, fits, parts):
    model, tokenizer = load(BASE, dtype=torch.float32, device=torch.device("cpu"))
    want = answer_all(model, tokenizer, QUESTIONS, replace(LIMITS, batch_size=5))
    assert share_right(want) > 0.5 and len({answer.got for answer in want}) == 5
    found, decoded = zip(*run_ranks(answers_of_rank, 2, ParallelConfig(**parallel), fits))
    assert all(own == want for own in found) and list(decoded) == parts
