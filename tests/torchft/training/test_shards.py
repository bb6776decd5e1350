"""Folders of tensors: exact for every dtype, put together from slices of any files."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchft.errors import UserError
from torchft.training import shards
from torchft.training.shards import TensorFolder, num_bytes
from torchft.training.tree import flatten


def write(folder, tree, **options):
    structure, tensors = flatten(tree)
    folder.mkdir()
    pieces = shards.pieces(tensors)
    shards.write_index(folder, structure, pieces, [shards.write(folder, pieces, **options)])
    return TensorFolder(folder)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn]
)
def test_bits_are_kept(tmp_path, dtype):
    t = torch.randn(5, 3).to(dtype)
    back = write(tmp_path / "x", {"t": t, "scalar": t[0, 0], "empty": t[:0], "strided": t.T[1:]}).tree()
    for name, want in {"t": t, "scalar": t[0, 0], "empty": t[:0], "strided": t.T[1:]}.items():
        have = back[name]
        assert have.dtype == dtype and have.shape == want.shape
        assert torch.equal(have.reshape(-1).view(torch.uint8), want.reshape(-1).view(torch.uint8))


def test_tensors_that_share_memory(tmp_path):
    t = torch.arange(6.0)
    back = write(tmp_path / "x", {"a": t, "b": t[2:], "c": t}).tree()
    assert torch.equal(back["a"], t) and torch.equal(back["b"], t[2:]) and torch.equal(back["c"], t)


def test_large_folders_are_cut_into_files(tmp_path):
    tree = {name: torch.full((100,), i) for i, name in enumerate("abcde")}  # 800 bytes each
    folder = write(tmp_path / "x", tree, file_bytes=1700)
    assert [f.name for f in sorted((tmp_path / "x").glob("*.safetensors"))] == [
        f"rank_00000_00{i}.safetensors" for i in range(3)
    ]
    assert all(torch.equal(folder.read(name), t) for name, t in tree.items())
    assert num_bytes(tree) == 4000


@pytest.fixture
def quarters(tmp_path):
    """A tensor [5, 7] as four ranks of a 2 x 2 mesh write it: the tensor, its folder, and a function that edits it."""
    t = torch.arange(35.0).view(5, 7)
    folder = tmp_path / "x"
    write(folder, {"t": t})
    index = json.loads((folder / "index.json").read_text())
    slices = index["tensors"]["t"]["slices"] = []
    for rank, (rows, columns) in enumerate([((0, 3), (0, 4)), ((0, 3), (4, 7)), ((3, 5), (0, 4)), ((3, 5), (4, 7))]):
        part = t[slice(*rows), slice(*columns)].contiguous()
        save_file({"t": part}, folder / f"rank_{rank:05d}_000.safetensors")
        where = {"file": f"rank_{rank:05d}_000.safetensors", "offset": [rows[0], columns[0]], "shape": list(part.shape)}
        slices.append(where)
    (folder / "index.json").write_text(json.dumps(index))
    return t, folder, index


def test_slices_of_several_ranks_make_one_tensor(quarters):
    t, folder, index = quarters
    assert torch.equal(TensorFolder(folder).read("t"), t)
    index["tensors"]["t"]["slices"].pop()
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="slices of t don't make up"):
        TensorFolder(folder).read("t")
    assert torch.equal(TensorFolder(folder).read("t", (slice(1, 5), slice(0, 4))), t[1:, :4])
    with pytest.raises(UserError, match="slices of t don't make up"):
        TensorFolder(folder).read("t", (slice(2, 4), slice(3, 5)))


def test_any_region_of_any_slices(quarters):
    t, folder, _ = quarters
    saved = TensorFolder(folder)
    bounds = [[(i, j) for i in range(n + 1) for j in range(i, n + 1)] for n in t.shape]
    for rows, columns in itertools.product(*bounds):
        region = slice(*rows), slice(*columns)
        assert torch.equal(saved.read("t", region), t[region]), region


def test_a_region_opens_only_the_files_that_it_touches(quarters):
    t, folder, _ = quarters
    (folder / "rank_00003_000.safetensors").unlink()
    region = slice(0, 3), slice(3, 7)
    assert torch.equal(TensorFolder(folder).read("t", region), t[region])
    with pytest.raises(UserError, match="rank_00003"):
        TensorFolder(folder).read("t")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_regions_keep_their_bits(tmp_path, dtype):
    t = torch.randn(6, 4).to(dtype)
    found = write(tmp_path / "x", {"t": t}).read("t", (slice(1, 4), slice(2, 3)))
    assert found.dtype == dtype and found.is_contiguous()
    assert torch.equal(found.view(torch.uint8), t[1:4, 2:3].contiguous().view(torch.uint8))


def test_s6_index_cannot_point_outside(tmp_path):
    write(tmp_path / "x", {"t": torch.ones(2)})
    save_file({"t": torch.zeros(2)}, tmp_path / "secret.safetensors")
    index = json.loads((tmp_path / "x" / "index.json").read_text())
    index["tensors"]["t"]["slices"][0]["file"] = "../secret.safetensors"
    (tmp_path / "x" / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside"):
        TensorFolder(tmp_path / "x").read("t")


def test_files_are_plain_safetensors(tmp_path):
    write(tmp_path / "x", {"t": torch.ones(2)})
    assert torch.equal(load_file(tmp_path / "x" / "rank_00000_000.safetensors")["t"], torch.ones(2))
