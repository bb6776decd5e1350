"""``attend``: the one entry to attention. The kernel was chosen with the batch's ``Visible``."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from torchft.modules.fused_attention import cached_attention, fused_attention
from torchft.modules.masks import Visible


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Visible,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T scale) v for q [b, s, h, c] over k, v [b, t, k, c] -> [b, s, h, c], k dividing h.

    ``scale``: c**-0.5 if None. ``soft_cap`` bounds scores: cap tanh(score / cap) (Gemma 2). ``sinks`` [h]: logits that
    take part in the softmax and add nothing (gpt-oss, https://arxiv.org/abs/2309.17453).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if seen.shards is not None:
        k, v = seen.shards.of_all_cp(k), seen.shards.of_all_cp(v)
    if seen.kernel == "dense":
        return _dense(q, k, v, seen, scale, soft_cap, sinks)
    if seen.kernel == "flex":
        return _flex(q, k, v, seen, scale, soft_cap, sinks)
    assert soft_cap is None, "a layer with capped scores needs Sight(soft_cap=True)"
    if seen.kernel == "cached":
        places = (seen.lengths, seen.cu_seqlens, seen.cu_seqlens_k)
        cached: Tensor = cached_attention(q, k, v, *places, scale, seen.window, sinks)
        return cached
    if seen.chunks:
        parts = [
            fused_attention(part, k, v, "flash", scale, seen.window, *chunk, sinks, seen.causal)[0]
            for part, chunk in zip(q.chunk(2, dim=1), seen.chunks, strict=True)
        ]
        return torch.cat(parts, dim=1)
    kernel = "flash" if sinks is not None else seen.kernel
    documents = (seen.cu_seqlens, None, seen.sizes)
    return fused_attention(q, k, v, kernel, scale, seen.window, *documents, sinks, seen.causal)[0]


def _dense(
    q: Tensor, k: Tensor, v: Tensor, seen: Visible, scale: float, soft_cap: float | None, sinks: Tensor | None
) -> Tensor:
    mask, causal = seen.mask, seen.causal and seen.mask is None
    if mask is not None:
        k, v = k[:, : mask.shape[-1]], v[:, : mask.shape[-1]]  # of a cache, the slots that are looked at
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [b, h, s, c]
    if k.shape[1] != q.shape[1]:  # enable_gqa would do the same, and keep fp32 from the kernel that saves memory
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    if soft_cap is None and sinks is None:
        # Compiled, one query may have any stride along s; SDPA's kernels on GPUs take few (torch 2.11).
        if q.is_cuda and q.shape[2] == 1 and torch.compiler.is_compiling():
            return one_query_in_sums(q, k, v, mask, scale).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
        return out.transpose(1, 2)
    scores = (q @ k.transpose(-1, -2)).float() * scale  # [b, h, s, t]
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        mask = mask.tril() if causal else mask
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.float()[:, None, None].expand(*scores.shape[:3], 1)), dim=-1)
    probs = scores.softmax(-1)[..., : k.shape[2]]
    return (probs.to(v.dtype) @ v).transpose(1, 2)


def one_query_in_sums(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """q [b, h, 1, c] over k, v [b, h, t, c] -> [b, h, 1, c], in fp32 and for the compiler, which makes each of the two
    sums a kernel that reads keys or values once and writes no product."""
    scores = (q.float() * k.float()).sum(-1) * scale  # [b, h, t]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, 0], float("-inf"))
    probs = scores.softmax(-1)
    return (probs[..., None] * v.float()).sum(2, keepdim=True).to(v.dtype)


def _flex(
    q: Tensor, k: Tensor, v: Tensor, seen: Visible, scale: float, soft_cap: float | None, sinks: Tensor | None
) -> Tensor:
    def capped(score: Tensor, row: Tensor, head: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        assert soft_cap is not None
        return soft_cap * torch.tanh(score / soft_cap)

    flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    out, aux = flex(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None if soft_cap is None else capped, seen.blocks,
        scale, enable_gqa=k.shape[2] != q.shape[2], return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    if sinks is not None:
        out = (out * torch.sigmoid(aux.lse - sinks.float()[:, None])[..., None]).to(out.dtype)
    return out.transpose(1, 2)


@cache
def _compiled_flex() -> Any:
    """For blocks that are not compiled themselves; uncompiled, FlexAttention would hold all scores."""
    return torch.compile(flex_attention, dynamic=False)
