"""Step folders: ``step_000100/{model,optimizer,loader,rng}/`` and ``manifest.json``, written whole or not at all.

    save(run.path, step, {"model": trainable(model), "optimizer": optimizer_tree(model, optimizer), ...}, run_id=run.id)
    if saved := latest(run.path, run.id):
        load_parameters(saved.open("model"), trainable(model))

Safetensors and JSON only: no pickle, no torch.save, no torch.distributed.checkpoint (whose metadata is a pickle), so
that a checkpoint from elsewhere can't run code. A folder is written under a temporary name, synced to the disk, and
renamed last; the manifest holds size and sha256 of every file. A step counts finished optimizer steps.
"""

import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from torchft.errors import UserError
from torchft.files import clear_leftovers, new_folder, read_json, remove_folder, sha256
from torchft.training import fault, shards
from torchft.training.disk import space_message
from torchft.training.environment import TORCHFT
from torchft.training.shards import TensorFolder
from torchft.training.tree import flatten

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
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
        return self.open(part).tree()


def save(
    output_dir: Path,
    step: int,
    parts: Mapping[str, Any],
    *,
    run_id: str,
    base: str | None = None,
    score: float | None = None,
) -> Path:
    """Writes one step folder; when this returns it is on the disk. UserError if it can't, all earlier steps intact.

    Args:
        parts: folder name -> tree of state.
        base: fingerprint of the frozen base, if ``parts`` hold only what is trained.
        score: what "best" means, lower is better: the evaluation loss at this step.
    """
    collected = {part: flatten(tree) for part, tree in parts.items()}  # everything below sees only these
    try:
        return _write(output_dir, step, collected, {"run_id": run_id, "base": base, "score": score})
    except (OSError, SafetensorError) as e:
        need = sum(shards.num_bytes(tensors) for _, tensors in collected.values())
        what = f"step {step} could not be saved ({e}); earlier checkpoints are intact"
        raise UserError(space_message(what, need, output_dir) + ", then run the same command to resume") from e


def steps(output_dir: Path, run_id: str) -> list[Step]:
    """This run's step folders in order. Ignores links, other runs' folders, and names that are not exactly a step's."""
    return _scan(output_dir, run_id)[0]


def latest(output_dir: Path, run_id: str, *, base: str | None = None) -> Step | None:
    """This run's newest step whose files are whole by their sha256; None if it has no steps.

    Damaged ones are reported and passed over. UserError if none is whole, or if it was trained on another ``base``.
    """
    found, damaged = _scan(output_dir, run_id)
    for step in reversed(found):
        if problems := damage(step):
            damaged.append(f"{step.path} is damaged: {'; '.join(problems)}")
            continue
        for problem in damaged:
            log.warning("passing over a checkpoint: %s", problem)
        if step.manifest["base"] != base:
            raise UserError(
                f"{step.path} was trained on other base weights (fingerprint {step.manifest['base']}) than those of "
                f"checkpoint_dir now ({base}): put them back, or choose another output_dir to start anew"
            )
        return step
    if damaged:
        way_out = f"no checkpoint in {output_dir} is whole: restore one, or choose another output_dir to start anew"
        raise UserError(*damaged, way_out)
    return None


def damage(step: Step, *, contents: bool = True) -> list[str]:
    """What is wrong with a step's files; sizes only, which is quick, if not ``contents``."""
    problems = []
    for name, want in step.manifest["files"].items():
        path = step.path / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != want["size"]:
            problems.append(f"{name} has {path.stat().st_size} bytes, not {want['size']}")
        elif contents and sha256(path) != want["sha256"]:
            problems.append(f"{name} has changed since it was written (its sha256 differs)")
    return problems


def best(found: Sequence[Step]) -> Step | None:
    """The step with the lowest score, the earlier one of two equals; None if none has a score."""
    scored = [s for s in found if s.manifest["score"] is not None and math.isfinite(s.manifest["score"])]
    return min(scored, key=lambda s: s.manifest["score"], default=None)


def prune(output_dir: Path, run_id: str, *, newest: int, keep_last: int) -> None:
    """Once ``newest`` is saved: deletes this run's steps but the ``keep_last`` up to ``newest``, and the best.

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
    """Removes what killed processes left half-done, and says how much. Only for the holder of the folder's lock."""
    freed = 0
    for path in list(output_dir.iterdir()):
        if (match := _LEFTOVER.fullmatch(path.name)) and path.is_dir() and not path.is_symlink():
            if match[2] == "partial":
                freed += sum(f.lstat().st_size for f in path.rglob("*"))
            clear_leftovers(output_dir / match[1])
    if freed:
        log.warning("removed %.3g GiB of unfinished checkpoints from %s", freed / 2**30, output_dir)


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


def _write(
    output_dir: Path, step: int, collected: Mapping[str, tuple[Any, dict[str, Tensor]]], about: Mapping[str, Any]
) -> Path:
    final = output_dir / f"step_{step:06d}"
    _move_aside(final, about["run_id"])
    with new_folder(final) as folder:
        for part, (structure, tensors) in collected.items():
            shards.write(folder / part, structure, tensors)
            fault.point("after_shard_write", step=step)
        files = {
            str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        versions = {"torchft": TORCHFT, "torch": torch.__version__}
        manifest = {"format": FORMAT, "step": step, **about, **versions, "files": files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
        fault.point("before_commit", step=step)
    fault.point("after_commit", step=step)
    return final


def _move_aside(path: Path, run_id: str) -> None:
    """Gives whatever bears a step's name another one, unless it is this run's step, which a new one may replace."""
    if os.path.lexists(path) and path not in [step.path for step in steps(path.parent, run_id)]:
        aside = path.with_name(f"{path.name}.moved-{os.getpid()}")
        os.rename(path, aside)
        log.warning("%s was in the way and not of this run: moved to %s", path, aside)
