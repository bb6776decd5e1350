"""Names and JSON from elsewhere, and writes that are whole or absent."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from torchft import files
from torchft.errors import UserError
from torchft.files import (
    atomic_write,
    clear_leftovers,
    new_folder,
    read_json,
    remove_folder,
    safe_join,
    sha256,
    what_is,
)

OUTSIDE = [
    "", ".", "..", "../x", "a/../../x", "a/..", "/etc/passwd", "//host/x",
    "C:\\x", "C:x", "C:/x", "..\\x", "a\\b", "a\0b", "link/x", "link/deep/x",
]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
def test_safe_join_refuses(tmp_path, name):  # S6
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="points outside that folder; refusing"):
        safe_join(root, name)


@pytest.mark.parametrize("name", ["x", "a/x", "./x", "..x", "x..y", "inner/x"])
def test_safe_join_allows(tmp_path, name):
    (tmp_path / "a").mkdir()
    (tmp_path / "inner").symlink_to(tmp_path / "a")
    assert safe_join(tmp_path, name) == tmp_path / name


def test_safe_join_below_a_linked_root(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    assert safe_join(tmp_path / "root", "x") == tmp_path / "root" / "x"


BAD_JSON = {
    "cut": (b'{"a": 1,\n "b', r":2:2: not valid JSON"),
    "empty": (b"", ":1:1: not valid JSON"),
    "bom": (b'\xef\xbb\xbf{"a": 1}', ":1:1: not valid JSON"),
    "latin1": ('{"a": "é"}'.encode("latin-1"), "not UTF-8 at byte 7"),
    "list": (b"[1]", "expected a JSON object, found list"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
    "html": (b"<!DOCTYPE html><html>404", "HTML page.*download it again"),
    "pickle": (b"\x80\x04K\x01.", "pickle, which can run code"),
    "deep": (b'{"a":' * 200_000, "not usable JSON"),
    "huge_number": (b'{"a": ' + b"1" * 10_000 + b"}", "not usable JSON"),
}


@pytest.mark.parametrize(("data", "message"), BAD_JSON.values(), ids=BAD_JSON)
def test_read_json_names_file_and_place(tmp_path, data, message):  # K10
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        read_json(path)
    assert str(error.value).startswith(str(path))


def test_read_json_missing_folder_and_too_large(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        read_json(tmp_path / "config.json")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_json(tmp_path)
    (tmp_path / "big.json").write_text(json.dumps({"a": "x" * 3_000_000}))
    monkeypatch.setattr(files, "JSON_LIMIT", 1 << 20)
    with pytest.raises(UserError, match="2 MiB is too large"):
        read_json(tmp_path / "big.json")


def test_read_json(tmp_path):
    (tmp_path / "x.json").write_text('{"é": [1, null]}', encoding="utf-8")
    assert read_json(tmp_path / "x.json") == {"é": [1, None]}


def test_atomic_write_replaces_whole(tmp_path):
    path = tmp_path / "x"
    for data in ("é" * 1000, b"\0\1"):
        atomic_write(path, data)
        assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert os.listdir(tmp_path) == ["x"]


def test_atomic_write_keeps_the_old_file_when_the_disk_is_full(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_text("old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x"]


def tree(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_new_folder_appears_whole_and_replaces(tmp_path):
    folder = tmp_path / "deep" / "export"
    for text in ("one", "two"):
        with new_folder(folder) as new:
            (new / "sub").mkdir()
            (new / "sub" / text).write_text(text)
            assert not folder.exists() or tree(folder) == {"sub/one": "one"}
    assert tree(folder) == {"sub/two": "two"}
    assert os.listdir(folder.parent) == ["export"]


def test_new_folder_keeps_the_old_one_on_an_error(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "x").write_text("old")

    def half():
        with new_folder(tmp_path / "export") as new:
            (new / "x").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert tree(tmp_path) == {"export/x": "old"}


KILLED = """
import os, sys
from pathlib import Path
from torchft import files
moves = []
def replace(source, target, move=os.replace):
    moves.append(target)
    if len(moves) > int(sys.argv[2]):
        os._exit(9)
    move(source, target)
os.replace = replace
with files.new_folder(Path(sys.argv[1])) as new:
    (new / "x").write_text("new")
    if sys.argv[2] == "-1":
        os._exit(9)
"""


@pytest.mark.parametrize("moves", [-1, 0, 1])  # killed while writing, before the first rename, between the two
def test_new_folder_killed_loses_nothing(tmp_path, moves):  # K1, K2
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "x").write_text("old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(moves)], timeout=60)
    assert done.returncode == 9
    assert "old" in tree(tmp_path).values()
    assert folder.exists() == (moves < 1)
    assert not folder.exists() or tree(folder) == {"x": "old"}
    clear_leftovers(folder)
    assert tree(tmp_path) == {"export/x": "old"}
    assert os.listdir(tmp_path) == ["export"]


def test_new_folder_clears_what_a_killed_one_left(tmp_path):
    for name in (".export.partial", ".export.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("old")
    with new_folder(tmp_path / "export") as new:
        assert tree(tmp_path) == {"export/x": "old"} and os.listdir(new) == []
        (new / "y").write_text("new")
    assert tree(tmp_path) == {"export/y": "new"}
    assert os.listdir(tmp_path) == ["export"]


def test_new_folder_behind_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "export").symlink_to("disk")
    for text in ("one", "two"):
        with new_folder(tmp_path / "export") as new:
            (new / text).write_text(text)
    assert tree(tmp_path / "disk") == {"two": "two"}
    assert sorted(os.listdir(tmp_path)) == ["disk", "export"]


def test_remove_folder_killed_leaves_no_half(tmp_path, monkeypatch):
    (tmp_path / "step").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if killed there
    remove_folder(tmp_path / "step")
    assert os.listdir(tmp_path) == [".step.partial"]
    monkeypatch.undo()
    clear_leftovers(tmp_path / "step")
    assert os.listdir(tmp_path) == []


def test_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_what_is_says_nothing_of_good_files():
    assert what_is(b'{"architectures": []}') == what_is((8).to_bytes(8, "little") + b'{"a":{}}') == ""


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    files.keep_in_cache(tmp_path / "new" / "a.json", "{}")
    assert (tmp_path / "new" / "a.json").read_text() == "{}"
    files.keep_in_cache(tmp_path / "new" / "a.json" / "b.json", "{}")  # its folder is a file
    assert "not kept for later runs" in caplog.text
