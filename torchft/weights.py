"""Folders of safetensors files: opened with care (they come from elsewhere), read slice by slice, written in shards."""

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchft.errors import UserError
from torchft.files import read_json, safe_join, what_is

log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000  # the Hub's usual size


# Of a multimodal checkpoint, the text model's tensors: how their names begin, and how they do without the other parts.
TEXT_MODEL = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}


class WeightFiles:
    """The tensors of a checkpoint folder by name. Opening checks every file's header; tensors are read on demand.

    Of a multimodal checkpoint those of its text model, by the names that they have in a checkpoint of that alone.
    Of one file at a time pages are in memory: those of what was read before go when another file is read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._where: dict[str, tuple[Path, Any]] = {}  # tensor name -> its file, and that one opened, for the header
        self._read: tuple[Path, Any] | None = None  # the file that was read last, opened once more
        problems: list[str] = []
        index = _index(folder) if (folder / INDEX).exists() else {}
        for file in sorted(set(index.values()) or _unindexed(folder)):
            try:
                opened = open_safetensors(file)
            except UserError as e:
                problems += e.problems
                continue
            names = [n for n in opened.keys() if index.get(n, file) == file]  # noqa: SIM118
            if twice := [n for n in names if n in self._where]:
                problems.append(
                    f"{file} repeats {len(twice)} tensors of another file, such as {twice[:3]}: "
                    "the folder mixes two checkpoints; download it into an empty one"
                )
            self._where |= dict.fromkeys(names, (file, opened))
        if not problems and (absent := sorted(set(index) - set(self._where))):
            problems.append(
                f"{folder / INDEX} lists {len(absent)} tensors that no file holds, such as {absent[:3]}: "
                "the files and the index are of different checkpoints; download them again"
            )
        if problems:
            raise UserError(*problems)
        self._stored = {name: name for name in self._where}  # by the name that we give it
        if any(name.startswith(tuple(TEXT_MODEL)) for name in self._where):
            self._stored = {ours: name for name in self._where if (ours := _text_name(name))}
            log.info("%s holds a multimodal model: its text model alone is loaded", folder)

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def names(self) -> set[str]:
        return set(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As the file spells it: BF16, F32, I8 ..."""
        return str(self._slice(name).get_dtype())

    @property
    def num_bytes(self) -> int:
        """Of the files on the disk."""
        return sum(file.stat().st_size for file in {file for file, _ in self._where.values()})

    def metadata(self) -> dict[str, str]:
        """What the headers of the files say besides the tensors."""
        found: dict[str, str] = {}
        for opened in dict(self._where.values()).values():
            found |= opened.metadata() or {}
        return found

    def read(self, name: str, *region: slice) -> Tensor:
        """One tensor, or of its first dimensions these slices, on the CPU in its own dtype; only that is read."""
        stored = self._stored[name]
        file, _ = self._where[stored]
        if self._read is None or self._read[0] != file:
            self._read = file, open_safetensors(file)
        opened = self._read[1]
        return opened.get_slice(stored)[region] if region else opened.get_tensor(stored)

    def _slice(self, name: str) -> Any:
        stored = self._stored[name]
        return self._where[stored][1].get_slice(stored)


def _text_name(name: str) -> str | None:
    """What a text model alone calls a multimodal checkpoint's tensor; None if it has none such."""
    if name == "lm_head.weight":
        return name
    return next((new + name[len(old) :] for old, new in TEXT_MODEL.items() if name.startswith(old)), None)


def open_safetensors(path: Path) -> Any:
    """``safe_open`` whose errors say which file, what is wrong with it, and the way out."""
    if not path.exists():
        raise UserError(f"{path} is missing: the download is incomplete; run `tune download` again")
    try:
        return safe_open(path, "pt")
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror or e}") from None
    except SafetensorError as e:
        with open(path, "rb") as f:
            kind = what_is(f.read(200))
        why = f"it is {kind}" if kind else f"{e}; the file is damaged or incomplete: download it again"
        raise UserError(f"{path} is not a readable safetensors file: {why}") from None


def save_tensors(tensors: dict[str, Tensor], path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file that a group may read as it may the folder: the library makes every file 0600."""
    save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
    path.chmod(path.parent.stat().st_mode & 0o666)


def write_shards(
    folder: Path,
    sizes: Mapping[str, int],
    tensor: Callable[[str], Tensor],
    *,
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``model.safetensors``, or numbered shards and their index; ``sizes`` gives each name's bytes, in order.

    ``tensor(name)`` is called when its shard is written, so that one shard at a time is in memory. ``metadata`` goes
    into the header of each.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, num_bytes in sizes.items():
        if shards[-1] and size + num_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_tensors({name: tensor(name).contiguous() for name in names}, folder / file, metadata=metadata)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _index(folder: Path) -> dict[str, Path]:
    """Which file of ``folder`` holds each tensor, as the index says."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{folder / INDEX}: weight_map must map tensor names to file names; download the file again")
    files = {name: safe_join(folder, name) for name in set(weight_map.values())}
    return {tensor: files[name] for tensor, name in weight_map.items()}


def _unindexed(folder: Path) -> set[Path]:
    """The weight files of a folder without an index."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder that `tune download` made")
    if (folder / "model.safetensors").exists():
        return {folder / "model.safetensors"}
    files = {f for f in folder.glob("*.safetensors") if not f.name.startswith(("consolidated", "adapter_"))}
    numbered = {f: m for f in files if (m := re.fullmatch(r".*-(\d{5})-of-(\d{5})\.safetensors", f.name))}
    if numbered:
        total = max(int(m[2]) for m in numbered.values())
        have = {int(m[1]) for m in numbered.values()}
        if missing := sorted(set(range(1, total + 1)) - have):
            raise UserError(f"{folder} lacks shards {missing} of {total}, and {INDEX}: download it again")
    if not files:
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth"))
        hint = f"; {pickles[:3]} are pickles, which can run code when loaded" if pickles else ""
        raise UserError(f"{folder} holds no .safetensors file{hint}. `tune download ORG/MODEL` fetches the right ones")
    return files
