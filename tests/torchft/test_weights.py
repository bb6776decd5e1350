"""Checkpoint folders that are damaged, incomplete or hostile: one clear error each, and nothing runs."""

import json
import os
import pickle
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import checkpoint

from torchft import models
from torchft.errors import UserError
from torchft.files import read_json
from torchft.weights import INDEX, WeightFiles, write_shards


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    checkpoint(folder / "whole")
    checkpoint(folder / "sharded", max_shard_size="40KB")
    return folder


@pytest.fixture
def whole(source, tmp_path):
    return shutil.copytree(source / "whole", tmp_path / "whole")


@pytest.fixture
def sharded(source, tmp_path):
    return shutil.copytree(source / "sharded", tmp_path / "sharded")


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, sentinel):
        self.sentinel = str(sentinel)

    def __reduce__(self):
        return os.mkdir, (self.sentinel,)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
DAMAGE = {
    "K9_one_byte_short": (lambda data: data[:-1], "damaged or incomplete: download it again"),
    "K9_half": (lambda data: data[: len(data) // 2], "damaged or incomplete: download it again"),
    "K9_header_only": (lambda data: data[:64], "damaged or incomplete: download it again"),
    "K9_empty": (lambda data: b"", "damaged or incomplete: download it again"),
    "K9_too_long": (lambda data: data + b"\0", "damaged or incomplete: download it again"),
    "K10_garbage": (lambda data: data[:8] + bytes(range(128, 256)) + data[136:], "damaged or incomplete"),
    "K10_length": (lambda data: struct.pack("<Q", 2**40) + data[8:], "damaged or incomplete"),
    "K10_lfs": (lambda data: LFS, "a Git LFS pointer, not the file itself: run `git lfs pull` or `tune download`"),
    "K10_html": (lambda data: b"\n <!DOCTYPE html><html>403</html>", "an HTML page, probably a failed download"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_file(whole, damage, message):
    path = whole / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message) as error:
        models.load(whole)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", ["pickle", "torch.save", "torch.save legacy"])
def test_pickle_in_disguise_is_not_run(whole, tmp_path, kind):  # S5
    path = whole / "model.safetensors"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Bomb(tmp_path / "sentinel")))
    else:
        torch.save(Bomb(tmp_path / "sentinel"), path, _use_new_zipfile_serialization=kind == "torch.save")
    with pytest.raises(UserError, match="a pickle, which can run code when loaded: use the safetensors files") as error:
        models.load(whole)
    assert not (tmp_path / "sentinel").exists()
    assert str(path) in str(error.value)
    assert "weights_only" not in str(error.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_folder_of_pickles_only(whole, tmp_path, name):  # S5
    (whole / "model.safetensors").unlink()
    torch.save(Bomb(tmp_path / "sentinel"), whole / name)
    with pytest.raises(UserError, match=rf"no .safetensors file; \['{name}'\] are pickles.*tune download") as error:
        models.load(whole)
    assert not (tmp_path / "sentinel").exists()
    assert str(whole) in str(error.value)
    assert "weights_only" not in str(error.value)


def test_no_weights_no_folder(whole, tmp_path):
    (whole / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no \.safetensors file. `tune download"):
        models.load(whole)
    with pytest.raises(UserError, match="absent is not a folder"):
        models.load(tmp_path / "absent")
    with pytest.raises(UserError, match="absent is not a folder"):
        WeightFiles(tmp_path / "absent")


def test_weights_are_a_folder(whole):
    (whole / "model.safetensors").unlink()
    (whole / "model.safetensors").mkdir()
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        models.load(whole)


def test_missing_shards_are_all_named(sharded):  # K12
    lost = shards(sharded)[1:3]
    for path in lost:
        path.unlink()
    with pytest.raises(UserError, match="2 problems") as error:
        models.load(sharded)
    assert all(f"{path} is missing: the download is incomplete" in str(error.value) for path in lost)


def test_shards_without_index(sharded):  # K12
    (sharded / INDEX).unlink()
    models.load(sharded)  # whole, so the names of the files are enough
    shards(sharded)[1].unlink()
    with pytest.raises(
        UserError, match=r"lacks shards \[2\] of \d+, and model.safetensors.index.json: download it again"
    ):
        models.load(sharded)


def test_extra_file_beside_an_index_is_left_alone(sharded):  # K12
    save_file({"model.norm.weight": torch.zeros(64)}, sharded / "model-00009-of-00009.safetensors")
    model = models.load(sharded)
    assert not model.norm.weight.eq(0).any()


def test_shards_of_two_checkpoints(sharded):  # K12
    (sharded / INDEX).unlink()
    save_file({"model.norm.weight": torch.zeros(64)}, sharded / "other.safetensors")
    with pytest.raises(UserError, match=r"repeats 1 tensors of another file, such as \['model.norm.weight'\]"):
        models.load(sharded)


def edit_index(folder, change):
    index = read_json(folder / INDEX)
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def test_index_names_absent_tensors(sharded):  # K12
    edit_index(sharded, lambda index: index["weight_map"].update({"model.ghost.weight": shards(sharded)[0].name}))
    with pytest.raises(
        UserError, match=r"lists 1 tensors that no file holds, such as \['model.ghost.weight'\]"
    ) as error:
        models.load(sharded)
    assert str(sharded / INDEX) in str(error.value)


def test_shard_holds_more_than_the_index_says(sharded):  # K13
    path = shards(sharded)[0]
    save_file(load_file(path) | {"model.extra.weight": torch.ones(1)}, path)
    with pytest.raises(UserError, match=r"no place for: model\.extra\.weight"):
        models.load(sharded)


def test_index_decides_between_copies(sharded):
    first, last = shards(sharded)[0], shards(sharded)[-1]
    where = read_json(sharded / INDEX)["weight_map"]
    name = next(n for n in where if where[n] == first.name)
    save_file(load_file(last) | {name: torch.zeros_like(load_file(first)[name])}, last)
    assert torch.equal(WeightFiles(sharded).read(name), load_file(first)[name])


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", {"a": 1}])
def test_index_without_a_map(sharded, weight_map):
    edit_index(sharded, lambda index: index.update(weight_map=weight_map))
    with pytest.raises(UserError, match=r"index\.json: weight_map must map tensor names to file names"):
        models.load(sharded)


OUTSIDE = [
    "../secret/x.safetensors",
    "{secret}/x.safetensors",
    "C:\\x",
    "a\0b",
    "..\\secret\\x.safetensors",
    "link/x.safetensors",
]


@pytest.mark.parametrize("name", OUTSIDE, ids=ascii)
def test_weight_map_cannot_leave_the_folder(sharded, tmp_path, name):  # S6
    secret = tmp_path / "secret"
    secret.mkdir()
    shutil.copy(shards(sharded)[0], secret / "x.safetensors")
    (sharded / "link").symlink_to(secret)
    name = name.replace("{secret}", str(secret))
    edit_index(sharded, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(UserError, match="points outside that folder; refusing to open it") as error:
        models.load(sharded)
    assert str(sharded) in str(error.value)


def test_cache_of_links_loads(source, tmp_path):
    """huggingface_hub keeps files as links: snapshots/<commit>/model.safetensors -> ../../blobs/<hash>."""
    snapshot, blobs = tmp_path / "snapshots" / "0a1b", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted((source / "sharded").iterdir())):
        shutil.copy(file, blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    ours, plain = models.load(snapshot).state_dict(), models.load(source / "sharded").state_dict()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_rows_are_read_alone(whole):
    held = WeightFiles(whole)
    name = "model.embed_tokens.weight"
    full = load_file(whole / "model.safetensors")[name]
    assert name in held and held.shape(name) == (101, 64) and held.dtype(name) == "F32"
    assert torch.equal(held.read(name), full)
    assert torch.equal(held.read(name, slice(3, 7)), full[3:7])


@pytest.mark.parametrize(("limit", "files"), [(16, 1), (12, 2), (8, 2), (4, 4), (1, 4)])
def test_shards_hold_what_fits(tmp_path, limit, files):
    tensors = {name: torch.full((1,), i, dtype=torch.float32) for i, name in enumerate("abcd")}
    asked = []
    write_shards(tmp_path, dict.fromkeys(tensors, 4), lambda n: asked.append(n) or tensors[n], shard_bytes=limit)
    assert len(shards(tmp_path)) == files
    assert asked == list("abcd")
    held = WeightFiles(tmp_path)
    assert {n: held.read(n).item() for n in held.names()} == {"a": 0, "b": 1, "c": 2, "d": 3}
