"""An engine on a thread of its own, for callers that come and go: a server's requests."""

import logging
import threading
from collections import deque
from collections.abc import Callable

from torchft.generation.engine import Engine
from torchft.generation.requests import Request, Update

log = logging.getLogger(__name__)

Listener = Callable[[Update | None], None]  # called on the engine's thread; None: the engine has failed


class Worker:
    """Requests of many threads, computed together."""

    def __init__(self, engine: Engine) -> None:
        self.error: Exception | None = None  # what ended the thread, if anything has
        self.engine = engine
        self._jobs: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._listeners: dict[int, Listener] = {}
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, listener: Listener) -> Callable[[], None]:
        """``listener`` gets every update of a request, until one has a finish. Returns how to cancel it."""
        numbers: list[int] = []

        def begin() -> None:
            numbers.append(self.engine.submit(request))
            self._listeners[numbers[0]] = listener

        def cancel() -> None:
            if numbers and numbers[0] in self._listeners:
                del self._listeners[numbers[0]]
                self.engine.cancel(numbers[0])

        self._do(begin)
        return lambda: self._do(cancel)

    def close(self) -> None:
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join()

    def _do(self, job: Callable[[], None]) -> None:
        """Before the engine's next step."""
        with self._wake:
            if self.error is not None:
                raise RuntimeError("the engine has failed") from self.error
            self._jobs.append(job)
            self._wake.notify()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._jobs or self._is_closed or not self.engine.is_idle)
                    jobs, self._jobs = self._jobs, deque()
                if self._is_closed:
                    return
                for job in jobs:
                    job()
                for update in self.engine.advance():
                    if listener := self._listeners.get(update.number):
                        listener(update)
                        if update.finish:
                            del self._listeners[update.number]
        except Exception as e:  # told to all that wait, who would wait for ever
            log.exception("the engine has failed")
            with self._wake:
                self.error = e
            for listener in list(self._listeners.values()):
                listener(None)
