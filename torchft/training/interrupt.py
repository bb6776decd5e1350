"""SIGTERM and Ctrl-C: the run finishes its step, saves, and ends with exit code 0; a second signal ends it at once.

    with Interruptible() as stop:
        while step < total_steps:
            ...                                    # the step; `stop.asked` is looked at by all ranks together
            if is_stopping:
                ...                                # save
                raise Stopped

Schedulers send SIGTERM some time (30 s in Kubernetes) before they kill: the step and the save must fit into it.
"""

import logging
import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_S = 1.0  # within it a signal is the first one once more: a terminal and the launcher both send Ctrl-C


class Stopped(SystemExit):
    """The run ended where it was asked to, with all of it saved. Not an error."""

    def __init__(self) -> None:
        super().__init__(0)


class Interruptible:
    """Inside, the first signal is only noted. A thread other than the main one gets none, as always in Python."""

    def __init__(self) -> None:
        self.asked = False  # whether this process shall stop
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruptible":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked, self._since = True, time.monotonic()
            name = signal.Signals(number).name
            log.warning("%s: finishing this step, then saving; once more ends the run at once", name)
        elif time.monotonic() - self._since > SAME_S:
            signal.signal(number, signal.SIG_DFL)  # no cleaning up: the newest checkpoint is whole in any case
            os.kill(os.getpid(), number)
