"""When a rank dies or hangs: which one, in which step, and what it was doing.

Ranks wait for each other in every collective, so the error of one that waited in vain says nothing of the cause. Each
rank therefore notes in the job's store which step it is in, and, when it has waited in vain, that it has: who has not
noted that much is the one to look at.
"""

import faulthandler
import re
import time
from pathlib import Path
from typing import TextIO

import torch.distributed as dist

from torchft.ranks import num_ranks, rank

# Of gloo's and NCCL's errors, of which torch makes plain RuntimeErrors.
SIGNS = (
    "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "timed out", "Broken pipe",
    "Connection refused", "NCCL error", "ProcessGroupNCCL", "Gloo connect",
)  # fmt: skip
PATIENCE_S = 5.0  # until the other ranks have noticed too
DUMP_SHARE = 0.9  # of the timeout: then a rank that is still in the same step writes down its stacks


class Watch:
    """One per rank, while there are several."""

    def __init__(self, *, timeout_s: float, debug_dir: Path | None = None) -> None:
        self._timeout_s, self._step = timeout_s, 0
        self._store = dist.distributed_c10d._get_default_store()
        self._stacks = None if debug_dir is None else debug_dir / f"stacks_rank_{rank():05d}.txt"
        self._file: TextIO | None = None

    def begin_step(self, step: int) -> None:
        self._step = step
        self._store.set(f"torchft/step/{rank()}", str(step))
        if self._stacks is not None and self._stacks.parent.parent.is_dir():
            if self._file is None:
                self._stacks.parent.mkdir(exist_ok=True)
                self._file = open(self._stacks, "w")  # noqa: SIM115 closed by close()
            # From a thread of C, which a hung interpreter does not stop.
            faulthandler.dump_traceback_later(DUMP_SHARE * self._timeout_s, file=self._file)

    def report(self, error: RuntimeError) -> str:
        """For the screen: the ranks that noticed nothing, which are those that died or hang, and their steps."""
        why = re.sub(
            r"^\[\S*\] |\. This is typically.*", "", str(error).splitlines()[0]
        )  # gloo's own places and advice
        try:
            self._store.set(f"torchft/waited/{rank()}", "1")
            time.sleep(PATIENCE_S)
            others = [r for r in range(num_ranks()) if r != rank()]
            silent = [r for r in others if not self._store.check([f"torchft/waited/{r}"])]
            steps = {r: self._last_step(r) for r in silent}
        except RuntimeError:  # the store is gone with the rank that holds it
            return f"rank {rank()} lost contact with the others in step {self._step + 1}: {why}"
        if not silent:
            return f"rank {rank()} lost contact in step {self._step + 1}: {why}"
        named = ", ".join(f"rank {r} (in step {steps[r]})" for r in silent)
        where = f"; stacks of ranks that hang: {self._stacks.parent}" if self._stacks is not None else ""
        return f"no answer from {named}: rank {rank()} waited for it in step {self._step + 1}: {why}{where}"

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None and self._stacks is not None:
            self._file.close()
            if not self._stacks.stat().st_size:
                self._stacks.unlink()

    def _last_step(self, r: int) -> int:
        key = f"torchft/step/{r}"
        return int(self._store.get(key)) + 1 if self._store.check([key]) else 0


def is_lost_contact(error: BaseException) -> bool:
    """Whether this is what torch says when another rank died, or did not answer in time."""
    is_network = isinstance(error, dist.DistBackendError | dist.DistNetworkError)
    return is_network or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS))
