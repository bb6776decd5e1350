"""CUDA graphs of a micro-step: the blocks' forward and backward are recorded once and replayed with two launches.

A host needs 4 to 7 ms to launch the forward and backward of one compiled block, which a GPU computes in 3 when a
micro-step has 2048 tokens. Replayed, the host has nothing left to do (https://pytorch.org/blog/accelerating-pytorch-
with-cuda-graphs). The embedding and the loss stay outside: the loss keeps only supervised tokens, whose number changes.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from torchft.documents import Documents, count_documents
from torchft.modules.decoder import Decoder

MAX_SHAPES = 2  # of batches that are recorded; batches of other shapes run as if there were no graphs
SLACK = 1.25  # bounds on documents are this much above what was met, so that few batches exceed them


_RECORDED: "weakref.WeakSet[Recorded]" = weakref.WeakSet()


class Replay:
    """In place of ``Decoder.hidden`` in training (``model.replay``): same arguments, same values, same gradients.

    Records at the first batch of a shape, after a forward and backward that compile and tune what is still new, and
    again if a batch's documents exceed what was recorded for. Each forward must be followed by its backward before the
    next: activations live in the graph's memory. Gradients are summed into buffers that the graph owns and that become
    ``p.grad``, whether or not the optimizer sets it to None. Not for blocks that run under ``torch.utils.checkpoint``,
    that offload, or whose parameters have hooks.
    """

    def __init__(self, model: Decoder) -> None:
        self._model = weakref.ref(model)  # which holds this object
        self._recorded: dict[tuple[torch.Size, bool], Recorded] = {}
        self._stream: torch.cuda.Stream | None = None  # one for all recordings: libraries keep memory for each

    def __call__(self, x: Tensor, positions: Tensor | None, documents: Documents | None) -> Tensor:
        """Embeddings x [b, s, d], ``positions`` and ``documents`` of ``Decoder.forward`` -> hidden states [b, s, d]."""
        model = self._model()
        assert model is not None
        if positions is not None and documents is None:
            documents = count_documents(positions)
        key = (x.shape, positions is not None)
        recorded = self._recorded.get(key)
        if documents is not None and documents.has_branches:
            return model.hidden(x, positions, documents)  # their masks are made anew for each batch
        if recorded is None and len(self._recorded) == MAX_SHAPES:
            return model.hidden(x, positions, documents)
        x = x if x.requires_grad else x.detach().requires_grad_()
        if recorded is None or not recorded.holds(documents):
            bounds = None if documents is None else _bounds(documents, recorded, tokens=x.shape[:2])
            grads = None if recorded is None else recorded.grads  # which may hold what was summed up to here
            self._recorded.pop(key, None)
            del recorded  # its memory is free before the next takes as much
            self._stream = self._stream or torch.cuda.Stream(x.device)
            recorded = self._recorded[key] = Recorded(model, x, positions, bounds, stream=self._stream, grads=grads)
        return _Replayed.apply(x, positions, recorded)


class Recorded:
    """The graphs for one shape of batch, and the tensors that they read and write."""

    def __init__(
        self,
        model: Decoder,
        x: Tensor,
        positions: Tensor | None,
        bounds: Documents | None,
        *,
        stream: torch.cuda.Stream,
        grads: list[Tensor] | None = None,
    ) -> None:
        self.bounds = bounds
        self.turn = 0  # number of the forward whose activations are in memory
        self.x = x.detach().clone().requires_grad_()
        self.positions = None if positions is None else positions.clone(memory_format=torch.contiguous_format)
        # Of the hidden states. Embeddings may be wider: with what every layer adds of a token's own (Gemma 4 E4B).
        self.grad = x.new_zeros(*x.shape[:-1], model.embed_tokens.weight.shape[1])
        self.params = [p for part in (model.layers, model.norm) for p in part.parameters() if p.requires_grad]
        self.grads = [torch.zeros_like(p) for p in self.params] if grads is None else grads
        with torch.random.fork_rng([x.device]), _aliased(model, self.params, self.grads):
            self._record(model, stream)  # draws nothing: a resumed run records at another step
        _RECORDED.add(self)

    def _record(self, model: Decoder, stream: torch.cuda.Stream) -> None:
        device = self.x.device
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # Compiles, tunes and loads kernels; upstream is zero, so that it adds zeros to the gradients.
            model.hidden(self.x, self.positions, self.bounds).backward(self.grad)
        self.x.grad = None
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        held = torch.cuda.memory_reserved(device)
        # The threads that prefetch batches go on meanwhile: what they do is none of this recording.
        how: dict[str, Any] = {"stream": stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self.forward, **how):
            hidden = model.hidden(self.x, self.positions, self.bounds)
        with torch.cuda.graph(self.backward, pool=self.forward.pool(), **how):
            hidden.backward(self.grad)
        self.hidden, self.x_grad = hidden.detach(), self.x.grad
        self.held_bytes = torch.cuda.memory_reserved(device) - held  # for good, and not in "allocated" afterwards
        del hidden
        torch.cuda.current_stream(device).wait_stream(stream)
        torch.cuda.reset_peak_memory_stats(device)  # a replay allocates nothing; `held_bytes` says what it holds

    def holds(self, documents: Documents | None) -> bool:
        """Whether the graph computes a batch with these documents."""
        if documents is None or self.bounds is None:
            return documents is self.bounds
        return all(n <= bound for n, bound in zip(documents[:2], self.bounds[:2]))

    def own_gradients(self) -> None:
        """Make ``p.grad`` the buffers that backward adds to, with the values that it had."""
        unset = [grad for p, grad in zip(self.params, self.grads) if p.grad is None]
        if unset:
            torch._foreach_zero_(unset)
        for p, grad in zip(self.params, self.grads):
            if p.grad is not None and p.grad is not grad:
                grad.copy_(p.grad)
            p.grad = grad


@contextmanager
def _aliased(model: Decoder, params: list[nn.Parameter], grads: list[Tensor]) -> Iterator[None]:
    """Inside, ``model`` has other Parameters of the same memory, to whose ``grad`` the recorded backward adds in place.

    A parameter of which a loss is still in use keeps its node in that loss's graph, with the stream of that forward,
    which must not appear in a recording.
    """
    aliases = {}
    for p, grad in zip(params, grads):
        aliases[p] = nn.Parameter(p.detach())
        aliases[p].grad = grad
    places = [(module, name, p) for module in model.modules() for name, p in module._parameters.items() if p in aliases]
    for module, name, p in places:
        module._parameters[name] = aliases[p]
    try:
        yield
    finally:
        for module, name, p in places:
            module._parameters[name] = p


class _Replayed(torch.autograd.Function):
    """(x [b, s, d], positions, recorded) -> hidden states; the parameters' gradients are added beside autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, positions: Tensor | None, recorded: Recorded) -> Tensor:
        recorded.x.copy_(x)
        if positions is not None and recorded.positions is not None:
            recorded.positions.copy_(positions)
        recorded.forward.replay()
        recorded.turn += 1
        ctx.recorded, ctx.turn = recorded, recorded.turn
        return recorded.hidden.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        recorded: Recorded | None = ctx.recorded
        assert recorded is not None, "a second backward through the same forward: its activations are gone"
        assert ctx.turn == recorded.turn, "a forward came between this one and its backward: do one after the other"
        recorded.grad.copy_(grad)
        recorded.own_gradients()
        recorded.backward.replay()
        recorded.turn += 1  # its activations are gone
        ctx.recorded = None  # a loss that somebody keeps does not keep the graph's memory
        return None if recorded.x_grad is None else recorded.x_grad.detach(), None, None


def held_bytes() -> int:
    """Of the device, by all graphs of this process, that ``torch.cuda.max_memory_allocated`` does not count."""
    return sum(recorded.held_bytes for recorded in _RECORDED)


def _bounds(documents: Documents, before: Recorded | None, *, tokens: torch.Size) -> Documents:
    b, s = tokens
    old = before.bounds if before is not None and before.bounds is not None else Documents(0, 0)
    count, longest = (max(round(SLACK * n), bound) for n, bound in zip(documents[:2], old[:2]))
    return Documents(min(count, b * s), min(longest, s))
