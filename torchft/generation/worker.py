"""An engine on a thread of its own, for callers that come and go: a server's requests."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from torchft.generation.engine import Engine
from torchft.generation.requests import Request, Update

log = logging.getLogger(__name__)

Listener = Callable[[Update | None], None]  # called on the engine's thread; None: the engine has failed, or is closed


@dataclass(eq=False)
class _Asked:
    """A request that has not ended. ``number``: the engine's, once it knows of it."""

    listener: Listener
    number: int | None = None


class Worker:
    """Requests of many threads, computed together."""

    def __init__(self, engine: Engine) -> None:
        self.error: Exception | None = None  # what ended the thread, if anything has
        self.engine = engine
        self._jobs: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._asked: set[_Asked] = set()
        self._by_number: dict[int, _Asked] = {}
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, listener: Listener) -> Callable[[], None]:
        """``listener`` gets every update of a request, until one has a finish. Returns how to cancel it.

        RuntimeError if the engine has failed or is closed.
        """
        asked = _Asked(listener)

        def begin() -> None:
            asked.number = self.engine.submit(request)
            self._by_number[asked.number] = asked

        def end() -> None:
            if asked.number in self._by_number:
                self._forget(asked)
                self.engine.cancel(asked.number)

        def cancel() -> None:
            with suppress(RuntimeError):  # then nothing runs that could be cancelled
                self._do(end)

        self._do(begin, asked)
        return cancel

    def close(self) -> None:
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join()

    def _do(self, job: Callable[[], None], asked: _Asked | None = None) -> None:
        """Before the engine's next step."""
        with self._wake:
            if self.error is not None:
                raise RuntimeError("the engine has failed or was closed") from self.error
            self._jobs.append(job)
            if asked is not None:
                self._asked.add(asked)
            self._wake.notify()

    def _forget(self, asked: _Asked) -> None:
        with self._wake:
            self._asked.discard(asked)
        if asked.number is not None:
            del self._by_number[asked.number]

    def _run(self) -> None:
        error: Exception = RuntimeError("closed")
        try:
            self._work()
        except Exception as e:
            log.exception("the engine has failed")
            error = e
        with self._wake:
            self.error = error
            left = list(self._asked)
        for asked in left:  # who would wait for ever, those too whose request has not begun
            asked.listener(None)

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._jobs or self._is_closed or not self.engine.is_idle)
                jobs, self._jobs = self._jobs, deque()
            if self._is_closed:
                return
            for job in jobs:
                job()
            for update in self.engine.advance():
                if asked := self._by_number.get(update.number):
                    asked.listener(update)
                    if update.finish:
                        self._forget(asked)
