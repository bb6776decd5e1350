"""Batches by hand, exact resume at every batch, and gradients: packed == padded (faults D15, D17, D21, D23, K19)."""

import json
import random
from functools import partial

import pytest
import torch
from tiny import SIZES

from torchft import models
from torchft.data.loader import Loader
from torchft.data.samples import Samples, shift
from torchft.errors import UserError
from torchft.losses.likelihood import nll_sum
from torchft.modules import decoder, masks

N = -100


def make(lengths, *, seq_len=64, seed=0, vocab_size=101):
    """Random samples whose second half is trained."""
    draw = random.Random(seed)
    samples = Samples(seq_len=seq_len, pad_id=0)
    for i, n in enumerate(lengths):
        tokens = [draw.randrange(vocab_size) for _ in range(n)]
        samples.append(shift(tokens, [j >= n // 2 for j in range(n)]), origin="f", number=i + 1)
    return samples


def by_hand(*rows, seq_len):
    samples = Samples(seq_len=seq_len, pad_id=0)
    for tokens, train in rows:
        samples.append(shift(tokens, train), origin="f", number=1)
    return samples


RAGGED = [random.Random(1).randrange(4, 60) for _ in range(23)]
KINDS = [
    {"packed": True},
    {"packed": False},
    {"shuffle": False},
    {"drop_last": True},
    {"packed": True, "shuffle": False},
]


def same(a, b):
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels) and a.samples == b.samples
    assert (a.positions is None) == (b.positions is None)
    assert a.positions is None or torch.equal(a.positions, b.positions)


def test_packed_batch_by_hand():
    samples = by_hand(([5, 6, 7], [False, False, True]), ([8, 9], [True, True]), ([3, 4, 2, 1], [True] * 4), seq_len=6)
    (batch,) = Loader(samples, batch_size=2, seed=0, packed=True, shuffle=False)
    rows = {tuple(t): (y, p) for t, y, p in zip(batch.tokens.tolist(), batch.labels.tolist(), batch.positions.tolist())}
    assert rows == {
        (3, 4, 2, 1, 8, 9): ([4, 2, 1, N, 9, N], [0, 1, 2, 3, 0, 1]),
        (5, 6, 7, 0, 0, 0): ([N, 7, N, N, N, N], [0, 1, 2, 0, 1, 2]),
    }
    assert batch.num_supervised == 5
    assert batch.tokens.dtype == batch.labels.dtype == batch.positions.dtype == torch.int64


def test_padded_batch_by_hand():
    samples = by_hand(([5, 6, 0], [False, True, True]), ([8, 9], [True, True]), seq_len=5)
    (batch,) = Loader(samples, batch_size=2, seed=0, shuffle=False)
    assert batch.tokens.tolist() == [[5, 6, 0, 0, 0], [8, 9, 0, 0, 0]]
    assert batch.labels.tolist() == [[6, 0, N, N, N], [9, N, N, N, N]]  # D15: 0 is pad and eos, the eos is trained
    assert batch.positions is None
    assert (batch.num_supervised, batch.samples) == (3, (0, 1))


def test_padding_goes_to_a_multiple_of_64_but_not_beyond_seq_len():
    for longest, seq_len, expected in [(10, 300, 64), (64, 300, 64), (65, 300, 128), (299, 300, 300), (10, 20, 20)]:
        (batch,) = Loader(make([longest, 5], seq_len=seq_len), batch_size=2, seed=0)
        assert batch.tokens.shape == (2, expected)


@pytest.mark.parametrize("options", KINDS)
def test_an_epoch_has_each_sample_once(options):
    loader = Loader(make(RAGGED), batch_size=4, seed=0, **options)
    for epoch in range(3):
        assert loader.epoch == epoch
        batches = list(loader)
        seen = sorted(i for batch in batches for i in batch.samples)
        assert len(batches) == len(loader)
        if options.get("drop_last"):
            assert len(set(seen)) == len(seen) == 20 and all(len(b.tokens) == 4 for b in batches)
        else:
            assert seen == list(range(23))


@pytest.mark.parametrize("options", KINDS)
def test_resume_is_exact_at_every_batch(options):
    """Two epochs straight, against a new loader started from the saved state before each batch; across the border."""
    samples = make(RAGGED)
    straight, states = [], []
    loader = Loader(samples, batch_size=3, seed=5, **options)
    for _ in range(2 * len(loader)):
        states.append(json.dumps(loader.state_dict()))
        straight += loader.take(1)
    assert loader.epoch == 2
    for start, state in enumerate(states):
        resumed = Loader(samples, batch_size=3, seed=5, **options)
        resumed.load_state_dict(json.loads(state))
        rest = [batch for _ in range(len(straight) - start) for batch in resumed.take(1)]
        for ours, theirs in zip(rest, straight[start:], strict=True):
            same(ours, theirs)


def test_resumed_epochs_differ_from_the_first_when_shuffled():
    loader = Loader(make(RAGGED), batch_size=3, seed=5)
    assert [b.samples for b in loader] != [b.samples for b in loader]


def test_take_never_spans_epochs():
    loader = Loader(make(RAGGED), batch_size=4, seed=0)  # 6 batches
    assert [len(loader.take(4)) for _ in range(4)] == [4, 2, 4, 2]
    assert loader.epoch == 2


def test_batch_size_may_change_on_resume():
    samples = make(RAGGED)
    loader = Loader(samples, batch_size=3, seed=5)
    order = [i for b in Loader(samples, batch_size=3, seed=5) for i in b.samples]
    loader.take(2)
    resumed = Loader(samples, batch_size=5, seed=5)
    resumed.load_state_dict(loader.state_dict())
    assert [i for b in resumed for i in b.samples] == order[6:]


@pytest.mark.parametrize("packed", [True, False])
def test_d23_order_depends_on_seed_and_epoch_alone(packed):
    samples = make(RAGGED)

    def order(seed):
        return [b.samples for b in Loader(samples, batch_size=3, seed=seed, packed=packed)]

    torch.manual_seed(0)
    state, first = torch.get_rng_state(), order(1)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched ...
    torch.manual_seed(99)
    assert order(1) == first  # ... nor used
    assert order(2) != first
    later = Loader(samples, batch_size=3, seed=0, packed=packed)
    list(later)
    assert [b.samples for b in later] != first  # (seed 0, epoch 1) is not (seed 1, epoch 0)


def test_d21_changed_data_or_settings_refuse_to_resume():
    state = Loader(make(RAGGED), batch_size=3, seed=5).state_dict()
    with pytest.raises(UserError, match=r"fingerprint was '.*', now '.*'. The saved position") as e:
        Loader(make(RAGGED, seed=1), batch_size=3, seed=5).load_state_dict(state)
    assert "seed was" not in str(e.value)
    with pytest.raises(UserError, match="seed was 5, now 6; packed was False, now True; shuffle was True, now False"):
        Loader(make(RAGGED), batch_size=3, seed=6, packed=True, shuffle=False).load_state_dict(state)


def test_d17_fewer_rows_than_a_batch():
    assert [len(b.tokens) for b in Loader(make([5, 6, 7]), batch_size=4, seed=0)] == [3]
    with pytest.raises(UserError, match="gives 3 rows, not enough for one batch of 4"):
        Loader(make([5, 6, 7]), batch_size=4, seed=0, drop_last=True)
    with pytest.raises(UserError, match="0 rows"):
        Loader(make([]), batch_size=4, seed=0)


def test_empty_rows_give_every_batch_one_shape():
    samples = by_hand(([5, 6, 7], [False, True, True]), ([8, 9], [True, True]), ([3, 4], [True] * 2), seq_len=4)
    how = {"batch_size": 2, "seed": 0, "shuffle": False, "one_shape": True}
    _, last = Loader(samples, **how)
    assert last.tokens.tolist() == [[3, 4, 0, 0], [0, 0, 0, 0]]
    assert last.labels.tolist() == [[4, N, N, N], [N, N, N, N]]
    assert (last.num_tokens, last.num_supervised, last.samples, last.positions) == (4, 1, (2,), None)
    for packed in (False, True):
        loader = Loader(make(RAGGED), **how | {"batch_size": 3 + packed}, packed=packed)
        batches = list(loader)
        assert {b.tokens.shape for b in batches} == {(3 + packed, 64)} and len(batches) == len(loader)
        with_samples = sum(int((b.labels != N).any(1).sum()) for b in batches)
        assert sum(b.num_tokens for b in batches) == 64 * with_samples < sum(b.tokens.numel() for b in batches)
        assert sorted(i for b in batches for i in b.samples) == list(range(23))
    assert batches[-1].positions[-1].tolist() == list(range(64))


def test_batch_to_keeps_everything():
    (batch,) = Loader(make([5, 6]), batch_size=2, seed=0, packed=True)
    same(batch.to("cpu"), batch)
    positions = batch.positions
    assert batch.documents == (int((positions == 0).sum()), int(positions.max()) + 1, False)
    assert batch.to("meta").tokens.device.type == "meta"


def gradients(model, loader):
    """Gradient of the mean loss over one epoch, accumulated batch by batch."""
    batches = list(loader)
    supervised = sum(b.num_supervised for b in batches)
    model.zero_grad()
    for batch in batches:
        head = partial(nll_sum, labels=batch.labels)
        (model(batch.tokens, batch.positions, documents=batch.documents, head=head) / supervised).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_packed_gradients_equal_padded_and_a_missing_document_mask_shows(monkeypatch):
    torch.manual_seed(0)
    model = models.build({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}, device="cpu")
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    samples = make(RAGGED)
    padded = gradients(model, Loader(samples, batch_size=4, seed=0))
    packed = gradients(model, Loader(samples, batch_size=2, seed=3, packed=True))
    assert (packed - padded).norm() / padded.norm() <= 1e-6
    for options in ({"batch_size": 3}, {"batch_size": 4, "packed": True}):
        filled = gradients(model, Loader(samples, seed=0, one_shape=True, **options))
        assert (filled - padded).norm() / padded.norm() <= 1e-6
    monkeypatch.setattr(decoder, "visible", lambda x, head_dim, sight, *_: masks.visible(x, head_dim, sight))
    leaky = gradients(model, Loader(samples, batch_size=2, seed=3, packed=True))
    assert (leaky - padded).norm() / padded.norm() > 0.1


@pytest.mark.parametrize("one_shape", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_ranks_share_the_batches_of_one(kind, num_ranks, one_shape):
    """Rows, order and position are those of one process with larger batches; nobody runs out before others."""
    samples = make(RAGGED)
    alone = Loader(samples, batch_size=2 * num_ranks, seed=3, one_shape=one_shape, **kind)
    how = {"batch_size": 2, "seed": 3, "num_ranks": num_ranks, "one_shape": one_shape, **kind}
    together = [Loader(samples, rank=r, **how) for r in range(num_ranks)]
    assert {len(loader) for loader in together} == {len(alone)}
    for _ in range(2 * len(alone)):
        (want,), parts = alone.take(1), [loader.take(1)[0] for loader in together]
        assert sum((part.samples for part in parts), ()) == want.samples
        assert sum(part.num_supervised for part in parts) == want.num_supervised
        assert {part.all_supervised for part in parts} == {want.num_supervised} == {want.all_supervised}
        assert [loader.state_dict() for loader in together] == [alone.state_dict()] * num_ranks
        rows = [row[row != samples.pad_id].tolist() for part in parts for row in part.tokens if row.any()]
        assert rows == [row[row != samples.pad_id].tolist() for row in want.tokens if row.any()]
        for part in parts:
            assert part.tokens.shape[0] >= 1 and (part.samples or (part.labels == N).all())
            assert part.num_supervised == (part.labels != N).sum()


def test_an_epoch_may_end_between_ranks():
    samples = make([10] * 5)
    loaders = [Loader(samples, batch_size=2, seed=0, rank=r, num_ranks=2) for r in range(2)]
    for loader, sizes in zip(loaders, ([2, 1], [2, 0])):
        assert [len(batch.samples) for batch in loader] == sizes
