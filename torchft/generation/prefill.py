"""Prompts through the model, all tokens at once: what the slots' caches need, and where each answer begins."""

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor

from torchft.cuda_graphs import Graphs
from torchft.generation.send import send
from torchft.modules.decoder import Decoder, Project
from torchft.modules.kv_cache import KVCache

PREFILL_TOKENS = 8192  # of one forward pass: enough to keep a GPU busy, few enough to bound its memory
SHORTEST = 16  # tokens of a row, at least
# Of a pass as large as they come, to be compiled: rows, and their length, each of which has graphs of its own. What is
# compiled hangs on the shape alone, never on what came before: a resumed run computes the same bits.
COMPILED_ROWS, COMPILED_LENGTH = 4, 128
# Padded tokens and rows of the largest prefill that is a CUDA graph. A host takes 85 ms to launch the kernels of Llama
# 3.1 8B (H100), in which the GPU computes some 2700 tokens.
GRAPH_TOKENS, GRAPH_ROWS = 2048, 128

Prompt = tuple[int, ...]
Shape = tuple[int, int]  # rows and their padded length
Name = tuple[int, str]  # of a layer "k" or "v", or LOGITS
LOGITS: Name = (-1, "logits")


class Prefill:
    """``prefill(prompts, length=...)``: logits [n, v] behind each prompt, and a cache of their keys and values.

    With ``graphs`` small ones of a shape that comes again are replayed; what the call before gave is then gone.
    """

    def __init__(self, model: Decoder, *, reach: int | None, graphs: Graphs | None) -> None:
        self._model, self._reach, self.graphs = model, reach, graphs
        self._met: set[Shape] = set()
        self._inputs: dict[Shape, tuple[Tensor, Tensor]] = {}  # tokens [rows, length] and lengths [rows]
        self._kept: dict[Name, Tensor] = {}  # where graphs leave what they compute: their own memory is the next one's

    def __call__(self, prompts: list[Prompt], *, length: int) -> tuple[Tensor, KVCache]:
        """``length``: tokens of a row, padding too."""
        device = self._model.embed_tokens.weight.device
        shape = (1 << (len(prompts) - 1).bit_length(), length)
        is_small = shape[0] * length <= GRAPH_TOKENS and shape[0] <= GRAPH_ROWS
        replays = shape in self._met
        rows = [*prompts, *[(0,)] * (shape[0] - len(prompts))] if replays else prompts
        tokens = send([[*p, *[0] * (length - len(p))] for p in rows], device=device)
        lengths = send([len(p) for p in rows], device=device)
        if self.graphs and replays:
            own = self._inputs.setdefault(shape, (tokens.clone(), lengths.clone()))
            own[0].copy_(tokens)
            own[1].copy_(lengths)
            self.graphs.run(shape, partial(self._keep, *own))
            return self._kept[LOGITS][: len(prompts)], self._cache(shape, lengths)
        logits, cache = self._run(tokens, lengths)
        # Ranks that share the blocks would replay their talk; recurrent layers' states are large, and not of tokens;
        # capped scores are FlexAttention's, which copies from the host where it is not compiled.
        is_plain = self._model.shards is None and not any(sight.soft_cap for sight in self._model.sights)
        is_plain = is_plain and all(layer.state is None for layer in cache.layers)
        if self.graphs and is_small and is_plain:
            self._met.add(shape)
        return logits, cache

    def _run(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, KVCache]:
        cache = KVCache(len(self._model.layers), num_slots=None, reach=self._reach, lengths=lengths)
        return self._model(tokens, head=partial(_logits_at, index=lengths - 1), cache=cache), cache

    def _keep(self, tokens: Tensor, lengths: Tensor) -> None:
        logits, cache = self._run(tokens, lengths)
        for name, x in [(LOGITS, logits), *_flat(cache)]:
            if name not in self._kept:
                self._kept[name] = x.new_empty(GRAPH_ROWS if name == LOGITS else GRAPH_TOKENS, *x.shape[1:])
            self._kept[name][: len(x)] = x

    def _cache(self, shape: Shape, lengths: Tensor) -> KVCache:
        cache = KVCache(len(self._model.layers), num_slots=None, reach=self._reach, lengths=lengths)
        for i, layer in enumerate(cache.layers):
            layer.k, layer.v = (
                None if flat is None else flat[: shape[0] * shape[1]].unflatten(0, shape)
                for flat in (self._kept.get((i, "k")), self._kept.get((i, "v")))
            )
        return cache


def passes(prompts: Iterable[Prompt], *, max_len: int) -> Iterator[tuple[int, list[Prompt], bool]]:
    """The forward passes that ``prompts`` need: the padded length of a row, distinct prompts, whether to compile it."""
    by_length: dict[int, list[Prompt]] = {}
    for prompt in dict.fromkeys(prompts):
        by_length.setdefault(power_of_two(max(len(prompt), SHORTEST), most=max_len), []).append(prompt)
    for length, alike in by_length.items():
        most = max(1, PREFILL_TOKENS // length)
        for i in range(0, len(alike), most):
            rows = alike[i : i + most]
            yield length, rows, len(rows) == most and _is_compiled(length)


def compiled_passes(*, num_slots: int, max_len: int) -> list[list[Prompt]]:
    """Prompts of zeros, but for what tells them apart, for each shape that an engine would compile."""
    lengths = sorted({power_of_two(1 << i, most=max_len) for i in range(max_len.bit_length() + 1)})
    sizes = {length: PREFILL_TOKENS // length for length in lengths if _is_compiled(length)}
    return [
        [tuple(int(i == row) for i in range(length - 1)) for row in range(rows)]
        for length, rows in sizes.items()
        if rows <= num_slots
    ]


def power_of_two(n: int, *, most: int) -> int:
    """The next power of two, or ``most``: few shapes, so few graphs."""
    return min(1 << (n - 1).bit_length(), most)


def _is_compiled(length: int) -> bool:
    """Whether a pass is that has as many rows of ``length`` as they come."""
    return length >= COMPILED_LENGTH and PREFILL_TOKENS // length >= COMPILED_ROWS


def _flat(cache: KVCache) -> Iterator[tuple[Name, Tensor]]:
    """Keys and values [rows * length, ...] of the layers that have some of their own."""
    for i, layer in enumerate(cache.layers):
        for part, x in (("k", layer.k), ("v", layer.v)):
            if x is not None:
                yield (i, part), x.flatten(0, 1)


def _logits_at(hidden: Tensor, project: Project, *, index: Tensor) -> Tensor:
    """Logits [b, v] at ``index`` [b] of each row."""
    return project(hidden[torch.arange(len(index), device=index.device), index])
