"""Seeds, and the state of every random number generator that a run draws from, for bit-exact resume."""

import logging
import os
import random
from typing import Any

import torch

from torchft.errors import UserError

log = logging.getLogger(__name__)


def set_seed(seed: int, *, deterministic: bool = False) -> None:
    """Seeds Python's and torch's generators (all devices).

    ``deterministic`` also makes torch refuse operations whose result depends on the order of additions; on CUDA it
    must come before the first CUDA call, because cuBLAS reads its workspace setting once.
    """
    if not 0 <= seed < 2**63:
        raise UserError(f"seed must lie between 0 and 2^63 - 1, not {seed}")
    random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def rng_state() -> dict[str, Any]:
    """The generators of Python, torch on the CPU and this process's CUDA device, as numbers and uint8 tensors."""
    version, words, gauss = random.getstate()
    return {
        "python": [version, list(words), gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def load_rng_state(state: dict[str, Any] | None) -> None:
    """Sets the generators to a state from ``rng_state()``; None, of a rank that had none, leaves them as they are.

    Do it last: building a model or a loader draws numbers.
    """
    if state is None:
        return
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() != (state["cuda"] is not None):
        log.warning(
            "the checkpoint was made with CUDA and this is none, or the reverse: dropout draws differ from here"
        )
    elif state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
