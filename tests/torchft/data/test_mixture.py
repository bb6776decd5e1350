"""Several data sets: shares of an epoch, stages, no sample twice before all came once; exact resume of a mixture."""

import json
from collections import Counter

import pytest
from letters import Letters, turns, write_jsonl

from torchft.data.datasets import auto, chat
from torchft.data.loader import Loader
from torchft.data.mixture import mix
from torchft.data.summary import summarise
from torchft.errors import UserError


def dataset(folder, file, count, **options):
    path = write_jsonl(folder / f"{file}.jsonl", [turns("Q" * (1 + i % 7), f"{file}{i}") for i in range(1, count + 1)])
    return chat(path, tokenizer=Letters(), seq_len=64, **options)


@pytest.fixture
def mixed(tmp_path):
    return mix([dataset(tmp_path, "a", 40, weight=0.25), dataset(tmp_path, "b", 30, weight=0.75)])


def names(batches):
    """How often each file's samples come."""
    return Counter(where.rpartition("/")[2][0] for batch in batches for where in batch.where)


def test_without_weights_an_epoch_has_everything(tmp_path):
    together = mix([dataset(tmp_path, "a", 5), dataset(tmp_path, "b", 3)])
    alone = [dataset(tmp_path, name, n).samples() for name, n in (("a", 5), ("b", 3))]
    assert [*together] == [*alone[0], *alone[1]]
    assert [together.where(i) for i in (0, 4, 5, 7)] == [f"{tmp_path}/{place}" for place in
        ("a.jsonl:1", "a.jsonl:5", "b.jsonl:1", "b.jsonl:3")]  # fmt: skip
    assert together.counts.rows == 8
    for _ in range(2):
        loader = Loader(together, batch_size=3, seed=0)
        assert sorted(i for batch in loader for i in batch.samples) == list(range(8))


@pytest.mark.parametrize("packed", [False, True])
def test_weights_are_shares_and_no_sample_repeats_too_early(mixed, packed):
    """b's 30 are 75%: an epoch has 10 of a, and four epochs each of a's 40 once."""
    loader = Loader(mixed, batch_size=4, seed=3, packed=packed)
    steps = loader.num_steps(2, epochs=4, max_steps=None)
    seen, windows = Counter(), 0
    for epoch in range(4):
        batches = []
        while loader.epoch == epoch:
            batches += loader.take(2)
            windows += 1
        assert names(batches) == {"a": 10, "b": 30}
        seen += Counter(i for batch in batches for i in batch.samples)
    assert windows == steps
    assert seen == Counter({**dict.fromkeys(range(40), 1), **dict.fromkeys(range(40, 70), 4)})


@pytest.mark.parametrize("packed", [False, True])
def test_a_mixture_resumes_at_every_batch(mixed, packed):
    how = {"batch_size": 3, "seed": 1, "packed": packed}
    straight = Loader(mixed, **how)
    states, batches = [], []
    for _ in range(25):
        states.append(json.dumps(straight.state_dict()))
        batches += straight.take(1)
    for start, state in enumerate(states):
        resumed = Loader(mixed, **how)
        resumed.load_state_dict(json.loads(state))
        assert [resumed.take(1)[0].samples for _ in batches[start:]] == [b.samples for b in batches[start:]]


def test_another_weight_is_another_order(tmp_path, mixed):
    state = Loader(mixed, batch_size=3, seed=1).state_dict()
    other = mix([dataset(tmp_path, "a", 40, weight=0.5), dataset(tmp_path, "b", 30, weight=0.5)])
    with pytest.raises(UserError, match=r"mixture was \[\[40, 0.25, 0\], \[30, 0.75, 0\]\], now"):
        Loader(other, batch_size=3, seed=1).load_state_dict(state)


@pytest.mark.parametrize("packed", [False, True])
def test_stages_come_one_after_the_other(tmp_path, packed):
    late, early = dataset(tmp_path, "a", 9, stage=1), dataset(tmp_path, "b", 6)
    loader = Loader(mix([late, early]), batch_size=1, seed=0, packed=packed)
    order = "".join(where.rpartition("/")[2][0] for batch in loader for where in batch.where)
    assert order == "b" * 6 + "a" * 9


def test_weights_that_say_no_share_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"datasets.weight: give every data set of stage 0 one, or none; .*b.jsonl has"):
        mix([dataset(tmp_path, "a", 3, weight=1.0), dataset(tmp_path, "b", 3)])
    with pytest.raises(UserError, match=r"datasets.weight: 0.0 of x must be above 0"):
        mix([dataset(tmp_path, "a", 3, weight=0.0, name="x"), dataset(tmp_path, "b", 3, weight=1.0)])


def test_the_summary_names_each_data_set(mixed, tmp_path):
    lines = summarise(mixed).lines()
    share = 0.25 * 471 / 40 / (0.25 * 471 / 40 + 0.75 * (len(mixed.tokens) - 471) / 30)
    want = f"a.jsonl: weight 0.25, 40 samples, 471 tokens, {share:.1%} of what is trained on"
    assert any(line.endswith(want) for line in lines), lines
    shares = summarise(mixed).sources
    assert sum(share.tokens for share in shares) == len(mixed.tokens)
    assert sum(share.supervised for share in shares) == summarise(mixed).supervised


def test_caps_filters_and_duplicates(tmp_path):
    rows = [turns("Hi", "Yo") | {"n": i} for i in range(4)] + [turns("Hi", "No") | {"n": 4}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    how = {"tokenizer": Letters(), "seq_len": 50}
    assert len(auto(f"{path}#2", **how).samples()) == 2
    assert auto(path, filters={"n": {"min": 2}}, **how).samples().counts.dropped == {"filtered out": 2}
    unique = auto(path, deduplicate=True, **how).samples()
    assert len(unique) == 2 and unique.counts.dropped == {"the same as an earlier row": 3}
    assert [unique.where(i).rpartition(":")[2] for i in range(2)] == ["1", "5"]
    with pytest.raises(UserError, match="max_rows: 1, but source is"):
        auto(f"{path}#2", max_rows=1, **how).samples()
    with pytest.raises(UserError, match="every row is empty, broken or left out by the filters"):
        auto(path, filters={"n": 9}, **how).samples()


def test_auto_by_the_first_row(tmp_path):
    letters, plain = Letters(), Letters(has_chat=False)
    answer = letters.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}])
    rows = [
        turns("Hi", "Yo"),
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]},
        {"instruction": "Hi", "output": "Yo", "text": "both"},
        {"prompt": "Hi", "completion": "Yo"},
        {"prompt": "Hi", "answer": "Yo"},
        {"input_ids": answer.tokens, "labels": [t if on else -100 for t, on in zip(answer.tokens, answer.train)]},
        {"input_ids": answer.tokens, "loss_mask": [int(on) for on in answer.train], "text": "Hi Yo"},
    ]
    made = []
    for i, row in enumerate(rows):
        path = write_jsonl(tmp_path / f"{i}.jsonl", [row])
        made += auto(path, tokenizer=letters, seq_len=50).samples()
    assert all(sample == made[0] for sample in made) and made[0].tokens == answer.tokens
    (raw,) = auto(write_jsonl(tmp_path / "t.jsonl", [{"text": "Hi"}]), tokenizer=plain, seq_len=50).samples()
    assert raw.tokens == [letters.bos_id, *map(ord, "Hi"), letters.eos_id]
    with pytest.raises(UserError, match="no chat template"):
        auto(str(tmp_path / "0.jsonl"), tokenizer=plain, seq_len=50).samples()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 2], "labels": [1]}, "'labels' has 1 values, but 'input_ids' 2"),
        ({"input_ids": [1, 2], "labels": [-100, 3]}, "labels[1] is 3, but input_ids[1] is 2: a label is the id at its"),
        ({"input_ids": [1, -1]}, "input_ids[1] is -1; ids start at 0"),
        ({"input_ids": "12"}, "'input_ids' must be a list of token ids, found '12'"),
        ({"input_ids": [1, 2.5]}, "must be a list of token ids"),
        ({"input_ids": []}, "'input_ids' is empty"),
    ],
)
def test_d16_wrong_ids_and_labels_name_the_row(tmp_path, row, message):
    path = write_jsonl(tmp_path / "d.jsonl", [{"input_ids": [1, 2]}, row])
    with pytest.raises(UserError) as e:
        auto(path, tokenizer=Letters(), seq_len=50).samples()
    assert str(e.value).startswith(f"{path}:2: ") and message in str(e.value)
