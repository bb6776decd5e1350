"""What a run ran on: versions, git commit and devices, for run.json and error messages."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

TORCHFT = version("torchft-recipes")


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
