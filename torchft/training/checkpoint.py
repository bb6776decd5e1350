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
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from torchft.errors import UserError
from torchft.files import read_json, sha256
from torchft.training import fault, shards
from torchft.training.disk import space_message, sync
from torchft.training.environment import TORCHFT
from torchft.training.shards import TensorFolder
from torchft.training.tree import flatten

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"
_STEP = re.compile(r"step_(\d{6,})")
_LEFTOVER = re.compile(r"\.(step_\d{6,})\.(tmp|old|del)-\d+")


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
    scored = [s for s in found if s.manifest["score"] is not None]
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
            doomed = step.path.with_name(f".{step.path.name}.del-{os.getpid()}")
            os.rename(step.path, doomed)  # first, so that a half-deleted folder never looks like a step
            shutil.rmtree(doomed)


def clean(output_dir: Path) -> None:
    """Removes what killed processes left half-done, and says how much. Only for the holder of the folder's lock."""
    freed = 0
    for entry in os.scandir(output_dir):
        if not (match := _LEFTOVER.fullmatch(entry.name)) or not entry.is_dir(follow_symlinks=False):
            continue
        if match[2] == "old" and not (output_dir / match[1]).exists():
            os.rename(entry.path, output_dir / match[1])  # killed between the two renames of a swap
            continue
        freed += sum(f.lstat().st_size for f in Path(entry.path).rglob("*"))
        shutil.rmtree(entry.path)
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
    temporary = output_dir / f".{final.name}.tmp-{os.getpid()}"
    try:
        temporary.mkdir()
        for part, (structure, tensors) in collected.items():
            shards.write(temporary / part, structure, tensors)
            fault.point("after_shard_write", step=step)
        files = {
            str(path.relative_to(temporary)): {"size": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        versions = {"torchft": TORCHFT, "torch": torch.__version__}
        manifest = {"format": FORMAT, "step": step, **about, **versions, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        fault.point("before_commit", step=step)
        _commit(temporary, final, about["run_id"])
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # gone already if all went well
    fault.point("after_commit", step=step)
    return final


def _commit(temporary: Path, final: Path, run_id: str) -> None:
    """Gives a synced folder its name. A folder of that name is replaced if it is this run's, else moved aside."""
    old = None
    if final.is_symlink() or final.exists():
        ours = final.name in {s.path.name for s in steps(final.parent, run_id)}
        old = final.with_name(f".{final.name}.old-{os.getpid()}" if ours else f"{final.name}.moved-{os.getpid()}")
        os.rename(final, old)
    os.rename(temporary, final)
    sync(final.parent)
    if old and old.name.startswith("."):
        shutil.rmtree(old)
    elif old:
        log.warning("%s was in the way and not of this run: moved to %s", final, old)
