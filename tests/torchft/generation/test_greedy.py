"""Greedy decoding against transformers.generate, token for token."""

import pytest
import torch
from tiny import LLAMA3_ROPE, checkpoint, decoder, tokens

from torchft import models
from torchft.generation.greedy import generate

LENGTHS = (1, 7, 3, 30, 12, 1)
PROMPTS = [tokens(1, n, seed=n + i)[0].tolist() for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    theirs = checkpoint(folder, rope_parameters=LLAMA3_ROPE)
    return models.load(folder, dtype=torch.float32), theirs


def expected(theirs, prompt, max_new_tokens, stop_ids):
    row = torch.tensor([prompt])
    out = theirs.generate(
        row,
        attention_mask=torch.ones_like(row),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    return out[:-1] if out[-1] in stop_ids else out


@pytest.mark.parametrize("max_new_tokens", [1, 2, 60])
@pytest.mark.parametrize("num_stops", [1, 12])
def test_batch_is_transformers_one_by_one(pair, max_new_tokens, num_stops):
    ours, theirs = pair
    stop_ids = tuple(range(num_stops))  # of 101 tokens: rows end at different steps
    want = [expected(theirs, p, max_new_tokens, stop_ids) for p in PROMPTS]
    assert generate(ours, PROMPTS, max_new_tokens=max_new_tokens, stop_ids=stop_ids) == want
    assert [generate(ours, [p], max_new_tokens=max_new_tokens, stop_ids=stop_ids)[0] for p in PROMPTS] == want
    if num_stops == 12 and max_new_tokens == 60:
        assert len({len(answer) for answer in want}) > 2  # the case is not an easy one


def test_without_stop_ids(pair):
    ours, theirs = pair
    answers = generate(ours, PROMPTS, max_new_tokens=20, stop_ids=())
    assert [len(a) for a in answers] == [20] * len(PROMPTS)
    assert answers == [expected(theirs, p, 20, ()) for p in PROMPTS]


def test_stop_at_once_is_an_empty_answer(pair):
    ours, _ = pair
    [[first]] = generate(ours, PROMPTS[:1], max_new_tokens=1, stop_ids=())
    assert generate(ours, PROMPTS[:1], max_new_tokens=5, stop_ids=(first,)) == [[]]


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_gradients_are_left_as_found(pair, training):
    ours, _ = pair
    ours.train(training)
    ours.recompute = True
    generate(ours, PROMPTS, max_new_tokens=3, stop_ids=(2,))
    assert ours.training == training
    assert all(p.requires_grad and p.grad is None for p in ours.parameters())
    ours.eval()
    ours.recompute = False


def test_empty_prompt_is_refused(pair):
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(pair[0], [[5], []], max_new_tokens=2, stop_ids=(2,))


def test_compiled_blocks_are_not_compiled_again_for_decoding():
    model = decoder().eval()
    prompts = [[5, 6, 7], [8, 9], [3]]
    plain = generate(model, prompts, max_new_tokens=5, stop_ids=[])
    for layer in model.layers:
        layer.compile(fullgraph=True, backend=lambda *_: pytest.fail("compiled"))
    assert generate(model, prompts, max_new_tokens=5, stop_ids=[]) == plain
