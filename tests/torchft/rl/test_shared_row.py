"""Micro-batches that fill rows of one shape."""

import random

import pytest
import torch

from torchft.data.prompts import Prompt
from torchft.rl.rollout import Episode
from torchft.rl.shared_row import filled, shared_rows


def episodes(seed):
    """Groups of four, of ragged lengths, with prompts of their own."""
    rng = random.Random(seed)
    found = []
    for group in range(6):
        prompt = [group + 1] * rng.randint(2, 12)
        for _ in range(4):
            episode = Episode(
                prompt=Prompt(messages=[], answer="", values={}, where=""), seed=0, messages=[], environment=None
            )
            episode.add(prompt)
            n = rng.randint(1, 10)
            episode.add([50] * n, [-1.0] * n)
            found.append(episode)
    return found, [rng.random() > 0.2 for _ in found]


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_one_shape_hold_all_answers_and_are_nearly_full(seed):
    answers, counts = episodes(seed)
    room = 40
    parts = [[list(range(0, 24, 2))], [list(range(1, 13, 2)), list(range(13, 24, 2))]]
    found = filled(parts, answers, counts, room=room)
    assert [[i for own in part for i in own] for part in found] == [list(range(0, 24, 2)), list(range(1, 24, 2))]
    for part in found:
        sizes = []
        for numbers in part:
            row = shared_rows(answers, numbers, scores=torch.zeros(24), counts=counts, pad_id=0, length=32, room=room)
            assert row.shared is not None and row.shared.tokens.shape == (1, room)  # raises if they do not fit
            sizes.append(int((row.shared.tokens != 0).sum()))
        for numbers, size, (first, *_) in zip(part, sizes, part[1:]):
            trunk = next((answers[i] for i in reversed(numbers) if counts[i]), None)
            answer, known = answers[first], 0
            if trunk and trunk.tokens[0] == answer.tokens[0]:
                known = answer.chosen.index(True) - 1
            assert numbers and size + len(answer.tokens) - known > room  # what begins the next row had no room
