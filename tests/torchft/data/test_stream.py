"""Streams: order by the seed alone, exact resume whatever the ranks and workers, shares, stages, and their faults."""

import json
import os
import signal
from collections import Counter
from itertools import pairwise

import datasets as hub
import pytest
import torch
from letters import Letters, turns, write_jsonl

from torchft.data.datasets import auto, chat
from torchft.data.loader import Loader
from torchft.data.mixture import mix
from torchft.data.preferences import pairs
from torchft.data.prefetch import Prefetch
from torchft.data.stream import StreamConfig, gather
from torchft.data.stream_loader import StreamLoader, open_loader
from torchft.data.summary import summarise
from torchft.errors import UserError

SMALL = {"shuffle_rows": 5, "lookahead": 7}


def dataset(folder, file, count, *, seq_len=64, **options):
    rows = [turns("Q" * (1 + i * 7 % 23), f"{file}{i}") for i in range(1, count + 1)]
    path = write_jsonl(folder / f"{file}.jsonl", rows)
    return chat(path, tokenizer=Letters(), seq_len=seq_len, **options)


@pytest.fixture
def datasets(tmp_path):
    return [dataset(tmp_path, "a", 13, weight=0.25), dataset(tmp_path, "b", 29, weight=0.75)]


def stream(datasets, **config):
    return gather(datasets, streaming=StreamConfig(**SMALL | config))


def loader(datasets, *, seed=3, batch_size=2, packed=True, rank=0, num_ranks=1, **config):
    how = {"seed": seed, "batch_size": batch_size, "packed": packed, "rank": rank, "num_ranks": num_ranks}
    return StreamLoader(stream(datasets, **config), **how)


def same(a, b):
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.labels, b.labels) and a.where == b.where
    assert a.samples == b.samples and a.all_supervised == b.all_supervised
    assert a.positions is b.positions or torch.equal(a.positions, b.positions)


def files(batches):
    return [where.rpartition("/")[2] for batch in batches for where in batch.where]


@pytest.mark.parametrize("packed", [True, False])
def test_rows_hold_whole_samples_of_the_data(datasets, packed):
    """Cut at its positions, a row is samples that `mix` makes of the same rows."""
    made = mix(datasets)
    known = {made.where(i): made[i] for i in range(len(made))}
    for batch in loader(datasets, packed=packed).take(12):
        found = []
        for tokens, labels, positions in zip(
            batch.tokens, batch.labels, batch.positions if packed else [None] * len(batch.tokens)
        ):
            starts = [0] if positions is None else (positions == 0).nonzero().flatten().tolist()
            for start, stop in pairwise([*starts, len(tokens)]):
                found.append((tokens[start:stop].tolist(), labels[start:stop].tolist()))
        wanted = [(known[where].tokens, known[where].labels) for where in batch.where]
        if not packed:
            found = [(t[: len(w[0])], y[: len(w[0])]) for (t, y), w in zip(found, wanted, strict=True)]
        assert [pair for pair in found if any(label != -100 for label in pair[1])] == wanted
        assert batch.num_supervised == batch.all_supervised == sum(y != -100 for _, ys in wanted for y in ys)


def test_shares_are_exact_and_each_pass_has_every_row_once(datasets):
    order = files(loader(datasets, packed=False).take(60))
    for start in range(0, 120, 4):
        assert Counter(place[0] for place in order[start : start + 4]) == {"b": 3, "a": 1}
    of_b = [place for place in order if place[0] == "b"]
    first, second = of_b[:29], of_b[29:58]
    assert sorted(first) == sorted(second) == sorted(f"b.jsonl:{i}" for i in range(1, 30))
    assert first != second != sorted(first)
    plain = files(loader(datasets, packed=False, shuffle_rows=1).take(20))
    assert [place for place in plain if place[0] == "a"] == [f"a.jsonl:{i}" for i in range(1, 11)]


@pytest.mark.parametrize("packed", [True, False])
def test_resume_is_exact_at_every_batch(datasets, packed):
    """Through JSON, with samples waiting to be packed and several passes over the data."""
    straight = loader(datasets, packed=packed)
    states, batches = [], []
    for _ in range(40):
        states.append(json.dumps(straight.state_dict()))
        batches += straight.take(1)
    for start in range(0, 40, 3):
        resumed = loader(datasets, packed=packed)
        resumed.load_state_dict(json.loads(states[start]))
        for before in batches[start:]:
            same(*resumed.take(1), before)
        assert resumed.state_dict() == straight.state_dict()
    assert len(states[-1]) < 3000  # positions, not tokens


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_d18_ranks_share_the_batches_of_one(datasets, packed, num_ranks):
    alone = loader(datasets, batch_size=2 * num_ranks, packed=packed)
    ranks = [loader(datasets, packed=packed, rank=r, num_ranks=num_ranks) for r in range(num_ranks)]
    for _ in range(9):
        (whole,), parts = alone.take(1), [rank.take(1)[0] for rank in ranks]
        assert sum((part.where for part in parts), ()) == whole.where
        assert sum(part.num_supervised for part in parts) == whole.num_supervised
        assert {part.all_supervised for part in parts} == {whole.all_supervised}
        assert [rank.state_dict() for rank in ranks] == [alone.state_dict()] * num_ranks
    other = loader(datasets, batch_size=1, packed=packed)  # and the position means the same for other ranks
    other.load_state_dict(ranks[0].state_dict())
    following = sum((batch.where for batch in other.take(2 * num_ranks)), ())
    assert following == alone.take(1)[0].where


def test_d19_workers_make_the_same_and_a_killed_one_is_named(datasets):
    alone, shared = loader(datasets), loader(datasets, workers=2)
    try:
        for before, after in zip(alone.take(20), shared.take(20), strict=True):
            same(before, after)
        assert shared.state_dict() == alone.state_dict()
        resumed = loader(datasets)
        resumed.load_state_dict(json.loads(json.dumps(shared.state_dict())))
        shared.load_state_dict(json.loads(json.dumps(alone.state_dict())))
        for a, b, c in zip(resumed.take(9), shared.take(9), alone.take(9), strict=True):
            same(a, b), same(a, c)
        for pid in list(shared._workers._pool._processes):
            os.kill(pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"data worker was killed while rows from .*jsonl:\d+ to .*jsonl:\d+ were"):
            shared.take(200)
    finally:
        shared.close()


def test_stages_follow_each_other(tmp_path):
    data = [dataset(tmp_path, "a", 9, stage=1), dataset(tmp_path, "b", 4), dataset(tmp_path, "c", 8, weight=1.0)]
    data[1:] = [dataset(tmp_path, "b", 4, weight=1.0), data[2]]
    straight = loader(data, batch_size=1, packed=False)
    states, order = [], ""
    for _ in range(30):
        states.append(straight.state_dict())
        order += files(straight.take(1))[0][0]
    assert sorted(order[:12]) == list("b" * 4 + "c" * 8) and order[12:] == "a" * 18
    assert order[:9].count("b") == 4  # equal shares until b is used up
    for start in (5, 11, 12, 20):
        resumed = loader(data, batch_size=1, packed=False)
        resumed.load_state_dict(states[start])
        assert "".join(place[0] for place in files(resumed.take(30 - start))) == order[start:]


def test_prefetch_hands_out_the_same(datasets):
    plain, ahead = loader(datasets), Prefetch(loader(datasets), "cpu", depth=4)
    for _ in range(3):
        for ours, theirs in zip(ahead.take(3), plain.take(3), strict=True):
            same(ours, theirs)
        assert ahead.state_dict() == plain.state_dict()
    assert ahead.num_steps(4, epochs=1, max_steps=7) == 7
    ahead.close()


def test_split_documents_come_in_pieces_and_resume_between_them(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": chr(97 + i) * 50} for i in range(6)])
    data = [auto(path, tokenizer=Letters(), seq_len=16, too_long="split")]
    for packed in (True, False):
        straight = loader(data, batch_size=1, packed=packed)
        states, batches = [], []
        for _ in range(25):
            states.append(straight.state_dict())
            batches += straight.take(1)
        for start in range(25):
            resumed = loader(data, batch_size=1, packed=packed)
            resumed.load_state_dict(states[start])
            for before in batches[start:]:
                same(*resumed.take(1), before)


def test_a_bad_row_names_its_line_when_it_comes(tmp_path):
    rows = [turns("Q", "A")] * 600 + [turns("Q", 5)] + [turns("Q", "A")] * 9
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    data = [chat(path, tokenizer=Letters(), seq_len=64)]
    loaded = loader(data, shuffle_rows=1)
    with pytest.raises(UserError, match=r"d.jsonl:601: message 1 \(assistant\): content must be text"):
        loaded.take(500)
    dropping = loader([chat(path, tokenizer=Letters(), seq_len=64, bad_rows="drop")], shuffle_rows=1)
    dropping.take(500)
    assert dropping.counts.dropped["broken"] >= 1


def test_what_is_lost_is_said_and_counted_once(tmp_path, caplog):
    path = write_jsonl(tmp_path / "d.jsonl", [turns("Q", "A" * (90 if i % 4 else 3)) for i in range(40)])
    data = [chat(path, tokenizer=Letters(), seq_len=64, filters={"messages": {"not": []}})]
    straight = loader(data)
    straight.take(200)
    state = straight.state_dict()
    straight.take(400)
    assert "of 1,000 rows streamed so far: 750 truncated" in caplog.text
    resumed = loader(data)
    resumed.load_state_dict(state)
    resumed.take(400)
    assert resumed.counts == straight.counts
    assert straight.counts.truncated == pytest.approx(0.75 * straight.counts.rows, abs=10)


def test_d9_a_stream_that_gives_nothing_stops(tmp_path):
    rows = [turns("Q", "A") | {"n": i} for i in range(30)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    data = [chat(path, tokenizer=Letters(), seq_len=64, filters={"n": {"max": 3}})]
    with pytest.raises(UserError, match="nothing to train on"):
        summarise(stream([chat(path, tokenizer=Letters(), seq_len=3)])).check(vocab_size=2000, batch_size=1)
    loaded = loader(data, packed=False)
    write_jsonl(tmp_path / "d.jsonl", [row | {"n": 9} for row in rows])  # changed under our feet
    with pytest.raises(UserError, match=r"the whole of it gave no sample: .*filtered out"):
        loaded.take(90)


def test_d21_changed_data_or_settings_are_refused(datasets, tmp_path):
    state = loader(datasets).state_dict()
    with pytest.raises(UserError, match=r"seed was 3, now 4; .*|lookahead was 7, now 8"):
        loader(datasets, seed=4, lookahead=8).load_state_dict(state)
    with open(tmp_path / "a.jsonl", "a") as f:
        f.write(json.dumps(turns("new", "row")) + "\n")
    with pytest.raises(UserError, match="fingerprint was"):
        loader(datasets).load_state_dict(state)


def test_a_stream_needs_max_steps(datasets):
    with pytest.raises(UserError, match="max_steps: a stream has no end"):
        loader(datasets).num_steps(2, epochs=1, max_steps=None)
    assert isinstance(open_loader(gather(datasets, streaming=None), batch_size=1, seed=0), Loader)
    assert isinstance(open_loader(stream(datasets), batch_size=1, seed=0), StreamLoader)


def test_the_summary_is_of_the_first_rows(datasets):
    summary = summarise(stream(datasets))
    assert summary.is_probe and str(summary).startswith("a stream; its first 42 rows -> 42 samples")
    summary.check(vocab_size=2000, batch_size=100)  # more than the probe has


@pytest.mark.parametrize("packed", [True, False])
def test_pairs_are_streamed_whole_with_their_targets(tmp_path, packed):
    """Their documents and numbers are those of the same rows tokenised before training, and they resume."""
    rows = [
        {"prompt": "Q" * (i % 5 + 1), "chosen": f"good{i}", "rejected": "bad" * (i % 3 + 1), "m": i / 2}
        for i in range(17)
    ]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    data = [pairs(path, tokenizer=Letters(), seq_len=80, margin_column="m")]
    made = mix(data)
    by_place = {made.where(i): i for i in range(len(made))}
    straight, resumed = loader(data, packed=packed), loader(data, packed=packed)
    seen = 0
    for _ in range(20):
        state = straight.state_dict()
        (batch,) = straight.take(1)
        resumed.load_state_dict(json.loads(json.dumps(state)))
        same(*resumed.take(1), batch)
        cuts = [*(batch.positions.flatten() == 0).nonzero().flatten().tolist(), batch.tokens.numel()]
        for k, (where, documents) in enumerate(zip(batch.where, batch.documents_of.tolist(), strict=True)):
            places = made.documents(by_place[where])
            assert len(documents) == len(places) == 2
            for document, place in zip(documents, places):
                start, stop = cuts[document], cuts[document + 1]
                assert batch.tokens.flatten()[start:stop].tolist() == made.tokens[place].tolist()
                assert batch.labels.flatten()[start:stop].tolist() == made.labels[place].tolist()
            assert batch.targets[k].tolist() == [int(where.rpartition(":")[2]) / 2 - 0.5]
            seen += 1
        assert batch.all_samples == len(batch.where)
    assert seen >= 40


def test_duplicates_of_a_stream_are_not_quietly_kept(tmp_path):
    with pytest.raises(UserError, match="deduplicate would have to remember every row of a stream"):
        stream([dataset(tmp_path, "a", 4, deduplicate=True)])


def test_nothing_of_the_hub_is_downloaded_whole(monkeypatch):
    asked, read = [], []

    def numbers():
        for n in range(10_000):
            read.append(n)
            yield turns("Q", f"A{n}")

    def load_dataset(path, **how):
        asked.append(how["streaming"])
        return hub.IterableDataset.from_generator(numbers)

    monkeypatch.setattr(hub, "load_dataset", load_dataset)
    loaded = loader([chat("org/name", tokenizer=Letters(), seq_len=64)], packed=False)
    (batch,) = loaded.take(1)
    assert all(asked) and len(read) < 600 and batch.where[0].startswith("org/name[train]:")
    state = loaded.state_dict()
    (following,) = loaded.take(1)
    resumed = loader([chat("org/name", tokenizer=Letters(), seq_len=64)], packed=False)
    resumed.load_state_dict(state)
    same(*resumed.take(1), following)
