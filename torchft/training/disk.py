"""Whether checkpoints fit on the disk."""

import logging
import shutil
from pathlib import Path

from torchft.errors import UserError

log = logging.getLogger(__name__)


def check_space(output_dir: Path, checkpoint_bytes: int, *, copies: int) -> None:
    """Call before training. UserError if not even one checkpoint fits; a warning if ``copies`` of them don't."""
    have = shutil.disk_usage(output_dir).free
    if have < checkpoint_bytes:
        raise UserError(space_message("a checkpoint does not fit", checkpoint_bytes, output_dir))
    if have < copies * checkpoint_bytes:
        log.warning(space_message(f"{copies} checkpoints may not fit", copies * checkpoint_bytes, output_dir))


def space_message(what: str, need: int, path: Path, *, freed: int = 0) -> str:
    """ "what: need X GiB, have Y GiB at path", and the way out; ``need`` in bytes, as is what will yet be ``freed``."""
    have = shutil.disk_usage(path).free + freed
    return (
        f"{what}: need {need / 2**30:.3g} GiB, have {have / 2**30:.3g} GiB at {path}. "
        "Free some space, lower keep_last, or choose an output_dir on another disk"
    )
