"""Named points where a test can make a run fail: TORCHFT_FAULT="point:action:rank:step".

Points: before_step, after_shard_write, before_commit, after_commit. Actions: kill, term, int, segv (signals), raise,
enospc, eio, slow (SLOW_S), hang, exit (with code 0, as if done).
``*`` stands for any rank or step. A job that torchrun has restarted has no faults any more, so that it can recover.
Without the variable a point costs one look into the environment.
"""

import errno
import os
import signal
import time

VARIABLE = "TORCHFT_FAULT"
SLOW_S = 1.0


def point(name: str, *, step: int, rank: int = 0) -> None:
    """Fails here if TORCHFT_FAULT names this point, rank and step."""
    if not (wanted := os.environ.get(VARIABLE)) or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    where, action, at_rank, at_step = wanted.split(":")
    if where != name or at_rank not in ("*", str(rank)) or at_step not in ("*", str(step)):
        return
    match action:
        case "kill" | "term" | "int" | "segv":
            os.kill(os.getpid(), getattr(signal, f"SIG{action.upper()}"))
        case "exit":
            os._exit(0)
        case "raise":
            raise RuntimeError(f"injected fault {wanted}")
        case "enospc" | "eio":
            code = errno.ENOSPC if action == "enospc" else errno.EIO
            raise OSError(code, os.strerror(code))
        case "slow":
            time.sleep(SLOW_S)
        case "hang":
            time.sleep(3600)
        case _:
            raise ValueError(f"{VARIABLE}={wanted}: no action {action!r}")
