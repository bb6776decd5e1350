"""Writes step folders while training goes on; `checkpoint.py` says what they are, and reads them.

    with Saver(run.path, run.id, keep_last=2, own=("rng",)) as saver:
        ...
        saver.save(step, state.everything(model, optimizer, loader=loader.state_dict(), ...))

``save`` copies tensors to host memory. A thread then writes, hashes and syncs them, and commits: of several ranks each
writes its parts of sharded tensors, the main one all else, the manifest, and the rename, once all are done. The threads
talk through a process group of their own, so that their words do not mix with training's.
"""

import logging
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError

from torchft.errors import UserError
from torchft.files import new_folder
from torchft.ranks import agree, from_main, gather, is_main, num_ranks, rank
from torchft.training import checkpoint, fault
from torchft.training.disk import space_message
from torchft.training.host_copies import HostCopies
from torchft.training.interrupt import Stopped
from torchft.training.step_files import Parts, collect, write_manifest, write_parts
from torchft.training.watch import is_lost_contact

log = logging.getLogger(__name__)

TIMEOUT_S = 3600  # for which a rank waits for the slowest to have written; one that dies is noticed at once
GIVE_UP_S = 5.0  # for which a save may still end once another rank is lost
NICENESS = 10  # of the thread that writes: it takes what training leaves of the CPUs

Group = dist.ProcessGroup | None


class Saver:
    """Saves steps of one run, one at a time, and keeps the newest. All ranks make one, and call it alike."""

    def __init__(
        self, output_dir: Path, run_id: str, *, keep_last: int, base: str | None = None, own: Collection[str] = ()
    ) -> None:
        """``base``, ``own``: as for `save`. ``keep_last``: step folders kept, besides the best by score."""
        self._output_dir, self._keep_last = output_dir, keep_last
        self._run_id, self._base, self._own = run_id, base, own
        self._group: Group = None
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None  # what stopped the thread

    def __enter__(self) -> "Saver":
        if num_ranks() > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=TIMEOUT_S))
        return self

    def save(self, step: int, parts: Mapping[str, Any], *, score: float | None = None) -> None:
        """Returns once tensors are copied, so that training may go on; `wait` says that they are on the disk.

        Waits for the step before, and raises what stopped it. Where host memory has no room for copies, writes at once.
        """
        self.wait()
        with _agreed(self._group):
            collected, num_bytes = collect(parts, own=self._own)
            copies = self._copies.of(collected)
        about = {"step": step, "run_id": self._run_id, "base": self._base, "score": score}
        if copies is None:
            self._write(collected, num_bytes, about)
            self.wait()
        else:
            self._thread = threading.Thread(target=self._write, args=(copies, num_bytes, about), daemon=True)
            self._thread.start()

    def wait(self, timeout_s: float | None = None) -> None:
        """All ranks: returns when nothing is left to write. Raises what stopped it: UserError for a full disk."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        if error is None or isinstance(error, Stopped):
            self.wait()
            return
        try:
            self.wait(GIVE_UP_S if is_lost_contact(error) else None)
        except Exception as e:  # what ended the run is told, and this beside it
            log.error("%s", e)

    def _write(self, parts: Parts, num_bytes: int, about: Mapping[str, Any]) -> None:
        if threading.current_thread() is self._thread and sys.platform == "linux":  # elsewhere a thread has none
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        try:
            write(self._output_dir, parts, about, own=self._own, num_bytes=num_bytes, group=self._group)
            with _agreed(self._group, partial(_not_pruned, self._output_dir)):
                if is_main():
                    how = {"newest": about["step"], "keep_last": self._keep_last}
                    checkpoint.prune(self._output_dir, self._run_id, **how)
        except Exception as e:  # raised by `wait`
            self._error = e


def save(
    output_dir: Path,
    step: int,
    parts: Mapping[str, Any],
    *,
    run_id: str,
    base: str | None = None,
    score: float | None = None,
    own: Collection[str] = (),
) -> Path:
    """All ranks: writes one step folder; when this returns on any, it is on the disk.

    UserError on all ranks if one of them can't; all earlier steps are intact.

    Args:
        parts: folder name -> tree of state.
        base: fingerprint of the frozen base, if ``parts`` hold only what is trained.
        score: what "best" means, lower is better: the evaluation loss at this step.
        own: parts that are another on each rank. All others are the same, but that tensors may be sharded.
    """
    with _agreed(None):
        collected, num_bytes = collect(parts, own=own)
    about = {"step": step, "run_id": run_id, "base": base, "score": score}
    return write(output_dir, collected, about, own=own, num_bytes=num_bytes, group=None)


def write(
    output_dir: Path, parts: Parts, about: Mapping[str, Any], *, own: Collection[str], num_bytes: int, group: Group
) -> Path:
    """All ranks: `save` of what `collect` gave."""
    step = about["step"]
    final = output_dir / f"step_{step:06d}"

    def failed(e: Exception) -> UserError:
        begun = checkpoint.size(output_dir / f".{final.name}.partial")  # free again soon
        what = f"step {step} could not be saved ({e}); earlier checkpoints are intact"
        message = space_message(what, num_bytes, output_dir, freed=begun)
        return UserError(message + ", then run the same command to resume")

    with ExitStack() as stack:  # the main rank's new folder, which an error removes
        with _agreed(group, failed):
            if is_main():
                _move_aside(final, about["run_id"])
                made = stack.enter_context(new_folder(final))
                for part in parts:
                    (made / part).mkdir()
        folder = output_dir / from_main(lambda: made.name, group)
        with _agreed(group, failed):
            written = write_parts(folder, step, parts, own=own)
        by_rank = gather(written, group)
        with _agreed(group, failed):
            if is_main():
                shared = {part: collected for part, collected in parts.items() if part not in own}
                write_manifest(folder, {**about, "ranks": num_ranks()}, shared, by_rank)
            fault.point("before_commit", step=step, rank=rank())
        with _agreed(group, failed):
            stack.close()  # renames
    fault.point("after_commit", step=step, rank=rank())
    return final


@contextmanager
def _agreed(group: Group, explained: Callable[[Exception], Exception] | None = None) -> Iterator[None]:
    """All ranks: an error of any rank in the block is raised by all, there as it is, elsewhere as a UserError.

    The block must not talk to other ranks. ``explained``: what is raised for an error of files.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as e:  # raised below
        error = e
        if explained is not None and isinstance(e, OSError | SafetensorError):
            error = explained(e)
            error.__cause__ = e
    agree(error, group)


def _not_pruned(output_dir: Path, error: Exception) -> UserError:
    return UserError(f"{output_dir}: an earlier checkpoint could not be removed ({error})")


def _move_aside(path: Path, run_id: str) -> None:
    """Gives whatever bears a step's name another one, unless it is this run's step, which a new one may replace."""
    if os.path.lexists(path) and path not in [step.path for step in checkpoint.steps(path.parent, run_id)]:
        aside = path.with_name(f"{path.name}.moved-{os.getpid()}")
        os.rename(path, aside)
        log.warning("%s was in the way and not of this run: moved to %s", path, aside)
