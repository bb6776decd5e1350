"""Where a stream reads: slices and caps over several files, places inside them, the Hub, and changes of files."""

import time

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from letters import write_jsonl

from torchft.data.extents import extents, fingerprint, rows_of
from torchft.data.readers import count
from torchft.data.sources import Source, rows
from torchft.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for name, numbers in (("a", range(5)), ("b", range(5, 12)), ("c", range(12, 15))):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"n": n} for n in numbers])
    return tmp_path


def read(source):
    return [row.values["n"] for extent in extents(source) for row in rows_of(source, extent, skip=0)]


@pytest.mark.parametrize("split", ["train", "train[3:9]", "train[:50%]", "train[-4:]", "train[5:12]", "train[14:]"])
@pytest.mark.parametrize("max_rows", [None, 1, 4, 99])
def test_extents_are_the_rows_of_the_source(folder, split, max_rows):
    source = Source(path=str(folder), split=split, max_rows=max_rows)
    assert read(source) == [row.values["n"] for row in rows(source)]
    for extent in extents(source):
        everything = list(rows_of(source, extent, skip=0))
        for skip in range(len(everything) + 1):
            assert list(rows_of(source, extent, skip=skip)) == everything[skip:]


def test_places_in_a_file_of_each_kind(tmp_path):
    (tmp_path / "a.csv").write_text("n\n" + "".join(f"{n}\n" for n in range(9)))
    (tmp_path / "b.jsonl").write_text("\n" + "".join(f'{{"n": {n}}}\n\n' for n in range(9)))
    (tmp_path / "c.json").write_text("[" + ", ".join(f'{{"n": {n}}}' for n in range(9)) + "]")
    pa.parquet.write_table(pa.table({"n": range(9)}), tmp_path / "d.parquet", row_group_size=4)
    for file in sorted(tmp_path.iterdir()):
        source = Source(path=str(file))
        (extent,) = extents(source)
        assert count(file) == 9
        for skip in range(10):
            found = list(rows_of(source, extent, skip=skip))
            assert [int(row.values["n"]) for row in found] == list(range(skip, 9)), file
            assert found == list(rows(source))[skip:]


def test_a_hub_name_is_streamed(monkeypatch):
    asked = []

    def load_dataset(path, **how):
        asked.append((path, how))
        return datasets.IterableDataset.from_generator(lambda: ({"n": n} for n in range(9)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(path="org/name", subset="data/rl", max_rows=7)
    (extent,) = extents(source)
    found = list(rows_of(source, extent, skip=2))
    assert [row.values["n"] for row in found] == [2, 3, 4, 5, 6]
    assert (found[0].origin, found[0].number) == ("org/name[train]", 3)
    how = {"data_dir": "data/rl", "split": "train", "revision": None, "streaming": True}
    assert asked == [("org/name", how)]


def test_the_fingerprint_changes_with_either_end_of_a_file(tmp_path):
    path = tmp_path / "a.jsonl"
    source, found = Source(path=str(path)), []
    for content in ("x" * 300_000, "y" + "x" * 299_999, "x" * 299_999 + "y", "x" * 300_001):
        path.write_text(content)
        found.append(str(fingerprint(source)))
    assert len(set(found)) == 4
    assert fingerprint(source) == fingerprint(source) != fingerprint(Source(path=str(path), split="train[:3]"))


@pytest.mark.parametrize("failures", [3, 4, 5])
def test_d20_a_hub_that_fails_is_asked_again_from_the_next_row(monkeypatch, failures, caplog):
    waits, left = [], [failures]

    def numbers():
        for n in range(9):
            if n == 4 and left[0]:
                left[0] -= 1
                raise ConnectionError("429 Too Many Requests")
            yield {"n": n}

    def load_dataset(path, **how):
        return datasets.IterableDataset.from_generator(numbers)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(time, "sleep", waits.append)
    source = Source(path="org/name")
    (extent,) = extents(source)
    stream = rows_of(source, extent, skip=1)
    if failures == 5:
        with pytest.raises(UserError, match=r"org/name: no row after row 4 came from the Hub in 5 tries: 429"):
            list(stream)
    else:
        assert [row.values["n"] for row in stream] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert waits == [1, 5, 30, 120][:failures] and "429 Too Many Requests; again in 1 s" in caplog.text
