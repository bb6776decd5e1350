"""What each rank writes into a step folder, and what the main one adds: the indexes and ``manifest.json``."""

import json
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torchft.errors import UserError
from torchft.files import sha256, sync
from torchft.ranks import is_first_copy, rank
from torchft.training import fault, shards
from torchft.training.environment import TORCHFT
from torchft.training.shards import Piece, Slices
from torchft.training.tree import flatten

FORMAT = 2
MANIFEST = "manifest.json"

Parts = Mapping[str, tuple[Any, dict[str, Piece]]]  # folder name -> its tree as JSON, and what this rank writes of it
Files = dict[str, dict[str, Any]]  # path in the step folder -> {"size", "sha256"}
Written = tuple[dict[str, Slices], Files]  # by one rank: where its slices lie, by part; and its files


def collect(parts: Mapping[str, Any], *, own: Collection[str]) -> tuple[Parts, int]:
    """What is this rank's to write of the trees, of the same memory; and the bytes of all ranks' tensors together."""
    collected, num_bytes = {}, 0
    for part, tree in parts.items():
        structure, tensors = flatten(tree)
        num_bytes += shards.num_bytes(tensors)
        ours = {name: t for name, t in tensors.items() if part in own or is_first_copy(t)}  # the main rank's: all
        collected[part] = structure, shards.pieces(ours)
    return collected, num_bytes


def write_parts(folder: Path, step: int, parts: Parts, *, own: Collection[str]) -> Written:
    """Writes, and syncs, what is this rank's to write. ``own``: parts of which each rank writes a tree of its own."""
    if not folder.is_dir():
        raise UserError(
            f"step {step} could not be saved: rank {rank()} on {socket.gethostname()} cannot see {folder}, which the "
            "main rank has made: choose an output_dir on a file system that all nodes share"
        )
    slices: dict[str, Slices] = {}
    paths: list[Path] = []
    for part, (structure, tensors) in parts.items():
        if part in own:
            into = folder / part / own_folder(rank())
            into.mkdir()
            written = shards.write(into, tensors)
            shards.write_index(into, structure, tensors, [written])
            paths.append(into / shards.INDEX)
        else:
            into = folder / part
            written = slices[part] = shards.write(into, tensors)
        paths += sorted({into / where["file"] for where in written.values()})
        fault.point("after_shard_write", step=step, rank=rank())
    return slices, _synced(folder, paths)


def write_manifest(folder: Path, about: Mapping[str, Any], shared: Parts, by_rank: Sequence[Written]) -> None:
    """For the main rank, once all have written: the indexes of the ``shared`` parts, and the manifest of all files."""
    for part, (structure, tensors) in shared.items():
        shards.write_index(folder / part, structure, tensors, [slices[part] for slices, _ in by_rank])
    files = _synced(folder, (folder / part / shards.INDEX for part in shared))
    for _, theirs in by_rank:
        files |= theirs
    versions = {"torchft": TORCHFT, "torch": torch.__version__}
    manifest = {"format": FORMAT, **about, **versions, "files": dict(sorted(files.items()))}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def own_folder(number: int) -> str:
    """Of rank ``number``, in the folder of a part that is another on each rank."""
    return f"rank_{number:05d}"


def _synced(folder: Path, paths: Iterable[Path]) -> Files:
    """Size and sha256 of files that this rank has written, and that are on the disk when this returns."""
    files = {}
    for path in paths:
        files[str(path.relative_to(folder))] = {"size": path.stat().st_size, "sha256": sha256(path)}
        sync(path)  # by the machine that wrote it: another's sync would not send its bytes
    return files
