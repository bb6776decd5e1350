"""torch.compile of one block at a time, with a cache that is kept from run to run.

All L blocks of a model have one graph, so it is compiled once. Settings here are global to the process: the compiler
reads them when it partitions a graph, and they are part of the key of its cache.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from torch._dynamo.utils import compile_times, counters

from torchft import compiling
from torchft.modules.decoder import Decoder


def compile_blocks(model: Decoder, *, budget: float = 1.0, backend: str = "inductor") -> None:
    """Compile each of ``model.layers``, at its first call, for exactly the shapes that it meets.

    ``budget`` 0.0-1.0 is the share of activations that the compiler may keep for backward, of what is fastest; below
    about 0.7 it recomputes matrix multiplications and attention. At another budget than before, what has been compiled
    is forgotten.
    """
    compiling.prepare()
    if functorch_config.activation_memory_budget != budget:
        torch.compiler.reset()
    for name, value in _settings(budget).items():
        setattr(functorch_config, name, value)
    if _with_gradient not in model.embed_tokens._forward_hooks.values():
        model.embed_tokens.register_forward_hook(_with_gradient)
    for layer in model.layers:
        layer.compile(backend=backend, fullgraph=True, dynamic=False)


def _with_gradient(embed_tokens: nn.Module, inputs: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """Else the first block over a frozen embedding is another graph than the rest: twice the time to compile."""
    return x if x.requires_grad or not torch.is_grad_enabled() else x.requires_grad_()


@contextmanager
def compiler_settings(budget: float | None) -> Iterator[None]:
    """Inside, graphs are partitioned as `compile_blocks` would; None changes nothing."""
    with functorch_config.patch(_settings(budget)) if budget is not None else torch.enable_grad():
        yield


def _settings(budget: float) -> dict[str, float | bool]:
    return {
        "activation_memory_budget": budget,
        # Operators of our own, attention first, are weighed by their FLOPs; else they are recomputed as if for free.
        "is_non_builtin_to_include": True,
        # Else a block with an autograd.Function of ours is compiled anew in each run.
        "autograd_cache_allow_custom_autograd_functions": True,
    }


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What has been compiled in this process."""

    graphs: int
    seconds: float  # in tracing and compiling
    hits: int  # graphs found in the cache
    misses: int
    bypassed: int  # graphs that the cache cannot hold

    def __str__(self) -> str:
        if not self.graphs:
            return "nothing compiled"
        whence = "from the cache" if self.hits and not self.misses + self.bypassed else "cold"
        return f"{self.graphs} graphs compiled in {self.seconds:.1f} s, {whence}"


def compiled() -> Compiled:
    """So far. A number that grows after the first steps means that shapes change."""
    names, rows = compile_times(repr="csv")
    entire = [i for i, name in enumerate(names) if name == "_compile.compile_inner"]
    seconds = sum(float(x) for i in entire for x in str(rows[i]).split(",") if x.strip())
    aot = counters["aot_autograd"]
    return Compiled(
        graphs=counters["stats"]["unique_graphs"],
        seconds=seconds,
        hits=aot["autograd_cache_hit"],
        misses=aot["autograd_cache_miss"],
        bypassed=aot["autograd_cache_bypass"],
    )
