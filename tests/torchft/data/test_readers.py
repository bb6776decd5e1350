"""Files of every kind give the same rows; broken ones name file and place (faults D1, D2, D3, D24)."""

import json
import subprocess
import sys
import textwrap

import pytest

from torchft.data import readers
from torchft.errors import UserError

ROWS = [{"text": "plain"}, {"text": 'comma, "quote"\nline break'}, {"text": "żółć 🦊 \u2028"}]


def refused(reader, path):
    with pytest.raises(UserError) as e:
        list(reader(path))
    return str(e.value)


def write(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_jsonl(tmp_path):
    lines = "\n".join(json.dumps(row) for row in ROWS)
    assert list(readers.jsonl(write(tmp_path, "a.jsonl", lines))) == list(enumerate(ROWS, 1))
    with_blank = "\ufeff" + "\n\n \n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n"
    assert list(readers.jsonl(write(tmp_path, "b.jsonl", with_blank))) == [(1, ROWS[0]), (4, ROWS[1]), (7, ROWS[2])]


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array_equals_json_loads(tmp_path, indent):
    rows = [*ROWS, {"nested": [{"a": [1, 2.5, None]}], "brackets": "]},["}]
    path = write(tmp_path, "a.json", json.dumps(rows, indent=indent, ensure_ascii=False))
    found = list(readers.json_array(path))
    assert [row for _, row in found] == rows
    text = path.read_text()
    assert [line for line, _ in found] == ([1] * 4 if indent is None else [
        number for number, line in enumerate(text.split("\n"), 1) if line.startswith("  {")
    ])  # fmt: skip


def test_json_file_of_lines_and_empty_array(tmp_path):
    lines = write(tmp_path, "a.json", "\n".join(json.dumps(row) for row in ROWS))
    assert [row for _, row in readers.json_array(lines)] == ROWS
    assert list(readers.json_array(write(tmp_path, "b.json", " [ ] \n"))) == []


def test_csv_and_parquet(tmp_path):
    import csv

    import pyarrow
    import pyarrow.parquet

    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, ["text"])
        writer.writeheader()
        writer.writerows(ROWS)
    assert [row for _, row in readers.csv_table(tmp_path / "a.csv")] == ROWS
    assert [line for line, _ in readers.csv_table(tmp_path / "a.csv")] == [2, 4, 5]
    messages = [{"messages": [{"role": "user", "content": str(i)}], "n": i} for i in range(600)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(messages), tmp_path / "a.parquet")
    assert list(readers.parquet(tmp_path / "a.parquet")) == list(enumerate(messages, 1))


def test_csv_field_longer_than_the_modules_limit(tmp_path):
    path = write(tmp_path, "a.csv", "text\n" + "x" * 200_000 + "\n")
    assert [len(row["text"]) for _, row in readers.csv_table(path)] == [200_000]


def test_d2_truncated_json_line(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "one"}\n{"text": "tw')
    assert f"{path}:2:10: not valid JSON: Unterminated string" in refused(readers.jsonl, path)
    assert '{"text": "tw' in refused(readers.jsonl, path)


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ('[{"a": 1},\n {"a": 2', 2, "not valid JSON"),
        ('[{"a": 1},\n {"a": 2}\n', 3, "found the end of the file"),
        ('[{"a": 1}\n {"a": 2}]', 2, "expected ',' or ']'"),
        ('[{"a": 1}]\n[{"a": 2}]', 1, "more text after the array"),
        ('[{"a": 1},\n 7]', 2, "a row must be a JSON object"),
        ("[" * 100_000, 1, "nested too deeply"),
    ],
)
def test_d2_broken_json_array(tmp_path, text, line, why):
    path = write(tmp_path, "a.json", text)
    message = refused(readers.json_array, path)
    assert f"{path}:{line}: " in message
    assert why in message


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("a,b\n1,2\n1\n", 3, "1 fields, but the header has 2 (a, b)"),
        ("a,b\n1,2,3\n", 2, "3 fields"),
        ('a,b\n1,"open\n', 2, "not valid CSV"),
        ("a,a\n1,2\n", 1, "names a column twice"),
    ],
)
def test_d2_broken_csv(tmp_path, text, line, why):
    path = write(tmp_path, "a.csv", text)
    message = refused(readers.csv_table, path)
    assert f"{path}:{line}: " in message
    assert why in message


def test_d2_broken_parquet(tmp_path):
    path = write(tmp_path, "a.parquet", "version https://git-lfs.github.com/spec/v1\n")
    assert "Git LFS pointer" in refused(readers.parquet, path)


def test_d2_html_instead_of_rows(tmp_path):
    path = write(tmp_path, "a.jsonl", "<!DOCTYPE html><html>\n")
    assert "an HTML page" in refused(readers.jsonl, path)


def test_d3_latin_1_names_the_byte(tmp_path):
    first = '{"text": "ż"}\n'.encode()
    path = write(tmp_path, "a.jsonl", first + '{"text": "é"}\n'.encode("latin-1"))
    for reader in (readers.jsonl, readers.csv_table, readers.txt):
        assert f"{path}: byte {len(first) + 10} is not UTF-8" in refused(reader, path)


def test_d3_nul_bytes(tmp_path):
    path = write(tmp_path, "a.jsonl", b'{"text": "a"}\n{"text": "\xc5\xbc\x00"}\n')
    assert f"{path}:2: byte 26 is NUL" in refused(readers.jsonl, path)
    path = write(tmp_path, "a.txt", b"\xc5\xbcab\x00")
    assert f"{path}: byte 4 is NUL" in refused(readers.txt, path)


def test_d3_lone_surrogate(tmp_path):
    whole, half = '{"text": "\\ud83e\\udd8a"}\n', '{"text": ["\\ud83e"]}\n'
    path = write(tmp_path, "a.jsonl", whole + half)
    assert f"{path}:2: '\\ud83e' is half of a surrogate pair" in refused(readers.jsonl, path)
    path = write(tmp_path, "a.json", f"[{whole},{half}]")
    assert f"{path}:2: '\\ud83e' is half" in refused(readers.json_array, path)


def test_d24_huge_line_is_refused_in_bounded_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as f:
        f.write(b'{"text": "a"}\n{"text": "')
        f.truncate(400 << 20)  # sparse: 400 MiB of NUL in one line
    program = f"""
        import resource
        from pathlib import Path
        from torchft.data.readers import jsonl
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            list(jsonl(Path({str(path)!r})))
        except ValueError as e:
            print(e)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    message, mebibytes = done.stdout.splitlines()
    assert message.startswith(f"{path}:2: the line is longer than 64 MiB")
    assert int(mebibytes) < 200


def test_d24_many_messages(tmp_path):
    row = {"messages": [{"role": "user", "content": "x"}] * 100_000}
    path = write(tmp_path, "a.jsonl", json.dumps(row))
    assert [len(values["messages"]) for _, values in readers.jsonl(path)] == [100_000]


def test_file_that_is_read_whole_has_a_limit(tmp_path):
    path = tmp_path / "a.json"
    with open(path, "wb") as f:
        f.write(b"[")
        f.truncate(2 << 30)
    assert "convert it to .jsonl" in refused(readers.json_array, path)
