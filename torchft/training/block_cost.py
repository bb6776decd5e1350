"""What one block of a model keeps for backward and computes, measured on a copy without memory.

The block runs forward and backward on fake tensors, through the compiler's own partitioner if it will be compiled: the
numbers follow from the surgery that the model has had, not from a formula. About a second per setting, on any device,
and remembered in the user's cache folder.
"""

import copy
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.flop_counter import FlopCounterMode

from torchft.documents import Documents
from torchft.errors import UserError
from torchft.files import cache_folder, keep_in_cache, read_json
from torchft.modules.decoder import Decoder
from torchft.modules.kept import UNCOUNTED
from torchft.training.compile import compiler_settings

EAGER = None  # as a budget: a block that is not compiled


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """Of one block (the mean over a model's blocks) and one row."""

    inputs: int  # bytes of the block's input: what is kept of a block that runs again in backward
    saved: int  # bytes kept for backward, the input included; not weights, nor what all blocks share
    largest: int  # bytes of the largest tensor of those
    forward_flops: int
    backward_flops: int  # with what is recomputed


def block_costs(
    model: Decoder, budgets: Sequence[float | None], *, seq_len: int, packed: bool, device: torch.device
) -> dict[float | None, BlockCost]:
    """The cost at each memory budget of the compiler, or EAGER, for a row of ``seq_len`` tokens on ``device``.

    ``model`` may be on the meta device and is not changed.
    """
    file = cache_folder() / "block_costs" / f"{case(model, seq_len=seq_len, packed=packed, device=device)}.json"
    try:
        known = {k: BlockCost(**v) for k, v in read_json(file).items()}
    except (UserError, TypeError):  # none yet, or damaged: a cache never stops a run
        known = {}
    missing = [budget for budget in budgets if str(budget) not in known]
    if missing:
        measured = _measure(model, missing, seq_len=seq_len, packed=packed, device=device)
        known |= {str(budget): cost for budget, cost in measured.items()}
        keep_in_cache(file, json.dumps({k: asdict(v) for k, v in known.items()}))
    return {budget: known[str(budget)] for budget in budgets}


def case(model: Decoder, *, seq_len: int, packed: bool, device: torch.device) -> str:
    """A name for all that measurements of ``model``'s blocks on rows of ``seq_len`` depend on, versions included."""
    kinds = Counter(_describe(layer) for layer in model.layers)
    key = f"{kinds} {model.config} {seq_len} {packed} {device.type} {_name(device)} {_version()}"
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _measure(
    model: Decoder, budgets: Sequence[float | None], *, seq_len: int, packed: bool, device: torch.device
) -> dict[float | None, BlockCost]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    calls = _record(model, mode, seq_len=seq_len, packed=packed, device=device)
    counts = Counter(_describe(layer) for layer in model.layers)
    first = {_describe(layer): i for i, layer in reversed(list(enumerate(model.layers)))}
    found = {}
    for budget in budgets:
        costs = [(counts[kind], _run(*calls[i], budget)) for kind, i in first.items()]
        n = len(model.layers)
        found[budget] = BlockCost(
            inputs=sum(count * cost.inputs for count, cost in costs) // n,
            saved=sum(count * cost.saved for count, cost in costs) // n,
            largest=max(cost.largest for _, cost in costs),
            forward_flops=sum(count * cost.forward_flops for count, cost in costs) // n,
            backward_flops=sum(count * cost.backward_flops for count, cost in costs) // n,
        )
    return found


class _Recorder(nn.Module):
    """In place of a block: keeps what it is called with."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.inputs: tuple[Any, ...] = ()

    @torch.no_grad()
    def forward(self, *inputs: Any) -> Any:
        self.inputs = inputs
        return self.layer(*inputs)


def _record(
    model: Decoder, mode: FakeTensorMode, *, seq_len: int, packed: bool, device: torch.device
) -> list[tuple[nn.Module, tuple[Any, ...]]]:
    """A fake copy of each block, on ``device``, and the arguments that the model calls it with."""
    with mode:
        tensors = [*model.parameters(), *model.buffers()]
        memo: dict[int, Any] = {id(t): _fake(t, device) for t in tensors}
        fake = copy.deepcopy(model, memo | {id(model.activations): nullcontext(), id(model.replay): None})
        _without_few_bits(fake)
        fake.layers = nn.ModuleList(_Recorder(layer) for layer in fake.layers)
        fake.recompute = 0.0
        tokens = torch.zeros(1, seq_len, dtype=torch.int64, device=device)
        positions = tokens if packed else None  # with the documents given, nobody reads them
        documents = Documents(max(1, seq_len // 512), seq_len) if packed else None
        fake.train()(tokens, positions, head=lambda hidden, project: hidden, documents=documents)
    return [(recorder.layer, recorder.inputs) for recorder in fake.layers if isinstance(recorder, _Recorder)]


def _without_few_bits(model: nn.Module) -> None:
    """torchao's linear layers with products in few bits become plain ones, which keep and compute no less: of MXFP4 a
    fake product is refused (torch 2.13 wants half of the scales), and FLOPs of none are counted."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and type(layer).__module__.startswith("torchao."):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            plain.weight, plain.bias = layer.weight, layer.bias
            model.set_submodule(name, plain)


def _fake(t: Tensor, device: torch.device) -> Tensor:
    if is_traceable_wrapper_subclass(t):
        names, context = t.__tensor_flatten__()
        parts = {name: _fake(getattr(t, name), device) for name in names}
        new = type(t).__tensor_unflatten__(parts, context, t.shape, t.stride())
    else:
        new = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    return nn.Parameter(new, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else new


def _run(layer: nn.Module, inputs: tuple[Any, ...], budget: float | None) -> BlockCost:
    """Forward and backward, looking at what autograd keeps and at every operation's FLOPs."""
    x, *rest = inputs
    x = x.detach().requires_grad_()
    ours = {s._cdata for t in (*layer.parameters(), *layer.buffers(), *_tensors(rest)) for s in _storages(t)}
    saved: dict[int, Tensor] = {}
    flops: list[int] = []

    def keep(t: Tensor) -> Tensor:
        saved.update((s._cdata, t) for s in _storages(t) if s._cdata not in ours)
        return t

    def counted(function: Any, _: Any = None) -> Any:
        def run(*args: Any) -> Any:
            with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
                result = function(*args)
            flops.append(counter.get_total_flops())
            return result

        return run

    if budget is None:
        forward, backward = counted(layer), counted(torch.autograd.backward)
    else:
        from torch._inductor.decomposition import select_decomp_table  # imports triton

        def compiler(graph: Any, _: Any) -> Any:
            return make_boxed_func(counted(torch.fx.Interpreter(graph).run))  # a module's hooks want gradients

        backend = aot_autograd(
            fw_compiler=compiler,
            bw_compiler=compiler,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table,
        )
        torch._dynamo.reset()
        forward, backward = (
            torch.compile(layer, backend=backend, fullgraph=True, dynamic=False),
            torch.autograd.backward,
        )
    with compiler_settings(budget):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = forward(x, *rest)
        backward([out], [torch.empty_like(out)])
    if budget is not None:
        torch._dynamo.reset()
    sizes = [t.untyped_storage().nbytes() for t in saved.values()]
    return BlockCost(
        inputs=x.nbytes,
        saved=sum(sizes),
        largest=max(sizes, default=0),
        forward_flops=flops[0],
        backward_flops=sum(flops[1:]),
    )


def _tensors(values: Any) -> list[Tensor]:
    return [v for v in torch.utils._pytree.tree_leaves(list(values)) if isinstance(v, Tensor)]


def _storages(t: Tensor) -> list[torch.UntypedStorage]:
    if is_traceable_wrapper_subclass(t):
        return [s for name in t.__tensor_flatten__()[0] for s in _storages(getattr(t, name))]
    return [t.untyped_storage()]


def _describe(layer: nn.Module) -> str:
    """What its cost depends on: modules, and each tensor's kind."""
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return f"{layer} {[(n, type(t).__name__, tuple(t.shape), t.dtype, t.requires_grad) for n, t in tensors]}"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@cache
def _version() -> str:
    """Of the code that the measurement looks at: torch's, and the text of this package."""
    files = sorted(Path(__file__).parent.parent.rglob("*.py"))
    return f"{torch.__version__} {hashlib.sha256(b''.join(f.read_bytes() for f in files)).hexdigest()}"


def draws_random_numbers(layer: nn.Module) -> bool:
    """By the convention that a module which drops values says so in an attribute ``dropout`` or is an nn.Dropout."""
    return any(
        bool(vars(module).get("dropout")) or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        for module in layer.modules()
    )
