"""Log-probabilities of continuations against transformers, and what they pick."""

import pytest
import torch
from tiny import checkpoint, tokens

from torchft import models
from torchft.errors import UserError
from torchft.generation.multiple_choice import continuation_logps, pick, right_choice

LENGTHS = [(5, 3), (1, 9), (30, 1), (7, 7), (12, 2)]
PAIRS = [(tokens(1, a, seed=a)[0].tolist(), tokens(1, b, seed=b + 50)[0].tolist()) for a, b in LENGTHS]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_logps_are_transformers(tmp_path, batch_size):
    theirs = checkpoint(tmp_path)
    ours = models.load(tmp_path, dtype=torch.float32)
    pairs = list(PAIRS)
    with torch.no_grad():
        best = theirs.generate(torch.tensor([PAIRS[0][0]]), max_new_tokens=4, do_sample=False, eos_token_id=None)
    pairs.append((PAIRS[0][0], best[0, 5:].tolist()))
    found = continuation_logps(ours, pairs, batch_size=batch_size)
    for (a, b), (logp, is_greedy) in zip(pairs, found):
        with torch.no_grad():
            logps = theirs(torch.tensor([[*a, *b]])).logits[0, len(a) - 1 : -1].log_softmax(-1)
        assert abs(logp - logps[torch.arange(len(b)), b].sum()) < 1e-4
        assert is_greedy == (logps.argmax(-1).tolist() == b)
    assert [is_greedy for _, is_greedy in found] == [False] * 5 + [True]


def test_pick_by_length():
    logps, choices, num_tokens = [-4.0, -5.0, -6.0], ["ab", "abcd", "abcdefghij"], [1, 4, 2]
    assert [pick(logps, choices, num_tokens, how) for how in ("none", "tokens", "bytes")] == [0, 1, 2]


def test_right_choice():
    choices = ["red", "green", "2"]
    assert [right_choice(a, choices, "x") for a in (1, "red", "B", "c", "1", "2")] == [1, 0, 1, 2, 1, 2]
    for wrong in (3, "blue", "D", -1, None, "²"):
        with pytest.raises(UserError, match="row:7: the answer"):
            right_choice(wrong, choices, "row:7")
