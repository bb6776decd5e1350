"""The engine: many requests at once on the trained model itself, with continuous batching.

    engine = Engine(model, num_slots=64, max_len=1024, stop_ids=tokenizer.stop_ids)
    completions = engine.complete([Request(prompt=tokens, sampling=Sampling(), seed=i) for i, tokens in enumerate(...)])

A slot that ends is filled with the next request a few steps later: the device goes on while the host looks. Weights are
the model's own, with their adapters: what training changes, the next step uses.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial

import torch

from torchft.cuda_graphs import Graphs
from torchft.generation.compiled import CompiledStep
from torchft.generation.looks import Look, Reader
from torchft.generation.narrow_adapters import NarrowAdapters
from torchft.generation.prefill import passes, power_of_two
from torchft.generation.requests import Completion, Finish, Request, Running, Update
from torchft.generation.slots import Slots, Start
from torchft.modules.decoder import Decoder

STEPS_PER_LOOK = {"cuda": 4}  # at what has ended, which is read while the next steps run; elsewhere 1


class Engine:
    """Requests in, tokens out. One thread calls it.

    Args:
        num_slots: sequences computed together. More than there are requests cost time and memory.
        max_len: tokens of prompt and answer together; the cache holds num_slots times so many.
        stop_ids: tokens that end an answer.
        vocab_size: only ids below it are drawn; None: all that the model has.
        decode: ids -> text, for requests with stop texts.
        compile: a backend of torch.compile for the step of one token, which then always computes all slots, and for
            prefills of many prompts; None: they run as they are.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        num_slots: int,
        max_len: int,
        stop_ids: Sequence[int],
        vocab_size: int | None = None,
        decode: Callable[[Sequence[int]], str] | None = None,
        compile: str | None = None,
    ) -> None:
        self.model, self.num_slots, self.max_len = model, num_slots, max_len
        self.num_finished: dict[str, int] = {}  # how requests ended, counted
        self._stop_ids, self._decode = frozenset(stop_ids), decode
        device = model.embed_tokens.weight.device
        self._steps = STEPS_PER_LOOK.get(device.type, 1)
        self._slots = Slots(
            model,
            num_slots=num_slots,
            max_len=max_len,
            stop_ids=tuple(stop_ids),
            vocab_size=vocab_size or model.config.vocab_size,
        )
        self._reader = Reader(self._slots)
        self._last: Look | None = None  # taken behind the steps that may be running
        self._graphs = Graphs(self._slots.moved) if self._slots.replays else None
        self._adapters = NarrowAdapters(model)
        self._compiled = CompiledStep(model, self._slots, backend=compile) if compile else None
        self._queue: deque[tuple[int, Request]] = deque()
        self._running: dict[int, Running] = {}  # by slot
        self._submitted = 0

    @property
    def is_idle(self) -> bool:
        return not self._queue and not self._running

    def submit(self, request: Request) -> int:
        """Queue a request; its number. ValueError for an empty prompt."""
        if not request.prompt:
            raise ValueError(f"prompt {self._submitted} is empty: give it at least a BOS token")
        if request.sampling.stop and self._decode is None:
            raise ValueError("stop texts need an engine with decode=")
        self._queue.append((self._submitted, request))
        self._submitted += 1
        return self._submitted - 1

    def cancel(self, number: int) -> None:
        """Forget a request; its slot is free from the next check on."""
        self._queue = deque(entry for entry in self._queue if entry[0] != number)
        for slot, running in list(self._running.items()):
            if running.number == number:
                self._release(slot, "cancelled")

    def complete(self, requests: Iterable[Request]) -> list[Completion]:
        """All of ``requests``, in their order; the model is left in the mode it was in."""
        numbers = [self.submit(request) for request in requests]
        found: dict[int, tuple[list[int], list[float]]] = {number: ([], []) for number in numbers}
        ends: dict[int, Finish] = {}
        was_training = self.model.training
        self.model.eval()
        while not self.is_idle:
            for number, tokens, logps, finish in self.advance():
                found[number][0].extend(tokens)
                found[number][1].extend(logps)
                if finish:
                    ends[number] = finish
        self.model.train(was_training)
        self._settle()
        return [Completion(tokens=found[n][0], logps=found[n][1], finish=ends[n]) for n in numbers]

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # blocks compiled for training would compile again for every length
    def advance(self) -> list[Update]:
        """Fill free slots, take a few steps, and say what is new. For a model in eval mode."""
        with self._adapters.used():
            return self._advance()

    def _advance(self) -> list[Update]:
        updates = self._fill()
        if not self._running:
            return updates
        left = max(r.most(self.max_len) - r.count for r in self._running.values())
        steps = max(0, min(self._steps, left))  # less than none is left of requests that are done and not looked at yet
        self._take(steps)
        last, self._last = self._last, None
        look: Look | None = self._reader.look(self._running)
        if self._reader.is_apart and steps:
            look, self._last = last, look
        return updates + (self._collect(look) if look else [])

    def _take(self, steps: int) -> None:
        """Queue ``steps`` tokens for every slot. A request that is done draws none, which the next looks tell."""
        longest = max(len(r.request.prompt) + r.count for r in self._running.values())
        seen = power_of_two(longest + steps, most=self.max_len)
        used = self.num_slots if self._compiled else max(self._running) + 1
        rows = power_of_two(used, most=self.num_slots)
        filtered = self._is_filtered()
        self._slots.cache.see(seen)
        step = partial(self._slots.step, rows, filtered=filtered)
        with self._compiled.used() if self._compiled else nullcontext():
            for _ in range(steps):
                if self._graphs is None:
                    step()
                else:
                    self._graphs.run((rows, seen, filtered, self._slots.seen is None), step)
                for running in self._running.values():
                    running.count += 1

    def _settle(self) -> None:
        """Wait for steps that were queued before the end was known: whoever comes next may free what they read."""
        if self._last is not None:
            self._reader.progress(self._last)
        self._last = None

    def release(self) -> None:
        """Free the cache; the next request makes it anew. For the time in which the model trains."""
        assert self.is_idle
        self._settle()
        self._slots.release()
        self._adapters = NarrowAdapters(self.model)
        self._graphs = Graphs(self._slots.moved) if self._graphs else None

    def _fill(self) -> list[Update]:
        """Give free slots to waiting requests; refused ones are told."""
        refused = []
        free = [slot for slot in range(self.num_slots) if slot not in self._running]
        starts: list[Start] = []
        while self._queue and len(starts) < len(free):
            number, request = self._queue.popleft()
            if len(request.prompt) >= self.max_len:
                refused.append(Update(number, [], [], "too_long"))
                self._count("too_long")
                continue
            slot = free[len(starts)]
            running = self._running[slot] = Running(number=number, request=request)
            prompt, limit = tuple(request.prompt), len(request.prompt) + running.most(self.max_len)
            starts.append(Start(slot=slot, prompt=prompt, sampling=request.sampling, seed=request.seed, limit=limit))
        filtered = self._is_filtered()
        for length, prompts, is_compiled in passes((start.prompt for start in starts), max_len=self.max_len):
            held = set(prompts)
            own = [start for start in starts if start.prompt in held]
            blocks = self._compiled.used() if self._compiled and is_compiled else nullcontext()
            self._slots.prefill(own, prompts, length=length, filtered=filtered, blocks=blocks)
        return refused

    def _collect(self, look: Look) -> list[Update]:
        """What is new in the slots since the look before."""
        updates = []
        counts, done = self._reader.progress(look)
        same = {slot: running for slot, running in look.running.items() if self._running.get(slot) is running}
        wanted = [slot for slot, running in same.items() if done[slot] or running.is_watched]
        if not wanted:
            return []
        answers, logps = self._reader.answers(look, wanted, most=max(counts[slot] for slot in wanted))
        for slot, answer, logp in zip(wanted, answers, logps):
            running, count = self._running[slot], counts[slot]
            old = len(running.tokens)
            finish: Finish | None = None
            if done[slot]:
                finish = "stop" if answer[count - 1] in self._stop_ids else "length"
                if math.isnan(logp[count - 1]):
                    finish, count = "not_finite", count - 1  # that token means nothing
            running.tokens = answer[:count]
            if (end := self._stop_text(running, old)) is not None:
                finish, count = "stop", end
            updates.append(Update(running.number, answer[old:count], logp[old:count], finish))
            if finish:
                self._release(slot, finish)
        return updates

    def _stop_text(self, running: Running, old: int) -> int | None:
        """How many tokens it took until a stop text was complete; the first ``old`` of them held none."""
        stops = running.request.sampling.stop
        if not stops:
            return None
        assert self._decode is not None
        reach = max(len(stop.encode()) for stop in stops) + 4  # tokens, of at least a byte each, that can hold it
        for end in range(old + 1, len(running.tokens) + 1):
            text = self._decode(running.tokens[max(0, end - reach) : end])
            if any(stop in text for stop in stops):
                return end
        return None

    def _release(self, slot: int, finish: Finish) -> None:
        del self._running[slot]
        self._slots.is_done[slot] = True
        self._count(finish)

    def _count(self, finish: Finish) -> None:
        self.num_finished[finish] = self.num_finished.get(finish, 0) + 1

    def _is_filtered(self) -> bool:
        return any(running.request.sampling.is_filtered for running in self._running.values())
