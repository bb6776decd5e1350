"""What each rank has to say of its troubles: ``output_dir/debug/log_rank_00001.txt``, warnings, errors and stacks.

The screen has the main rank's warnings alone; all ranks would say the same, mostly.
"""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchft.redact import redact_record

LOGGER = logging.getLogger("torchft")


class RankFile(logging.FileHandler):
    """Appends to a file that is made with its first line, and only in a run folder that exists by then."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", delay=True)
        self._folder = path.parent
        self.setLevel(logging.WARNING)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self.addFilter(redact_record)

    def emit(self, record: logging.LogRecord) -> None:
        if self._folder.parent.is_dir():
            self._folder.mkdir(exist_ok=True)
            super().emit(record)


@contextmanager
def rank_log(debug_dir: Path | None, rank: int) -> Iterator[None]:
    """Inside, this rank's file gets its warnings and errors, and the stack of what ends the block; the screen less."""
    quiet = logging.lastResort
    assert quiet is not None
    screen = None if LOGGER.hasHandlers() else quiet  # what Python falls back on only where there is no handler
    file = None if debug_dir is None else RankFile(debug_dir / f"log_rank_{rank:05d}.txt")
    added = [handler for handler in (screen, file) if handler is not None]
    level = quiet.level
    if rank:
        quiet.setLevel(logging.ERROR)  # the main rank says what all would say
    for handler in added:
        LOGGER.addHandler(handler)
    try:
        yield
    except BaseException as e:
        if file is not None and not isinstance(e, SystemExit):
            stack = "".join(traceback.format_exception(e))
            file.handle(LOGGER.makeRecord(LOGGER.name, logging.ERROR, "", 0, stack, (), None))
        raise
    finally:
        for handler in added:
            LOGGER.removeHandler(handler)
        quiet.setLevel(level)
        if file is not None:
            file.close()
