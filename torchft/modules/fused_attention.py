"""The GPU's fused attention kernels as one operator: FlashAttention and cuDNN, whole or packed rows, with sinks.

An operator of our own because (a) heads stay where the projections put them, [b, s, h, c], and fewer key/value heads go
in as they are; (b) the number and the length of documents are read when it runs, so that no packing recompiles a block;
(c) torch 2.11's FLOP counter refuses fewer key/value heads, which breaks ``activation_memory_budget``; ours does not.
"""

from functools import cache

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from torchft.kernels.one_query import fills, one_query

aten = torch.ops.aten


@torch.library.custom_op("torchft::attention", mutates_args=())
def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: str,
    scale: float,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sizes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention of q [b, s, h, c] over k, v [b, t, k, c], fp16 or bf16 -> out [b, s, h, c], log-sum-exp.

    ``kernel`` "flash" or "cudnn"; only "flash" knows windows, documents and sinks. ``cu_seqlens`` and ``sizes`` as in
    ``masks.Visible``, with ``cu_seqlens_k`` as in ``masks.Chunk``; without it t = s. ``sinks`` [h] are logits of one
    more key per head, whose value is zero (gpt-oss). Not ``causal``, of "flash" alone: windows reach as far to both
    sides. The second output, fp32 in the kernel's own shape, is for backward and carries no gradient.
    """
    if kernel == "cudnn":
        out, lse = aten._scaled_dot_product_cudnn_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, True, False, scale=scale
        )[:2]
        return out.transpose(1, 2).contiguous(), lse
    (q_, k_, v_), *lengths = _flat(q, k, v, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, sizes=sizes)
    left, right = _sides(window, causal)
    out, lse = aten._flash_attention_forward(
        q_, k_, v_, *lengths, 0.0, causal, False,
        scale=scale, window_size_left=left, window_size_right=right,
    )[:2]  # fmt: skip
    if sinks is not None:
        total = torch.logaddexp(lse, sinks.float()[:, None])  # [b, h, s] or [h, t]
        out = (out * (lse - total).exp().transpose(-1, -2)[..., None]).to(q.dtype)
        lse = total
    return out.view(q.shape), lse


@torch.library.custom_op("torchft::attention_backward", mutates_args=())
def fused_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kernel: str,
    scale: float,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sizes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and the fp32 gradient of the sinks ([0] without them).

    The kernels know nothing of sinks, yet their gradients are right: with ``out`` and ``lse`` of the softmax that has
    the sink in it, p (dp - rowsum(grad * out)) is its gradient for the real keys, as the sink's value is zero.
    """
    if kernel == "cudnn":
        heads_first = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
        unused = torch.empty((), dtype=torch.int64, device=q.device)  # the random state of dropout
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            *heads_first, lse, unused, unused, None, None, None, q.shape[1], q.shape[1], 0.0, True, scale=scale
        )
        dq, dk, dv = (g.transpose(1, 2).contiguous() for g in grads)
        return dq, dk, dv, lse.new_empty(0)
    rows = (grad, q, k, v, out)
    (grad_, q_, k_, v_, out_), *lengths = _flat(*rows, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, sizes=sizes)
    left, right = _sides(window, causal)
    state, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    grads = aten._flash_attention_backward(
        grad_, q_, k_, v_, out_, lse, *lengths, 0.0, causal, state, unused,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    dq, dk, dv = (g.contiguous().view(x.shape) for g, x in zip(grads, (q, k, v)))
    if sinks is None:
        return dq, dk, dv, lse.new_empty(0)
    share = (sinks.float()[:, None] - lse).exp().transpose(-1, -2).reshape(out.shape[:-1])  # [b, s, h], of the sink
    return dq, dk, dv, -(share * (grad.float() * out.float()).sum(-1)).sum((0, 1))


@torch.library.custom_op("torchft::cached_attention", mutates_args=())
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Of one query per row, q [b, 1, h, c], over the first ``lengths`` [b] int32 slots of k, v [b, slots, k, c], of
    which the last is its own -> [b, 1, h, c]. ``cu_seqlens``, ``cu_seqlens_k`` [b + 1] int32: multiples of 1 and of
    slots, made once for all layers. ``window`` and ``sinks`` as in `fused_attention`. Without gradient."""
    if fills(q, k):
        return one_query(q, k, v, lengths, scale, window, sinks)
    # Not "causal", which says nothing new of a last query: only then the kernel reads keys once for all heads that
    # share them, and splits long rows.
    left, right = (-1, -1) if window is None else (window - 1, 0)
    out, lse = aten._flash_attention_forward(
        *(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens, cu_seqlens_k, 1, k.shape[1], 0.0, False, False,
        scale=scale, window_size_left=left, window_size_right=right, seqused_k=lengths,
    )[:2]  # fmt: skip
    if sinks is not None:  # lse [h, b]
        out = (out * torch.sigmoid(lse - sinks.float()[:, None]).T[..., None]).to(q.dtype)
    return out.view(q.shape)


@cached_attention.register_fake
def _cached_shape(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    return q.new_empty(q.shape)


def _flat(
    *rows: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, sizes: Tensor | None
) -> tuple[list[Tensor], Tensor | None, Tensor | None, int, int]:
    """The rows as the kernel takes them, [b, s, ..] or for documents [b * s, ..]; of queries and of keys the offsets,
    then the tokens of the longest."""
    if cu_seqlens is None or sizes is None:
        return list(rows), None, None, rows[0].shape[1], rows[0].shape[1]
    count, longest, *longest_k = sizes.tolist()  # on the CPU: the GPU is not waited for
    cu = cu_seqlens[: count + 1]
    cu_k = cu if cu_seqlens_k is None else cu_seqlens_k[: count + 1]
    return [x.flatten(0, 1) for x in rows], cu, cu_k, longest, longest_k[0] if longest_k else longest


def _sides(window: int | None, causal: bool) -> tuple[int, int]:
    """Keys to the left and right of the query's own; -1 = all."""
    left = -1 if window is None else window - 1
    return left, 0 if causal else left


@fused_attention.register_fake
def _forward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: str,
    scale: float,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sizes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor]:
    b, s, h, _ = q.shape
    shape: tuple[int, ...] = (b, h, s) if cu_seqlens is None else (h, b * s)
    if kernel == "cudnn" and _cudnn_lse_dim() == 4:
        shape = (b, h, s, 1)
    return q.new_empty(q.shape), q.new_empty(shape, dtype=torch.float32)


@fused_attention_backward.register_fake
def _backward_shapes(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kernel: str,
    scale: float,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sizes: Tensor | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, lse.new_empty(0 if sinks is None else sinks.shape)


@cache
def _cudnn_lse_dim() -> int:
    """[b, h, s] or [b, h, s, 1]: it differs between versions of torch."""
    q = torch.empty(1, 1, 1, 8, device="meta", dtype=torch.bfloat16)
    return aten._scaled_dot_product_cudnn_attention(q, q, q, None, True)[1].dim()


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]  # the context's type is not public
    q, k, v, ctx.kernel, ctx.scale, ctx.window, *others, ctx.causal = inputs
    ctx.save_for_backward(q, k, v, *output, *others)


def _backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    q, k, v, out, lse, *others, sinks = ctx.saved_tensors
    dq, dk, dv, dsinks = fused_attention_backward(
        grad.contiguous(), q, k, v, out, lse, ctx.kernel, ctx.scale, ctx.window, *others, sinks, ctx.causal
    )
    return dq, dk, dv, None, None, None, None, None, None, None if sinks is None else dsinks.to(sinks.dtype), None


fused_attention.register_autograd(_backward, setup_context=_save)


# Multiplications of the whole square, as torch counts them: these kernels reach about half of a matmul's speed, and the
# partitioner, the one that asks, wants time.


@register_flop_formula(torch.ops.torchft.attention)
def _forward_flops(q, k, v, kernel, scale, window=None, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    b, s, h, c = q
    t = k[1]
    return 4 * b * h * s * min(t, window or t) * c


@register_flop_formula(torch.ops.torchft.attention_backward)
def _backward_flops(grad, q, k, v, out, lse, kernel, scale, window=None, *args, out_shape=None, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 5 * _forward_flops(q, k, v, kernel, scale, window) // 2
