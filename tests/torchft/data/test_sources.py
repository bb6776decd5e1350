"""Which files and rows a source means, local splits like the Hub's, and faults D1, D20 (offline), D24's caps."""

import subprocess
import sys

import pytest
from letters import write_jsonl

from torchft.data.sources import Source, rows
from torchft.errors import UserError


def numbers(path, **options):
    return [row.values["n"] for row in rows(Source(path=path, **options))]


def refused(path, **options):
    with pytest.raises(UserError) as e:
        list(rows(Source(path=path, **options)))
    return str(e.value)


def table(tmp_path, name, values):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    return write_jsonl(tmp_path / name, [{"n": n} for n in values])


def test_file_glob_list_and_folder(tmp_path):
    a, b = table(tmp_path, "b/1.jsonl", [1, 2]), table(tmp_path, "b/2.jsonl", [3])
    table(tmp_path, "b/.cache/9.jsonl", [9])
    assert numbers(a) == [1, 2]
    assert numbers(str(tmp_path / "b/*.jsonl")) == numbers(str(tmp_path / "b")) == [1, 2, 3]
    assert numbers([b, a]) == [3, 1, 2]
    assert numbers(a, max_rows=1) == [1]
    assert [(row.origin, row.number) for row in rows(Source(path=[b, a]))] == [(b, 1), (a, 1), (a, 2)]


def test_folder_splits_by_name(tmp_path):
    table(tmp_path, "data/train-00000.jsonl", [1])
    table(tmp_path, "data/test-00000.jsonl", [2])
    table(tmp_path, "data/dev/more.jsonl", [3])
    folder = str(tmp_path / "data")
    assert [numbers(folder, split=split) for split in ("train", "test", "validation")] == [[1], [2], [3]]
    assert "no split 'other' in this folder; its files hold the splits ['test', 'train', 'validation']" in refused(
        folder, split="other"
    )


def test_slices_are_those_of_the_datasets_package(tmp_path):
    import datasets

    path = table(tmp_path, "a.jsonl", range(37))
    slices = ["", "[:95%]", "[95%:]", "[:-5]", "[-5:]", "[10:20]", "[30%:-10%]", "[:100]", "[5:2]", "[50%:]", "[:3%]"]
    for part in slices:
        theirs = datasets.load_dataset("json", data_files=path, split=f"train{part}", cache_dir=str(tmp_path / "cache"))
        if len(theirs):
            assert numbers(path, split=f"train{part}") == theirs["n"][:], part
        else:
            assert "0 rows" in refused(path, split=f"train{part}")


@pytest.mark.parametrize("split", ["train[", "train[5]", "train[a:b]", "train[%:]", "train[-:]", ""])
def test_bad_split(tmp_path, split):
    assert "is not a name and a slice" in refused(table(tmp_path, "a.jsonl", [1]), split=split)


def test_file_has_no_other_split(tmp_path):
    path = table(tmp_path, "val.jsonl", [1])
    assert numbers(path) == numbers(path, split="validation") == [1]
    assert "a file has no split 'test'" in refused(path, split="test")


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_d1_empty_file(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    assert f"{path}: split 'train' has 0 rows" in refused(str(path))
    for suffix, text in ((".json", "[]"), (".csv", "a,b\n"), (".txt", "")):
        other = path.with_suffix(suffix)
        other.write_text(text)
        assert "has 0 rows" in refused(str(other))


def test_missing_and_unknown_files(tmp_path):
    table(tmp_path, "train.jsonl", [1])
    assert "does not exist (did you mean 'train.jsonl'?)" in refused(str(tmp_path / "trian.jsonl"))
    (tmp_path / "a.xlsx").write_text("x")
    assert "data files end in .jsonl, .json, .csv, .parquet, .txt" in refused(str(tmp_path / "a.xlsx"))
    (tmp_path / "a.json").write_text("[]")
    assert "holds .json, .jsonl files; name one kind by a glob" in refused(str(tmp_path))
    (tmp_path / "none").mkdir()
    assert "holds no .jsonl" in refused(str(tmp_path / "none"))
    assert "max_rows: 0 must be at least 1" in refused(str(tmp_path / "train.jsonl"), max_rows=0)
    assert "the list is empty" in refused([])


def test_hub_name_offline_is_a_user_error(tmp_path):
    program = (
        "from torchft.data.sources import Source, rows\n"
        "try: list(rows(Source(path='some-org/some-data', subset='s', revision='r')))\n"
        "except ValueError as e: print(type(e).__name__, e)"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.startswith("UserError some-org/some-data is nothing local"), done.stderr
    assert "revision r" in done.stdout


def test_local_jsonl_does_not_import_datasets(tmp_path):
    program = (
        "import sys\nfrom torchft.data.sources import Source, rows\n"
        f"list(rows(Source(path={table(tmp_path, 'a.jsonl', [1])!r})))\n"
        "assert not {'datasets', 'pyarrow', 'pandas'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
