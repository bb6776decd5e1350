"""The device's side of generation: what each slot holds, and one step of all of them. Nothing here waits for it.

Every tensor has a fixed place, so that a step can be captured as a CUDA graph and replayed.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from torchft.cuda_graphs import Graphs
from torchft.generation.prefill import Prefill
from torchft.generation.sampling import Rules, Sampling, rules, sample
from torchft.generation.send import send
from torchft.modules.decoder import Decoder, Project
from torchft.modules.grouped import waits_for_host
from torchft.modules.kv_cache import KVCache


@dataclass(frozen=True, kw_only=True)
class Start:
    """A request as it enters a slot."""

    slot: int
    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    limit: int  # tokens of prompt and answer at which it ends


class Slots:
    """``num_slots`` sequences of up to ``max_len`` tokens. Rows that are done go on computing, and record nothing."""

    def __init__(
        self, model: Decoder, *, num_slots: int, max_len: int, stop_ids: tuple[int, ...], vocab_size: int
    ) -> None:
        device = model.embed_tokens.weight.device
        self.model, self.num_slots, self.vocab_size = model, num_slots, vocab_size
        self.replays = device.type == "cuda" and not waits_for_host(model)  # a CUDA graph cannot wait for the host
        self.max_len = max_len
        self.release()
        self.stops = torch.tensor(stop_ids, dtype=torch.int64, device=device)
        self.token = torch.zeros(num_slots, dtype=torch.int64, device=device)  # the newest one, not in the cache yet
        self.length = torch.ones_like(self.token)  # tokens so far, that one too
        self.limit = torch.ones_like(self.token)
        self.count = torch.zeros_like(self.token)  # tokens drawn
        self.is_done = torch.ones(num_slots, dtype=torch.bool, device=device)
        self.answers = torch.zeros(num_slots, max_len + 1, dtype=torch.int64, device=device)
        self.logps = torch.zeros(num_slots, max_len + 1, device=device)  # fp32
        self.rules = rules([Sampling()] * num_slots, [0] * num_slots, vocab_size=vocab_size, device=device)
        self.seen: Tensor | None = None  # [slots, v] bool, from the first repetition penalty on
        self.head, self.sample = _first_logits, sample  # of a step: generation/compiled.py
        self._rows = torch.arange(num_slots, device=device)

    def release(self) -> None:
        """An empty cache, in place of the one there was; the next prefill gives it memory."""
        self.cache = KVCache(len(self.model.layers), num_slots=self.max_len)
        self.prompts = Prefill(self.model, reach=self.max_len, graphs=Graphs(list) if self.replays else None)

    def prefill(
        self,
        starts: list[Start],
        prompts: list[tuple[int, ...]],
        *,
        length: int,
        filtered: bool,
        blocks: AbstractContextManager[None],
    ) -> None:
        """Fill slots: each of ``prompts`` is computed once, whatever number of ``starts`` share it, in rows of
        ``length`` tokens, inside ``blocks``; and the first token of every answer is drawn."""
        device = self.token.device
        with blocks:
            logits, cache = self.prompts(prompts, length=length)  # [prompts, v]
        lengths = send([len(p) for p in prompts], device=device)
        place = {prompt: i for i, prompt in enumerate(prompts)}
        source = send([place[start.prompt] for start in starts], device=device)
        slots = send([start.slot for start in starts], device=device)
        self.cache.copy_rows(cache, source, slots, num_rows=self.num_slots)

        new = rules([s.sampling for s in starts], [s.seed for s in starts], vocab_size=self.vocab_size, device=device)
        for column, values in zip(self.rules, new):
            column[slots] = values
        self.length[slots] = lengths[source]
        self.limit[slots] = send([start.limit for start in starts], device=device)
        self.count[slots], self.is_done[slots] = 0, False
        if any(start.sampling.repetition_penalty != 1.0 for start in starts) and self.seen is None:
            self.seen = torch.zeros(self.num_slots, logits.shape[1], dtype=torch.bool, device=device)
        if self.seen is not None:
            held = torch.zeros(len(prompts), logits.shape[1], dtype=torch.bool, device=device)
            tokens = send([[*p, *[p[0]] * (length - len(p))] for p in prompts], device=device)
            held.scatter_(1, tokens, True)
            self.seen[slots] = held[source]
        self._draw(logits[source], slots, filtered=filtered)

    def step(self, num_rows: int, *, filtered: bool) -> None:
        """One token for each of the first ``num_rows`` slots. Those that are done look at their first place alone."""
        rows = self._rows[:num_rows]
        position = torch.where(self.is_done, 0, self.length - 1)[:num_rows, None]
        logits = self.model(self.token[:num_rows, None], position, head=self.head, cache=self.cache)
        self._draw(logits, rows, filtered=filtered)

    def moved(self) -> list[Tensor]:
        """What a step changes, the cache apart: a step that is repeated writes the same there."""
        held = [self.token, self.length, self.count, self.is_done]
        return held if self.seen is None else [*held, self.seen]

    def _draw(self, logits: Tensor, rows: Tensor, *, filtered: bool) -> None:
        """The next token of ``rows`` [n] from logits [n, v]."""
        own = Rules(*(column[rows] for column in self.rules))
        seen = None if self.seen is None else self.seen[rows]
        count, is_done = self.count[rows], self.is_done[rows]
        token, logp = self.sample(logits, own, count, seen=seen, filtered=filtered, vocab_size=self.vocab_size)
        shards = self.model.shards
        if shards is not None and shards.tp > 1:  # ranks whose logits differ in a last bit would part for good
            token, logp = shards.of_first(torch.stack((token.double(), logp.double()))).unbind()
            token, logp = token.long(), logp.float()
        self.answers[rows, count], self.logps[rows, count] = token, logp  # of rows that are done never read
        self.token[rows] = token
        if self.seen is not None:
            self.seen[rows, token] = torch.ones_like(is_done)
        length = self.length[rows] + ~is_done
        self.length[rows], self.count[rows] = length, count + ~is_done
        stops = (token[:, None] == self.stops).any(-1)
        is_done = is_done | (length >= self.limit[rows]) | stops | logp.isnan()
        self.is_done[rows] = is_done


def _first_logits(hidden: Tensor, project: Project) -> Tensor:
    return project(hidden[:, 0])
