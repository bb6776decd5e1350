"""CPU kernels for torch's CUDA-only fused attention operators, so that what we build on them is tested without a GPU.

Plain formulas in fp64, from the operators' documented meaning.
"""

from contextlib import contextmanager
from itertools import pairwise

import torch


def spans(q, cu_seqlens):
    """(row, first, end) of each sequence, for q [b, s, h, c] or, with offsets, [t, h, c] seen as one row."""
    if cu_seqlens is None:
        return [(r, 0, q.shape[1]) for r in range(q.shape[0])]
    ends = cu_seqlens.tolist()
    return [(0, a, b) for a, b in pairwise(ends) if b > a]


def weights(q, k, scale, left, right):
    """Scores [h, s, s] of one sequence, -inf where not seen, and k for every head."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    away = torch.arange(len(q))[:, None] - torch.arange(len(q))
    seen = ((away >= -right) | (right < 0)) & ((away <= left) | (left < 0))
    return (torch.einsum("qhc,khc->hqk", q, k) * scale).masked_fill(~seen, float("-inf")), k


def flash_forward(
    q, k, v, cu_q, cu_k, max_q, max_k, dropout, is_causal, debug, *, scale=None, window_size_left=None,
    window_size_right=None, seqused_k=None, **_
):  # fmt: skip
    if seqused_k is not None:
        return flash_decode(q, k, v, cu_q, cu_k, seqused_k, scale, window_size_left)
    assert is_causal == (window_size_right == 0) and dropout == 0
    rows = [x if cu_q is None else x[None] for x in (q, k, v)]
    assert cu_q is None or all(b - a <= max_q for _, a, b in spans(q, cu_q)), "a sequence longer than max_q"
    out = torch.full_like(rows[0], float("nan"))
    lse = torch.full((out.shape[0], out.shape[2], out.shape[1]), float("nan"))
    for r, a, b in spans(q, cu_q):
        q1, k1, v1 = (x[r, a:b].double() for x in rows)
        scores, _ = weights(q1, k1, scale, window_size_left, window_size_right)
        v1 = v1.repeat_interleave(q1.shape[1] // v1.shape[1], 1)
        out[r, a:b] = torch.einsum("hqk,khc->qhc", scores.softmax(-1), v1).to(out.dtype)
        lse[r, :, a:b] = scores.logsumexp(-1).float()
    state = torch.zeros(2, dtype=torch.uint64)
    return (out if cu_q is None else out[0]), (lse if cu_q is None else lse[0]), state, torch.empty(0), torch.empty(0)


def flash_decode(q, k, v, cu_q, cu_k, used, scale, left):
    """One query per row, the last of the keys used, which begin at ``cu_k``."""
    assert cu_q.tolist() == list(range(len(q) + 1)) and used.dtype == torch.int32
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for r, (start, count) in enumerate(zip(cu_k.tolist(), used.tolist())):
        first = start if left < 0 else max(start, start + count - 1 - left)
        k1, v1 = (x[first : start + count].double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("hc,khc->hk", q[r].double(), k1) * scale
        out[r] = torch.einsum("hk,khc->hc", scores.softmax(-1), v1).to(q.dtype)
        lse[:, r] = scores.logsumexp(-1).float()
    return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)


def flash_backward(
    grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, is_causal, state, unused, *, scale=None,
    window_size_left=None, window_size_right=None,
):  # fmt: skip
    lead = (lambda x: x) if cu_q is None else (lambda x: x[None])
    rows = [lead(x) for x in (q, k, v, out, grad)]
    grads = [torch.full_like(lead(x), float("nan")) for x in (q, k, v)]
    for r, a, b in spans(q, cu_q):
        q1, k1, v1, o1, g1 = (x[r, a:b].double() for x in rows)
        groups = q1.shape[1] // k1.shape[1]
        scores, k_all = weights(q1, k1, scale, window_size_left, window_size_right)
        v_all = v1.repeat_interleave(groups, 1)
        p = (scores - lead(lse)[r, :, a:b].double()[..., None]).exp()  # [h, q, k]
        delta = (g1 * o1).sum(-1).T[..., None]
        ds = p * (torch.einsum("qhc,khc->hqk", g1, v_all) - delta) * scale
        dk, dv = torch.einsum("hqk,qhc->khc", ds, q1), torch.einsum("hqk,qhc->khc", p, g1)
        grads[0][r, a:b] = torch.einsum("hqk,khc->qhc", ds, k_all).to(q.dtype)
        for i, g in ((1, dk), (2, dv)):
            grads[i][r, a:b] = g.unflatten(1, (-1, groups)).sum(2).to(q.dtype)
    return tuple(g if cu_q is None else g[0] for g in grads)


def cudnn_forward(q, k, v, bias, with_lse, dropout=0.0, is_causal=False, debug=False, *, scale=None):
    assert is_causal and bias is None
    first = [x.transpose(1, 2) for x in (q, k, v)]
    out, lse, state, *_ = flash_forward(
        *first, None, None, q.shape[2], q.shape[2], 0.0, True, False, scale=scale, window_size_left=-1,
        window_size_right=0,
    )  # fmt: skip
    none = torch.empty(0)
    return out.transpose(1, 2), lse[..., None], none, none, q.shape[2], q.shape[2], state, none.clone(), none.clone()


def cudnn_backward(
    grad, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout, is_causal, *, scale=None
):
    first = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
    grads = flash_backward(
        *first, lse[..., 0], None, None, max_q, max_k, 0.0, True, seed, offset, scale=scale, window_size_left=-1,
        window_size_right=0,
    )  # fmt: skip
    return tuple(g.transpose(1, 2) for g in grads)


@contextmanager
def installed():
    """The kernels above are torch's for CPU tensors."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", flash_forward, "CPU")
    library.impl("_flash_attention_backward", flash_backward, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention", cudnn_forward, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention_backward", cudnn_backward, "CPU")
    yield
    library._destroy()
