"""YAML 1.2 scalars, places, and every way a file can fail to be a config."""

import math

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from torchft.config_yaml import parse, read, scalar, write
from torchft.errors import UserError


@pytest.mark.parametrize(
    ("text", "value"),
    [("", None), ("null", None), ("~", None), ("true", True), ("False", False), ("0", 0), ("-12", -12), ("1e-5", 1e-5),
     ("1.", 1.0), (".5", 0.5), ("-1.5E+3", -1500.0), (".inf", math.inf), ("-.INF", -math.inf)],
)  # fmt: skip
def test_scalars(text, value):
    assert scalar(text) == value
    assert type(scalar(text)) is type(value)


@pytest.mark.parametrize(
    "text", ["no", "yes", "on", "off", "010", "0x1F", "1_000", "12:30:00", "2024-01-01", "1e", "e5", ".", "inf"]
)
def test_c6_what_yaml_1_1_would_change_stays_text(text):
    assert scalar(text) == text


def test_tree_and_places(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("a: 1\nb:\n  - c: 'x'\n    on: no\n\n  - |\n    text\nd: {e: [~, \"2\"]}\n")
    document = read(file)
    assert document.tree == {"a": 1, "b": [{"c": "x", "on": "no"}, "text\n"], "d": {"e": [None, "2"]}}
    assert document.places["b.0.on"] == f"{file}:4"
    assert document.places["d.e.1"] == f"{file}:8"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "c.yaml: the file is empty"),
        (b"# nothing\n", "c.yaml: the file is empty"),
        (b"- a\n", "c.yaml:1: expected 'key: value' lines"),
        (b"just text", "c.yaml:1: expected 'key: value' lines"),
        (b"a: 1\n\tb: 2\n", "c.yaml:2:1: not valid YAML: found character '\\t' that cannot start any token; inden"),
        (b"a: [1, 2\nb: 3\n", "c.yaml:2:2: not valid YAML"),
        (b"a: 'x\n", "c.yaml:2:1: not valid YAML"),
        (b"a: 1\nb: caf\xe9\n", "c.yaml:2:7: byte 0xe9 is not UTF-8"),
        ("a: 1".encode("utf-16"), "c.yaml:1:1: byte 0xff is not UTF-8"),
        (b"a: 1\nbb: \x00\n", "c.yaml:2:5: the character '\\x00' is not allowed"),
        (b"a: 1\nb: 2\na: 3\n", "c.yaml:3: a is given twice (also at "),  # C7
        (b"a: {b: 1,\n b: 2}\n", "c.yaml:2: a.b is given twice"),
        (b"1: x\n", "c.yaml:1: keys must be text, found '1'; quote it"),
        (b"a:\n  true: x\n", "c.yaml:2: keys must be text, found 'true'; quote it"),
        (b"[a, b]: x\n", "c.yaml:1: keys must be text, found a list or a mapping; quote it"),
        (b"a: &x [1]\nb: *x\n", "c.yaml:2:4: YAML aliases (*x) are not supported; write ${key} instead"),
        (b"a: !!python/object/apply:os.system [id]\n", "the YAML tag 'tag:yaml.org,2002:python/object/apply:os.sys"),
        (b"a: !!int '3'\n", "the YAML tag"),
        (b"a: " + b"[" * 100000, "nested too deeply"),
        (b"a: " + b"x" * (1 << 20), "is larger than 1024 KiB; that is not a config"),
        (b"a: 1\n---\nb: 2\n", "c.yaml:2:1: not valid YAML: but found another document"),
    ],
)  # fmt: skip
def test_c7_c8_bad_files(tmp_path, data, message):
    file = tmp_path / "c.yaml"
    file.write_bytes(data)
    with pytest.raises(UserError) as e:
        read(file)
    assert message in str(e.value)
    assert str(file) in str(e.value)


def test_c8_a_byte_order_mark_and_windows_lines_are_fine(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_bytes("\ufeffa: 1\r\nb: é\r\n".encode())
    assert read(file).tree == {"a": 1, "b": "é"}


def test_a_missing_file_or_a_folder(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UserError, match=r"cannot be read: (No such file|Is a directory)"):
            read(path)


def test_parse_one_value():
    assert parse("[a, 1, {b: no}]", "value") == ["a", 1, {"b": "no"}]
    with pytest.raises(UserError, match="value:1:6: not valid YAML"):
        parse("[a, b", "value")


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
trees = st.recursive(
    scalars, lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=4), t, max_size=3)
)


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=6), trees, min_size=1, max_size=4))
def test_write_reads_back_equal(tmp_path_factory, tree):
    file = tmp_path_factory.mktemp("round") / "c.yaml"
    file.write_text(write(tree), encoding="utf-8", newline="")
    assert read(file).tree == tree
    assert list(yaml.safe_load(write({"a": "no", "b": "010"})).values()) == ["no", "010"]  # other readers agree
