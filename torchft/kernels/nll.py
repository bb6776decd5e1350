"""Log-probability of the label, entropy and their gradient from rows of logits: a Triton kernel and its PyTorch twin.

The online softmax is that of https://arxiv.org/abs/1805.02867. A row is read once for the sums and once more (from the
L2 cache, mostly) for the gradient, which takes the place of the logits: no second tensor of [t, v] ever exists.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

BLOCK = 32768  # logits that a program holds in registers, at most
tl: Any  # triton.language, from the first launch on: a jitted function finds it among the module's names


def row_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    grad_logp: Tensor | None = None,
    grad_entropy: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Of p = softmax(logits / temperature): log p(label) and the entropy -sum(p log p), each [t] fp32 in nats.

    ``logits`` [t, v] bf16 or fp32, last stride 1; ``labels`` [t] int64, where a label outside 0 .. v - 1 gives NaN.
    The arithmetic is fp32. Without ``entropy`` the second is None. With ``grad_logp`` [t], the upstream gradient of the
    log-probabilities (and ``grad_entropy`` [t], that of the entropies), **logits are overwritten** by their gradient.
    Autograd does not follow; it raises if ``logits`` were saved for a backward that is yet to come.
    """
    assert logits.ndim == 2 and logits.stride(1) == 1 and labels.shape == logits.shape[:1]
    assert grad_entropy is None or (entropy and grad_logp is not None)
    rows = _on_gpu if logits.is_cuda else row_logps_reference
    with torch.no_grad():
        logp, ent = rows(logits, labels, temperature, entropy, grad_logp, grad_entropy)
    if grad_logp is not None and logits.is_cuda:
        increment_version(logits)  # PyTorch does not see what a kernel of ours writes
    return logp, ent


def row_logps_reference(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    entropy: bool,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """``row_logps`` in plain PyTorch, for any device; needs four times the memory of fp32 logits."""
    logps = (logits.float() / temperature).log_softmax(dim=-1)  # [t, v]
    known = (labels >= 0) & (labels < logits.shape[1])
    index = labels.where(known, 0).unsqueeze(1)
    logp = logps.gather(1, index).squeeze(1).where(known, torch.nan)
    probs = logps.exp()
    finite = logps.where(probs > 0, 0)  # a logit of -inf adds nothing: 0 log 0 = 0
    ent = -(probs * finite).sum(dim=-1) if entropy else None
    if grad_logp is not None:
        slope = grad_logp.unsqueeze(1).expand_as(probs)
        if grad_entropy is not None and ent is not None:
            slope = slope + grad_entropy.unsqueeze(1) * (finite + ent.unsqueeze(1))
        grad = (probs * slope).neg_()
        grad.scatter_add_(1, index, grad_logp.where(known, 0).unsqueeze(1))
        logits.copy_(grad / temperature)
    return logp, ent


def _on_gpu(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    entropy: bool,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    t, v = logits.shape
    logp = torch.empty(t, dtype=torch.float32, device=logits.device)
    ent = torch.empty_like(logp) if entropy else None
    if t == 0:
        return logp, ent  # a launch of no programs is an error
    block = min(BLOCK, 1 << (v - 1).bit_length())
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _kernel()[(t,)](
            logits,
            labels.contiguous(),
            logp,
            ent,
            None if grad_logp is None else grad_logp.float().contiguous(),
            None if grad_entropy is None else grad_entropy.float().contiguous(),
            v,
            logits.stride(0),
            1 / temperature,
            WITH_ENTROPY=entropy,
            WITH_GRAD=grad_logp is not None,
            WITH_ENTROPY_GRAD=grad_entropy is not None,
            BLOCK=block,
            num_warps=max(1, min(32, block // 1024)),
        )
    return logp, ent


@cache
def _kernel() -> Any:
    """The Triton function, one program per row; made at the first launch: CPU builds of PyTorch have no Triton."""
    global tl
    import triton
    import triton.language as tl

    @triton.jit
    def row_logps_kernel(  # type: ignore[no-untyped-def]  # Triton has no types for its pointers
        logits,
        labels,
        logps,
        entropies,
        grad_logps,
        grad_entropies,
        vocab,
        row_stride,
        scale,
        WITH_ENTROPY: tl.constexpr,
        WITH_GRAD: tl.constexpr,
        WITH_ENTROPY_GRAD: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)  # 64 bits: 16,384 rows of 262,144 logits pass 2^31
        logits += row * row_stride
        label = tl.load(labels + row)
        known = (label >= 0) & (label < vocab)
        at_label = tl.load(logits + label, mask=known, other=float("nan")).to(tl.float32) * scale
        columns = tl.arange(0, BLOCK)

        # With e(x) = exp(x - top): total = sum of e, weighted = sum of e * (x - top), for the largest x so far.
        top = tl.full((), -3.0e38, tl.float32)  # finite, so that a first block of -inf gives 0, not NaN
        total = tl.full((), 0.0, tl.float32)
        weighted = tl.full((), 0.0, tl.float32)
        for start in range(0, vocab, BLOCK):
            inside = start + columns < vocab
            x = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32) * scale
            higher = tl.maximum(top, tl.max(x, axis=0))
            shrink = tl.exp(top - higher)
            e = tl.exp(x - higher)
            if WITH_ENTROPY:
                shifted = tl.where(e > 0, x - higher, 0.0)  # 0 log 0 = 0
                lower = tl.where(total > 0, top - higher, 0.0)
                weighted = shrink * (weighted + total * lower) + tl.sum(e * shifted, axis=0)
            total = total * shrink + tl.sum(e, axis=0)
            top = higher
        log_total = tl.log(total)
        tl.store(logps + row, at_label - top - log_total)
        if WITH_ENTROPY:
            entropy = log_total - weighted / total
            tl.store(entropies + row, entropy)

        if WITH_GRAD:
            grad_logp = tl.load(grad_logps + row)
            if WITH_ENTROPY_GRAD:
                grad_entropy = tl.load(grad_entropies + row)
            for start in range(0, vocab, BLOCK):
                inside = start + columns < vocab
                x = tl.load(logits + start + columns, mask=inside, other=float("-inf")).to(tl.float32) * scale
                logp = x - top - log_total
                p = tl.exp(logp)
                slope = p * grad_logp
                if WITH_ENTROPY_GRAD:
                    slope += p * grad_entropy * (tl.where(p > 0, logp, 0.0) + entropy)
                grad = tl.where(start + columns == label, grad_logp, 0.0) - slope
                tl.store(logits + start + columns, (grad * scale).to(logits.dtype.element_ty), mask=inside)

    return row_logps_kernel
