"""What a query may see: documents in packed rows, windows, chunks, slots of a KV cache; and which kernel computes it.

Computed once per batch outside the compiled blocks and handed to every mixer.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from torchft.documents import Branches, Documents, branch_blocks, branch_mask, branches, count_documents, sees
from torchft.modules.attention_table import KERNELS
from torchft.token_shards import TokenShards

FLEX_BLOCK = 128  # tokens; FlexAttention's own default


class Sight(NamedTuple):
    """What one kind of layer sees of its document: all that came before, unless narrowed."""

    window: int | None = None  # last tokens, the query's own included
    chunk: int | None = None  # only tokens of the query's chunk; chunks start at positions 0, chunk, 2 chunk, ...
    soft_cap: bool = False  # scores are capped: only FlexAttention does that on a GPU
    head_dim: int | None = None  # of queries and keys, where it is not the config's
    causal: bool = True  # False: what comes after is seen too, and a window is as wide to that side (encoders)


class Chunk(NamedTuple):
    """Neighbouring tokens of each of b rows, whose queries see keys of whole rows: the documents that they are in."""

    cu_seqlens: Tensor  # [b * (tokens + 1) + 2] int32: where each document starts among the queries, then their number
    cu_seqlens_k: Tensor  # the same: where its first key lies, so that its last query's own key is its last
    sizes: Tensor  # [3] int64 on the CPU: (an upper bound of) their number; of the queries and the keys of the longest


class Visible(NamedTuple):
    """What the queries of a batch may see in one kind of layer. As it stands: the row up to the query itself.

    Its tensors have the same shapes for every packing of b rows of s tokens, so compiled blocks do not recompile.
    """

    kernel: str = "dense"  # "dense", "flash", "cudnn", "flex" or "cached"
    window: int | None = None  # of the flash kernel; the other kinds hold it in their mask
    cu_seqlens: Tensor | None = None  # [b * s + 1] int32: where each document (chunk) starts in [b * s], then b * s
    sizes: Tensor | None = None  # [2] int64 on the CPU: (an upper bound of) their number and the tokens of the longest
    mask: Tensor | None = None  # dense: [b or 1, 1, s, t] bool
    blocks: BlockMask | None = None  # flex
    shards: TokenShards | None = None  # queries are a part of the rows, keys and values come from the other ranks too
    chunks: tuple[Chunk, ...] = ()  # flash: where the parts of the queries lie
    lengths: Tensor | None = None  # cached: [b] int32, slots of a KV cache up to the row's one query
    cu_seqlens_k: Tensor | None = None  # cached: [b + 1] int32, where each row's slots start
    causal: bool = True


def visible(
    x: Tensor,
    head_dim: int,
    sight: Sight,
    positions: Tensor | None = None,
    documents: Documents | None = None,
    shards: TokenShards | None = None,
) -> Visible:
    """For rows x [b, s, d]. ``positions`` [b, s] tell the packed documents and branches: torchft/documents.py; None:
    one document per row.

    With ``shards``, x holds this rank's tokens of rows of which the positions are whole.

    ``documents``: of the batch; None: read from ``positions``, for which the host waits for the GPU once.
    """
    b, s = x.shape[0], x.shape[1] * (shards.count if shards else 1)
    shared = shards is not None and shards.cp > 1
    window = sight.window if sight.window is not None and sight.window < s else None
    chunk = sight.chunk if sight.chunk is not None and sight.chunk < s else None
    kernel = _kernel(x, head_dim, sight.soft_cap)
    packed = positions is not None or chunk is not None
    if not packed and window is None and kernel != "flex" and not shared:
        return Visible("flash" if kernel == "cudnn" and not sight.causal else kernel, causal=sight.causal)
    if positions is None:
        positions, documents = torch.arange(s, device=x.device).expand(b, s), Documents(b, s)
    if documents is None and not shared:
        documents = count_documents(positions)
    if documents is not None and documents.has_branches:
        assert not shared, "answers that share a prompt are whole on a rank"
        own = branches(positions)
        if kernel == "dense":
            return Visible(kernel, mask=branch_mask(own, window=window, chunk=chunk)[:, None])
        return Visible("flex", blocks=branch_block_mask(own, window, chunk))
    starts = positions == 0 if chunk is None else positions % chunk == 0
    starts[:, 0] = True
    ids = starts.flatten().cumsum(0).view(b, s) - 1  # of the document, counted over the batch
    found = Visible("flash" if kernel == "cudnn" else kernel, window, causal=sight.causal)
    if shards is not None and shared:
        return _narrowed(found, shards, starts, ids, b * s if documents is None else documents[0] + b)
    if packed:
        assert documents is not None
        count, longest, _ = documents
        if chunk is not None:
            count, longest = count + b * s // chunk, min(longest, chunk)
        sizes = torch.tensor([min(count, b * s), min(longest, s)])
        found = found._replace(cu_seqlens=_cu_seqlens(starts.flatten(), ids.flatten()), sizes=sizes)
    if kernel == "dense":
        found = found._replace(
            mask=((ids[:, :, None] == ids[:, None, :]) & _near(s, window, sight.causal, x.device))[:, None]
        )
    elif kernel == "flex":
        found = found._replace(blocks=block_mask(ids, window))
    return found


def visible_in_cache(
    x: Tensor, head_dim: int, sight: Sight, positions: Tensor, num_slots: int, row_slots: int
) -> Visible:
    """For rows x [b, s, d] at ``positions`` [b, s] of a KV cache whose slot number is the position: slots up to their
    own, of the first ``num_slots`` of each row's ``row_slots``."""
    if x.shape[1] == 1 and sight.chunk is None and _kernel(x, head_dim, sight.soft_cap) in ("flash", "cudnn"):
        ends = torch.arange(len(x) + 1, dtype=torch.int32, device=x.device)
        lengths = positions[:, 0].int() + 1
        return Visible("cached", sight.window, ends, lengths=lengths, cu_seqlens_k=ends * row_slots)
    slots = torch.arange(num_slots, device=positions.device)
    delta = positions[:, :, None] - slots
    mask = delta >= 0 if sight.window is None else (delta >= 0) & (delta < sight.window)  # [b, s, slots]
    if sight.chunk is not None:
        mask &= positions[:, :, None] // sight.chunk == slots // sight.chunk
    return Visible(mask=mask[:, None])


def _narrowed(found: Visible, shards: TokenShards, starts: Tensor, ids: Tensor, count: int) -> Visible:
    """What the queries of one context parallel rank see of whole rows, of at most ``count`` documents (and chunks)."""
    if found.kernel == "dense":
        s = ids.shape[1]
        mask = (ids[:, :, None] == ids[:, None, :]) & _near(s, found.window, found.causal, ids.device)  # [b, s, s]
        return found._replace(shards=shards, mask=shards.rows(mask)[:, None])
    assert found.kernel == "flash", "capped scores are refused with context parallel"
    length = ids.shape[1] // (2 * shards.cp)
    chunks = tuple(chunk(starts, begin, length, count) for begin in shards.chunk_starts(ids.shape[1]))
    return found._replace(shards=shards, chunks=chunks)


def chunk(starts: Tensor, begin: int, length: int, count: int) -> Chunk:
    """Tokens [begin, begin + length) of rows whose documents begin at ``starts`` [b, s] bool; ``count`` bounds those.

    A document that began before the chunk brings its earlier keys. Keys that no query sees, before and after, are those
    of documents without queries, so that the kernel's backward gives them zeros.
    """
    b, s = starts.shape
    index = torch.arange(s, device=starts.device)
    row = torch.arange(b, device=starts.device)[:, None]
    first = torch.where(starts[:, : begin + 1], index[: begin + 1], 0).amax(1, keepdim=True)  # of begin's document
    skipped = torch.where(row == 0, 0, (row - 1) * s + begin + length)  # keys from the last row's chunk on
    keys = torch.cat((skipped, row * s + first, row * s + index[begin + 1 : begin + length].expand(b, -1)), dim=1)
    queries = row * length + torch.cat((index[:1], index[:length])).expand(b, -1)
    kept = torch.cat((starts.new_ones(b, 2), starts[:, begin + 1 : begin + length]), dim=1).flatten()
    end = torch.tensor([[(b - 1) * s + begin + length], [b * length]], device=starts.device)  # what follows the last
    kept = torch.cat((kept, kept.new_ones(1)))
    place = torch.where(kept, kept.cumsum(0) - 1, len(kept))  # what is no boundary goes to the last place
    cu_seqlens, cu_seqlens_k = (
        torch.full((len(kept) + 1,), total, dtype=torch.int32, device=starts.device)
        .scatter_(0, place, torch.cat((offsets.flatten(), last)).int())
        .index_fill_(0, torch.tensor([len(kept)], device=starts.device), total)
        for offsets, last, total in ((queries, end[1], b * length), (keys, end[0], b * s))
    )
    sizes = torch.tensor([min(count + 2 * b + 1, len(kept)), length, min(2, b) * s])
    return Chunk(cu_seqlens, cu_seqlens_k, sizes)


def block_mask(ids: Tensor, window: int | None) -> BlockMask:
    """FlexAttention's mask of documents ``ids`` [b, s], which never decrease along a row.

    From the first and last document of each block: s / 128 squared comparisons, where ``create_block_mask`` makes s
    squared.
    """
    s = ids.shape[1]
    num = -(-s // FLEX_BLOCK)
    index = torch.arange(num, device=ids.device)
    first = ids[:, index * FLEX_BLOCK]  # [b, blocks]
    last = ids[:, ((index + 1) * FLEX_BLOCK).clamp(max=s) - 1]
    away = index[:, None] - index  # [q blocks, k blocks]
    some = (away >= 0) & (last[:, None, :] >= first[:, :, None])
    all_ = (away > 0) & (first[:, None, :] == last[:, :, None])
    if window is not None:
        some &= away * FLEX_BLOCK - (FLEX_BLOCK - 1) < window
        all_ &= away * FLEX_BLOCK + (FLEX_BLOCK - 1) < window

    def mask_mod(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (q >= k) & (ids[row, q] == ids[row, k])
        return seen if window is None else seen & (q - k < window)

    return BlockMask.from_kv_blocks(
        *_listed(some & ~all_), *_listed(all_), BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod, seq_lengths=(s, s)
    )


def branch_block_mask(own: Branches, window: int | None, chunk: int | None) -> BlockMask:
    """FlexAttention's mask of rows with branches: blocks of other answers to a prompt are passed over."""
    some, all_ = branch_blocks(own, FLEX_BLOCK, window=window, chunk=chunk)
    s, (documents, runs, positions, forks, trunk) = own.positions.shape[1], own

    def mask_mod(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:  # closes over tensors, as compilers like
        return sees(Branches(documents, runs, positions, forks, trunk), row, q, k, window=window, chunk=chunk)

    return BlockMask.from_kv_blocks(
        *_listed(some & ~all_), *_listed(all_), BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod, seq_lengths=(s, s)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[b, q blocks, k blocks] bool -> how many are set, [b, 1, q blocks], and which, those first; int32."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def _kernel(x: Tensor, head_dim: int, soft_cap: bool) -> str:
    """The fastest kernel that can compute plain rows like x [b, s, d]; fp32 and CPUs have only the dense one."""
    if x.device.type != "cuda" or x.dtype not in (torch.bfloat16, torch.float16) or head_dim % 8 or head_dim > 256:
        return "dense"
    if soft_cap:
        return "flex"
    major, minor = torch.cuda.get_device_capability(x.device)
    if major < 8:
        return "dense"
    lengths = KERNELS.get(f"{major}.{minor}", {}).get(head_dim, [])
    return next((kernel for longest, kernel in lengths if x.shape[1] <= longest), "flash")


def _cu_seqlens(starts: Tensor, ids: Tensor) -> Tensor:
    """[t + 1] int32 from starts [t] bool: the offset of each start, and t in all places after the last one."""
    t = len(starts)
    out = torch.full((t + 2,), t, dtype=torch.int32, device=starts.device)
    place = torch.where(starts, ids, t + 1)  # what is no start goes to the place behind, which is cut off
    return out.scatter_(0, place, torch.arange(t, dtype=torch.int32, device=starts.device))[: t + 1]


def _near(seq_len: int, window: int | None, causal: bool, device: torch.device) -> Tensor:
    index = torch.arange(seq_len, device=device)
    delta = index[:, None] - index[None, :]
    seen = delta >= 0 if causal else torch.ones_like(delta, dtype=torch.bool)
    return seen if window is None else seen & (delta.abs() < window)
