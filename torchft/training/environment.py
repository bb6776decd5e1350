"""What a run ran on: versions, git commit and devices, for run.json and error messages."""

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch

from torchft.errors import UserError

TORCHFT = version("torchft-recipes")


def pick_device(name: str, *, local_rank: int | None = None) -> torch.device:
    """The device of that name, or for "auto" the accelerator if there is one; a GPU with a number becomes the current
    one. UserError if it is not there.

    ``local_rank``: of several processes on this machine, each of which takes the accelerator of its number.
    """
    if name == "auto":
        name = str(torch.accelerator.current_accelerator() or "cpu")
    try:
        device = torch.device(name)
        if local_rank is not None and device.type != "cpu":
            device = torch.device(device.type, local_rank)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # streams and graphs are the current device's
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device: {name!r} cannot be used here: {str(e).splitlines()[0]}") from None
    return device


def seconds_since_start() -> float | None:
    """Since this process was made, the interpreter's own start included, to 0.01 s. None where the system has no /proc.

    https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html
    """
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return None
    starttime = int(stat.read_text().rpartition(")")[2].split()[19])  # field 22, in clock ticks since boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - starttime / os.sysconf("SC_CLK_TCK")


def versions() -> dict[str, str]:
    """Of Python, torch and torchft."""
    return {"torchft": TORCHFT, "torch": torch.__version__, "python": platform.python_version()}


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"


def git_commit(folder: Path) -> str | None:
    """Commit of the checkout that holds ``folder``, marked if files have changed; None outside of git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
