"""Step folders: ``step_000100/{model,optimizer,loader,rng}/`` and ``manifest.json``, written whole or not at all.

    if saved := latest(run.path, run.id):
        load_parameters(saved.open("model"), trainable(model))
        load_rng_state(saved.read_own("rng"))

Safetensors and JSON only: no pickle, no torch.save, no torch.distributed.checkpoint (whose metadata is a pickle), so
that a checkpoint from elsewhere can't run code. A folder is written under a temporary name, synced to the disk, and
renamed last; the manifest holds size and sha256 of every file. A step counts finished optimizer steps. `saver.py`
writes them.
"""

import logging
import math
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchft.errors import UserError
from torchft.files import clear_leftovers, read_json, remove_folder, sha256
from torchft.ranks import from_main, gather, num_ranks, rank
from torchft.training.environment import TORCHFT
from torchft.training.shards import TensorFolder
from torchft.training.step_files import FORMAT, MANIFEST, own_folder

log = logging.getLogger(__name__)

_STEP = re.compile(r"step_(\d{6,})")
_LEFTOVER = re.compile(r"\.(step_\d{6,}|export)\.(partial|replaced)")  # of a killed save, prune or export


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step folder and its manifest."""

    path: Path
    number: int
    manifest: dict[str, Any]

    def open(self, part: str) -> TensorFolder:
        return TensorFolder(self.path / part)

    def read(self, part: str) -> Any:
        """The part's tree; None if an earlier version has saved no such part."""
        return self.open(part).tree() if (self.path / part).is_dir() else None

    def read_own(self, part: str) -> Any:
        """This rank's own tree; None for a rank that the ranks which saved the step lacked. Other ranks: a warning."""
        saved_by, now = self.manifest["ranks"], num_ranks()
        where = f"{self.path} was saved by {saved_by} ranks"
        if now > saved_by:
            log.warning("%s: rank %d and later find no %s there", where, saved_by, part)
        if now < saved_by:
            log.warning("%s: the %s of rank %d and later is dropped", where, part, now)
        return self.read(f"{part}/{own_folder(rank())}") if rank() < saved_by else None


def steps(output_dir: Path, run_id: str) -> list[Step]:
    """This run's step folders in order. Ignores links, other runs' folders, and names that are not exactly a step's."""
    return _scan(output_dir, run_id)[0]


def latest(output_dir: Path, run_id: str, *, base: str | None = None) -> Step | None:
    """All ranks: this run's newest step whose files are whole by their sha256; None if it has no steps.

    Each rank reads its share of the files. Damaged ones are reported and passed over. UserError if none is whole, or if
    it was trained on another ``base``.
    """
    found, damaged = from_main(lambda: _scan(output_dir, run_id))
    for step in reversed(found):
        shares = gather(damage(step, share=slice(rank(), None, num_ranks())))
        if problems := [problem for share in shares for problem in share]:
            damaged.append(f"{step.path} is damaged: {'; '.join(problems)}")
            continue
        for problem in damaged:
            log.warning("passing over a checkpoint: %s", problem)
        if step.manifest["base"] != base:
            raise UserError(
                f"{step.path} was trained on other base weights (fingerprint {step.manifest['base']}) than those of "
                f"checkpoint_dir now ({base}): put them back, or choose another output_dir to start anew",
                is_shared=True,
            )
        return step
    if damaged:
        way_out = f"no checkpoint in {output_dir} is whole: restore one, or choose another output_dir to start anew"
        raise UserError(*damaged, way_out, is_shared=True)
    return None


def damage(step: Step, *, contents: bool = True, share: slice = slice(None)) -> list[str]:
    """What is wrong with a step's files, or a ``share`` of them; sizes only, which is quick, if not ``contents``."""
    problems = []
    for name, want in list(step.manifest["files"].items())[share]:
        path = step.path / name
        try:
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != want["size"]:
                problems.append(f"{name} has {path.stat().st_size} bytes, not {want['size']}")
            elif contents and sha256(path) != want["sha256"]:
                problems.append(f"{name} has changed since it was written (its sha256 differs)")
        except OSError as e:
            problems.append(f"{name} cannot be read: {e.strerror}")
    return problems


def best(found: Sequence[Step]) -> Step | None:
    """The step with the lowest score, the earlier one of two equals; None if none has a score."""
    scored = [s for s in found if s.manifest["score"] is not None and math.isfinite(s.manifest["score"])]
    return min(scored, key=lambda s: s.manifest["score"], default=None)


def prune(output_dir: Path, run_id: str, *, newest: int, keep_last: int) -> None:
    """For the main rank, once ``newest`` is saved: deletes all but the ``keep_last`` steps up to it, and the best.

    Later steps stay: they are damaged ones that a resume passed over, and will be replaced in their turn.
    """
    assert keep_last >= 1
    whole = [s for s in steps(output_dir, run_id) if s.number <= newest and not damage(s, contents=False)]
    assert whole[-1].number == newest
    keep = {s.number for s in (*whole[-keep_last:], best(whole)) if s}
    for step in whole:
        if step.number not in keep:
            remove_folder(step.path)


def clean(output_dir: Path) -> None:
    """Removes what killed processes left half-done, and says how much. For the one that holds the folder's lock."""
    freed = 0
    for path in list(output_dir.iterdir()):
        if (match := _LEFTOVER.fullmatch(path.name)) and path.is_dir() and not path.is_symlink():
            if match[2] == "partial":
                freed += size(path)
            clear_leftovers(output_dir / match[1])
    if freed:
        log.warning("removed %.3g GiB of unfinished checkpoints from %s", freed / 2**30, output_dir)


def size(folder: Path) -> int:
    """Bytes of all that lies in a folder, into which others may be writing."""
    total = 0
    for path, folders, files in os.walk(folder):
        for name in (*folders, *files):
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(path, name)).st_size
    return total


def _scan(output_dir: Path, run_id: str) -> tuple[list[Step], list[str]]:
    """This run's steps in order, and what is wrong with folders whose manifest can't be read.

    UserError for a folder of a format that this version can't read.
    """
    found, unreadable = [], []
    for entry in os.scandir(output_dir):
        if not (match := _STEP.fullmatch(entry.name)) or not entry.is_dir(follow_symlinks=False):
            continue
        path = Path(entry.path)
        try:
            manifest = read_json(path / MANIFEST)
        except UserError as e:
            unreadable.append(str(e))
            continue
        if manifest.get("run_id") != run_id:
            continue
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"{path} has checkpoint format {manifest.get('format')}, written by torchft {manifest.get('torchft')}; "
                f"torchft {TORCHFT} reads format {FORMAT}: resume with that version"
            )
        found.append(Step(path=path, number=int(match[1]), manifest=manifest))
    return sorted(found, key=lambda s: s.number), unreadable
