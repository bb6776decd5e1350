"""Attention by every kernel against the formula in fp64: outputs and gradients of q, k, v and the sinks."""

from functools import partial

import cpu_kernels
import pytest
import torch
import torch.nn.functional as F
from oracles import distance
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from torchft.documents import Documents
from torchft.kernels import one_query
from torchft.modules import attend as attend_file
from torchft.modules import masks
from torchft.modules.attend import attend
from torchft.modules.fused_attention import fused_attention
from torchft.modules.masks import Sight, visible

LAYOUTS = {  # lengths of the documents of each row; None: not packed
    "rows": None,
    "one document": [[40], [40]],
    "mixed": [[5, 23, 1, 11], [39, 1]],
    "single tokens": [[1] * 40, [20, 1, 1, 18]],
}
WAYS = {
    "plain": {},
    "window": {"window": 7},
    "window of one": {"window": 1},
    "chunk": {"chunk": 8},
    "scale": {"scale": 0.3},
    "sinks": {"sinks": True},
    "window and sinks": {"window": 7, "sinks": True},
    "cap": {"soft_cap": 2.0},
    "cap, window": {"soft_cap": 2.0, "window": 7},
    "cap, chunk, sinks": {"soft_cap": 2.0, "chunk": 8, "sinks": True},
}


def inputs(way, groups=4, dtype=torch.float32, device="cpu", s=40, heads=8, c=16, seed=0):
    """q, k, v, the gradient of the output, sinks or None."""
    generator = torch.Generator().manual_seed(seed)
    make = partial(torch.randn, generator=generator)
    shapes = [(2, s, heads, c), *[(2, s, heads // groups, c)] * 2, (2, s, heads, c)]
    q, k, v, grad = (make(shape).to(device, dtype) for shape in shapes)
    return q * 2, k, v, grad, make(heads).to(device) if way.get("sinks") else None


def formula(q, k, v, lengths, *, window=None, chunk=None, scale=None, soft_cap=None, sinks=None):
    """Query by query, key by key."""
    s, groups = q.shape[1], q.shape[2] // k.shape[2]
    mask = torch.zeros(q.shape[0], s, s, dtype=torch.bool)
    for row, lengths_of_row in enumerate(lengths or [[s]] * q.shape[0]):
        start = 0
        for n in lengths_of_row:
            for i in range(n):
                first = max(0, i + 1 - (window or n), i // (chunk or n) * (chunk or n))
                mask[row, start + i, start + first : start + i + 1] = True
            start += n
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    weights = scores.exp() * mask[:, None].to(q.device)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.exp()[:, None, None]
    return torch.einsum("bhqk,bkhc->bqhc", weights / total, v)


def positions_of(lengths, device="cpu"):
    if lengths is None:
        return None
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]).to(device)


def with_gradients(function, q, k, v, grad, sinks):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, *([] if sinks is None else [sinks]))]
    out = function(*leaves[:3], sinks=None if sinks is None else leaves[3])
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def errors(way, lengths, tensors, documents=None, run=attend):
    """Relative distances of the output, dq, dk, dv and dsinks to the formula's."""
    q, k, v, grad, sinks = tensors
    sight = Sight(way.get("window"), way.get("chunk"), "soft_cap" in way)
    seen = visible(q.flatten(2), q.shape[-1], sight, positions_of(lengths, q.device), documents)
    more = {name: way[name] for name in ("scale", "soft_cap") if name in way}
    got = with_gradients(partial(run, seen=seen, **more), q, k, v, grad, sinks)
    rules = {name: value for name, value in way.items() if name != "sinks"}
    exact = [None if x is None else x.double() for x in tensors]
    want = with_gradients(partial(formula, lengths=lengths, **rules), *exact)
    assert [x.dtype for x in got[:4]] == [q.dtype] * 4
    return relative(got, want)


def relative(got, want):
    floor = want[0].norm()  # where a query sees only itself, dq and dk are zero but for rounding
    return [((a.double() - b).norm() / b.norm().clamp_min(floor)).item() for a, b in zip(got, want, strict=True)]


@pytest.fixture
def on_cpu(monkeypatch):
    """Makes ``visible`` choose a fused kernel on the CPU."""
    with cpu_kernels.installed():
        yield lambda kernel: monkeypatch.setattr(masks, "_kernel", lambda *_: kernel)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_dense(way, layout):
    assert max(errors(WAYS[way], LAYOUTS[layout], inputs(WAYS[way]))) < 2e-6


@pytest.mark.parametrize("groups", [1, 8])
def test_dense_groups(groups):
    assert max(errors({}, LAYOUTS["mixed"], inputs({}, groups))) < 2e-6


@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", [way for way in WAYS if "cap" not in way])
def test_fused(on_cpu, way, layout, kernel):
    on_cpu(kernel)
    assert max(errors(WAYS[way], LAYOUTS[layout], inputs(WAYS[way]))) < 2e-6


@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
@pytest.mark.parametrize("layout", ["rows", "mixed"])
def test_fused_groups(on_cpu, layout, kernel, groups):
    on_cpu(kernel)
    assert max(errors({}, LAYOUTS[layout], inputs({}, groups))) < 2e-6


def test_fused_takes_slices_of_one_projection(on_cpu):
    on_cpu("flash")
    q, k, v, grad, _ = inputs({})
    fused = torch.cat((q, k, v), dim=2)
    tensors = (*fused.split([q.shape[2], k.shape[2], v.shape[2]], dim=2), grad, None)
    assert not tensors[1].is_contiguous()
    assert max(errors({}, LAYOUTS["mixed"], tensors)) < 2e-6


def test_known_documents_are_enough(on_cpu):
    on_cpu("flash")
    lengths = LAYOUTS["mixed"]
    known = Documents(sum(map(len, lengths)), max(map(max, lengths)))
    for way in ({}, {"chunk": 8}, {"window": 7}):
        assert max(errors(way, lengths, inputs(way), known)) < 2e-6
    with pytest.raises(AssertionError, match="longer than max_q"):
        errors({}, lengths, inputs({}), known._replace(longest=20))
    missing = errors({}, lengths, inputs({}), known._replace(num=known.num - 1))
    assert not max(missing) < 0.1  # NaN: the last document was not computed


def cached_errors(way, *, dtype=torch.float32, device="cpu", slots=200, heads=8, groups=4, c=64):
    """Relative distance of one query per row, at the end of what its row of a cache holds, to the formula's."""
    lengths = [1, 7, 8, 129, slots]
    generator = torch.Generator().manual_seed(0)
    make = partial(torch.randn, generator=generator)
    q = make(len(lengths), 1, heads, c)
    k, v = (make(len(lengths), slots, heads // groups, c) for _ in range(2))
    sinks = make(heads) if way.get("sinks") else None
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    sinks = None if sinks is None else sinks.to(device)
    positions = torch.tensor(lengths, device=device)[:, None] - 1
    seen = masks.visible_in_cache(q.flatten(2), c, Sight(way.get("window")), positions, slots, slots)
    assert seen.kernel == "cached"
    got = attend(q, k, v, seen, scale=way.get("scale"), sinks=sinks)
    rules = {"window": way.get("window"), "scale": way.get("scale"), "sinks": sinks}
    want = [
        formula(
            *(x.double() for x in (q[[r] * n].view(1, n, heads, c), k[r : r + 1, :n], v[r : r + 1, :n])), None, **rules
        )
        for r, n in enumerate(lengths)
    ]
    want = torch.stack([x[0, -1] for x in want])
    return ((got[:, 0].double() - want).norm(dim=(1, 2)) / want.norm(dim=(1, 2))).max().item()


IN_CACHE = ["plain", "window", "window of one", "scale", "sinks", "window and sinks"]


@pytest.mark.parametrize("way", IN_CACHE)
def test_one_query_of_a_cache(on_cpu, way):
    on_cpu("flash")
    assert cached_errors(WAYS[way]) < 2e-6


@pytest.mark.parametrize("masked", [False, True])
def test_one_query_in_sums_for_the_compiler(masked):
    """In fp32, also where scores are large and keys bf16: as SDPA."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, n, 64, generator=generator).bfloat16() for n in (1, 50, 50))
    mask = torch.rand(2, 1, 1, 50, generator=generator) < 0.7 if masked else None
    want = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, scale=1.0)
    got = attend_file.one_query_in_sums(q, k, v, mask, 1.0)
    assert (got.double() - want).norm() / want.norm() < 3e-3


@pytest.mark.parametrize("way", ["cap", "cap, window", "cap, chunk, sinks", "window and sinks"])
def test_flex_forward(monkeypatch, way):
    """FlexAttention has no gradient on CPUs; the tests on a GPU have."""
    monkeypatch.setattr(masks, "_kernel", lambda *_: "flex")
    monkeypatch.setattr(attend_file, "_compiled_flex", lambda: torch.nn.attention.flex_attention.flex_attention)
    q, k, v, _, sinks = inputs(WAYS[way], s=300)
    lengths = [[120, 1, 9, 150, 20], [300]]
    rules = WAYS[way] | {"sinks": sinks}
    sight = Sight(rules.pop("window", None), rules.pop("chunk", None))
    seen = visible(q.flatten(2), q.shape[-1], sight, positions_of(lengths))
    want = formula(q.double(), k.double(), v.double(), lengths, **(WAYS[way] | {"sinks": sinks}))
    assert distance(attend(q, k, v, seen, **rules), want)[1] < 2e-6


@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
def test_flops_are_counted_with_fewer_key_heads(on_cpu, kernel):
    """The partitioner asks the counter, at a memory budget below 1."""
    on_cpu(kernel)
    q, k, v, grad, _ = inputs({})
    seen = visible(q.flatten(2), 16, Sight())
    with FlopCounterMode(display=False) as counter:
        with_gradients(partial(attend, seen=seen), q, k, v, grad, None)
    assert counter.get_total_flops() == 3.5 * 4 * 2 * 8 * 40 * 40 * 16


@pytest.mark.parametrize("lengths", [None, [[64, 32, 32], [128]]])
def test_operator_is_sound(on_cpu, lengths):
    """Shapes, strides and gradients under tracing are those of the real call."""
    on_cpu("flash")
    q, k, v, _, sinks = inputs({"sinks": True}, s=128)
    seen = visible(q.flatten(2), 16, Sight(window=9), positions_of(lengths))
    leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
    arguments = (*leaves[:3], "flash", 0.25, seen.window, seen.cu_seqlens, None, seen.sizes, leaves[3])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.torchft.attention.default, arguments, test_utils=tests)


GPU = pytest.param("cuda", marks=pytest.mark.gpu)
BARS = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
LONG = {
    "rows": None,
    "one document": [[384], [384]],
    "mixed": [[5, 230, 1, 148], [383, 1]],
    "single tokens": [[1] * 384, [200, 1, 1, 182]],
}


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LONG)
@pytest.mark.parametrize("way", WAYS)
def test_on_gpu(device, way, layout, dtype):
    tensors = inputs(WAYS[way], 4, dtype, device, s=384, c=64)
    assert max(errors(WAYS[way], LONG[layout], tensors)) < BARS[dtype]


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("c", [64, 128, 256])
@pytest.mark.parametrize("kernel", ["flash", "cudnn", "flex"])
@pytest.mark.parametrize("layout", ["rows", "mixed"])
def test_kernels_on_gpu(monkeypatch, device, layout, kernel, c, groups):
    if kernel == "cudnn" and c == 256:
        pytest.skip("cuDNN's backward ends at head_dim 128")
    monkeypatch.setattr(masks, "_kernel", lambda *_: kernel)
    tensors = inputs({}, groups, torch.bfloat16, device, s=384, c=c)
    assert max(errors({}, LONG[layout], tensors)) < BARS[torch.bfloat16]


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize(("groups", "c"), [(1, 64), (4, 128), (8, 64), (4, 192), (6, 256), (20, 96)])
@pytest.mark.parametrize("way", IN_CACHE)
@pytest.mark.parametrize("full", [False, True])
def test_one_query_of_a_cache_on_gpu(device, way, groups, c, full, monkeypatch):
    """By the kernel for a few rows, which splits them, and by that for many."""
    monkeypatch.setattr(one_query, "PROGRAMS", 0 if full else 1)
    shape = {"groups": groups, "heads": 4 * groups, "c": c, "slots": 1000}
    assert cached_errors(WAYS[way], dtype=torch.bfloat16, device=device, **shape) < BARS[torch.bfloat16]


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("way", ["plain", "window and sinks", "cap, window"])
def test_compiled_on_gpu_without_recompiling(device, way):
    torch.compiler.reset()
    run = torch.compile(lambda *args, **kwargs: attend(*args, **kwargs), fullgraph=True, dynamic=False)
    tensors = inputs(WAYS[way], 4, torch.bfloat16, device, s=384, c=128)
    assert max(errors(WAYS[way], LONG["mixed"], tensors, run=run)) < BARS[torch.bfloat16]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for layout in ("one document", "single tokens", "mixed"):
            assert max(errors(WAYS[way], LONG[layout], tensors, run=run)) < BARS[torch.bfloat16]


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("way", ["plain", "window", "sinks"])
@pytest.mark.parametrize("layout", LONG)
def test_chunks_of_context_parallel_on_gpu(device, layout, way):
    """The outputs and gradients of all chunks, as the ranks of cp 3 compute them, together those of the whole rows."""

    def in_chunks(q, k, v, sinks):
        parts, (b, s) = q.chunk(6, dim=1), q.shape[:2]
        positions = positions_of(LONG[layout] or [[s]] * b, device)
        count = int((positions == 0).sum())
        found = [masks.chunk(positions == 0, i * s // 6, s // 6, count) for i in range(6)]
        window = WAYS[way].get("window")
        outs = [
            fused_attention(part, k, v, "flash", 0.125, window, *chunk, sinks)[0] for part, chunk in zip(parts, found)
        ]
        return torch.cat(outs, dim=1)

    tensors = inputs(WAYS[way], 4, torch.bfloat16, device, s=384, c=64)
    options = {name: value for name, value in WAYS[way].items() if name != "sinks"}
    got = with_gradients(in_chunks, *tensors)
    exact = [x if x is None else x.double() for x in tensors]
    want = with_gradients(partial(formula, lengths=LONG[layout], **options), *exact)
    assert max(relative(got, want)) < BARS[torch.bfloat16]


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("way", WAYS)
def test_answers_that_share_a_prompt(monkeypatch, device, way):
    """FlexAttention with the masks of rows with branches, against the dense masks in fp64."""
    monkeypatch.setattr(masks, "_kernel", lambda x, *_: "dense" if x.dtype == torch.float64 else "flex")
    dtype = torch.bfloat16
    if device == "cpu":  # uncompiled: it computes all scores by the mask's function
        dtype = torch.float32
        monkeypatch.setattr(attend_file, "_compiled_flex", lambda: flex_attention)
    answers = [torch.arange(199, 199 + n) for n in (40, 1, 90)]
    row = torch.cat([torch.arange(205), *answers, torch.arange(16), torch.arange(15, 47)])
    positions = torch.stack((row, torch.arange(len(row)))).to(device)
    tensors = inputs(WAYS[way], 4, dtype, device, s=len(row), c=64)
    how = {name: value for name, value in WAYS[way].items() if name in ("scale", "soft_cap")}
    sight = Sight(WAYS[way].get("window"), WAYS[way].get("chunk"), "soft_cap" in how)

    def run(q, k, v, sinks):
        return attend(q, k, v, visible(q.flatten(2), 64, sight, positions), sinks=sinks, **how)

    exact = [x if x is None else x.double() for x in tensors]
    values = with_gradients
    if device == "cpu":  # where FlexAttention has no backward

        def values(function, q, k, v, grad, sinks):
            return [function(q, k, v, sinks=sinks)]

    found = relative(values(run, *tensors), values(run, *exact))
    assert max(found) < BARS[dtype]
