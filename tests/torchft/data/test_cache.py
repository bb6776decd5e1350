"""Tokens kept from run to run: equal to those made anew, found again only if nothing that decides them has changed."""

import json
import os
from dataclasses import replace

import pytest
from letters import Letters, turns, write_jsonl

from torchft.data import builder, cache, datasets, named, named_pairs
from torchft.data.loader import Loader
from torchft.data.samples import Encoded
from torchft.data.summary import summarise
from torchft.models import llama3
from torchft.tokenizers import folder as tokenizer_folder


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    """The folder of kept files."""
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def made(monkeypatch):
    """How often rows were tokenised."""
    calls = []
    collect = builder.collect
    monkeypatch.setattr(builder, "collect", lambda *a, **k: calls.append(1) or collect(*a, **k))
    return calls


def tokenizer(fingerprint="t"):
    letters = Letters()
    letters.fingerprint = fingerprint
    return letters


ROWS = [turns("Hi", "Yo"), turns("What <end> is it?", "A cat that is cut"), turns("", "x"), turns("A", "B", "C", "D")]


@pytest.fixture
def data(tmp_path):
    return write_jsonl(tmp_path / "d.jsonl", ROWS)


def build(source, **changes):
    return datasets.chat(source, **{"tokenizer": tokenizer(), "seq_len": 30} | changes).samples()


def test_what_is_read_is_what_was_made(data, made, kept):
    first, second = build(data), build(data)
    assert len(made) == 1
    assert first.cache is None and second.cache.parent == kept
    assert [*second] == [*first] and len(second) == 3
    assert second.counts == first.counts and second.counts.dropped and second.counts.notes
    assert [second.where(i) for i in range(3)] == [first.where(i) for i in range(3)]
    assert (second.seq_len, second.pad_id) == (first.seq_len, first.pad_id)
    before, after = summarise(first), summarise(second)
    assert replace(after, cache=None) == before and f"({kept})" in str(after) and "earlier run" not in str(before)
    batches = [[b.tokens.tolist() for b in Loader(s, batch_size=2, seed=1)] for s in (first, second)]
    assert batches[0] == batches[1]
    second.append(second[0], origin="more", number=1)  # as one made anew
    assert second.fingerprint() != first.fingerprint() and second.where(3) == "more:1"


CHANGES = {
    "seq_len": {"seq_len": 29},
    "setting": {"train_on": "all"},
    "split": {"split": "train[:3]"},
    "max_rows": {"max_rows": 2},
    "tokenizer": {"tokenizer": tokenizer("other")},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_another_setting_is_another_file(data, made, changes):
    build(data)
    assert build(data, **changes).cache is None
    assert build(data).cache and len(made) == 2


def test_another_function_and_other_data_are_other_files(data, made, tmp_path):
    build(data)
    datasets.instruct(
        write_jsonl(tmp_path / "i.jsonl", [{"prompt": "a", "completion": "b"}]), tokenizer=tokenizer(), seq_len=30
    ).samples()
    status = os.stat(data)
    write_jsonl(tmp_path / "d.jsonl", [turns("Ho", "Yo"), *ROWS[1:]])
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))  # contents count, not times and sizes
    assert os.stat(data).st_size == status.st_size
    assert build(data).tokens[2] == ord("H") and build(data).tokens[3] == ord("o")
    assert len(made) == 3


def test_the_text_of_the_package_and_its_engines_count(data, made, monkeypatch):
    versions = cache._versions()
    assert len(versions) == 2 + len(cache.ENGINES)
    build(data)
    for i in range(len(versions)):
        monkeypatch.setattr(cache, "_versions", lambda i=i: [*versions[:i], "other", *versions[i + 1 :]])
        assert build(data).cache is None
    assert len(made) == 1 + len(versions)


DAMAGE = {
    "empty": lambda text: b"",
    "cut": lambda text: text[:-1],
    "cut_header": lambda text: text[:20],
    "a_token": lambda text: text[:-400] + bytes([text[-400] ^ 1]) + text[-399:],
    "no_object": lambda text: b"[]\n" + text,
    "a_key_less": lambda text: text.replace(b'"pad_id"', b'"dap_id"'),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_made_again(data, made, kept, damage, caplog):
    want = [*build(data)]
    (file,) = kept.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    again = build(data)
    assert [*again] == want and again.cache is None and len(made) == 2
    assert "is damaged" in caplog.text
    assert [*build(data)] == want and len(made) == 2


def test_errors_are_not_kept(tmp_path, kept, made):
    bad = write_jsonl(tmp_path / "bad.jsonl", [turns("a", "b"), {"messages": 7}])
    for _ in range(2):
        with pytest.raises(Exception, match="messages"):
            build(bad)
    assert len(made) == 2 and not kept.exists()


def test_a_disk_that_takes_nothing_costs_a_warning(data, made, monkeypatch, caplog, kept):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert len(build(data)) == 3 and "could not be kept" in caplog.text
    assert not [*kept.iterdir()], "no half of a file is left"


def test_nobody_else_may_read_them(data, kept):
    build(data)
    (file,) = kept.iterdir()
    assert file.stat().st_mode & 0o077 == 0 and kept.stat().st_mode & 0o077 == 0


def test_the_longest_unused_go_first(data, kept, monkeypatch):
    for seq_len in (30, 31, 32):
        build(data, seq_len=seq_len)
    oldest, _, newest = files = sorted(kept.iterdir(), key=lambda f: json.loads(f.open("rb").readline())["seq_len"])
    for age, file in zip((300, 200, 100), files, strict=True):
        os.utime(file, (file.stat().st_atime, file.stat().st_mtime - age))
    build(data, seq_len=30)  # used again
    monkeypatch.setattr(cache, "LIMIT", 3 * oldest.stat().st_size + 100)
    build(data, seq_len=33)
    left = {json.loads(f.open("rb").readline())["seq_len"] for f in kept.iterdir()}
    assert left == {30, 32, 33}
    monkeypatch.setattr(cache, "LIMIT", 10)
    build(data, seq_len=34)  # larger than all there may be
    assert len([*kept.iterdir()]) == 3 and newest.exists()


@pytest.mark.parametrize("name", [*tokenizer_folder.FILES, "config.json", "generation_config.json"])
def test_every_file_of_a_tokenizer_decides(tmp_path, name):
    before = tokenizer_folder._fingerprint(tmp_path, None)
    (tmp_path / name).write_text("a")
    after = tokenizer_folder._fingerprint(tmp_path, None)
    (tmp_path / name).write_text("b")
    assert len({before, after, tokenizer_folder._fingerprint(tmp_path, None)}) == 3


def test_the_chat_format_decides_and_the_day_where_it_is_written(tmp_path, monkeypatch):
    fingerprint = tokenizer_folder._fingerprint
    chosen = tmp_path / "mine.jinja"
    chosen.write_text("a")
    seen = {fingerprint(tmp_path, name) for name in (None, "llama2", "llama3", str(chosen))}
    chosen.write_text("b")
    seen.add(fingerprint(tmp_path, str(chosen)))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("c")
    seen.add(fingerprint(tmp_path, None))
    assert len(seen) == 6

    class Tomorrow:
        today = staticmethod(lambda: "2999-01-01")

    chosen.write_text("{{ strftime_now('%d %b %Y') }}")
    dated, undated = fingerprint(tmp_path, str(chosen)), fingerprint(tmp_path, None)
    monkeypatch.setattr(tokenizer_folder, "date", Tomorrow)
    assert fingerprint(tmp_path, None) == undated and fingerprint(tmp_path, str(chosen)) != dated


def test_a_chat_format_of_somebody_else_is_never_cached(tmp_path):
    def theirs(messages):
        return messages

    assert tokenizer_folder._is_ours(None) and tokenizer_folder._is_ours(llama3.chat)
    assert not tokenizer_folder._is_ours(theirs)
    texts = {tokenizer_folder._fingerprint(tmp_path, "mine", template) for template in (None, "A:", "B:")}
    assert len(texts) == 3


def test_data_sets_of_one_name_and_of_ones_own_are_not_mixed_up(tmp_path, made, kept):
    """Builders in two modules may have one name; what a user's own code makes is not kept, as it may change."""
    dialogue = "\n\nHuman: Q\n\nAssistant: "
    path = write_jsonl(tmp_path / "p.jsonl", [{"chosen": dialogue + "A", "rejected": dialogue + "B"}])
    how = {"tokenizer": tokenizer(), "seq_len": 60, "too_long": "drop", "split": "train"}
    for build_one in (named.hh_rlhf, named_pairs.hh_rlhf) * 2:
        samples = build_one(path, **how).samples()
        assert samples.are_pairs == (build_one is named_pairs.hh_rlhf)
    assert len(made) == 2 and len([*kept.iterdir()]) == 2

    @builder.builder
    def own(tokenizer, example):
        return lambda row: Encoded([1, 2, answer], [True] * 3)

    for answer in (3, 4):
        assert own(path, tokenizer=tokenizer(), seq_len=9).samples()[0].tokens == [1, 2, answer]
    assert len(made) == 4 and len([*kept.iterdir()]) == 2
