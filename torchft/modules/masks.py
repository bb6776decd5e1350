"""What a query may see: documents in packed rows, windows, chunks, slots of a KV cache; and which kernel computes it.

Computed once per batch outside the compiled blocks and handed to every mixer.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from torchft.modules.attention_table import KERNELS

FLEX_BLOCK = 128  # tokens; FlexAttention's own default


class Sight(NamedTuple):
    """What one kind of layer sees of its document: all that came before, unless narrowed."""

    window: int | None = None  # last tokens, the query's own included
    chunk: int | None = None  # only tokens of the query's chunk; chunks start at positions 0, chunk, 2 chunk, ...
    soft_cap: bool = False  # scores are capped: only FlexAttention does that on a GPU
    head_dim: int | None = None  # of queries and keys, where it is not the config's


class Visible(NamedTuple):
    """What the queries of a batch may see in one kind of layer. As it stands: the row up to the query itself.

    Its tensors have the same shapes for every packing of b rows of s tokens, so compiled blocks do not recompile.
    """

    kernel: str = "dense"  # "dense", "flash", "cudnn" or "flex"
    window: int | None = None  # of the flash kernel; the other kinds hold it in their mask
    cu_seqlens: Tensor | None = None  # [b * s + 1] int32: where each document (chunk) starts in [b * s], then b * s
    sizes: Tensor | None = None  # [2] int64 on the CPU: (an upper bound of) their number and the tokens of the longest
    mask: Tensor | None = None  # dense: [b or 1, 1, s, t] bool
    blocks: BlockMask | None = None  # flex


def visible(
    x: Tensor, head_dim: int, sight: Sight, positions: Tensor | None = None, documents: tuple[int, int] | None = None
) -> Visible:
    """For rows x [b, s, d]. ``positions`` [b, s] restart at 0 with each packed document; None: one document per row.

    ``documents``: how many the batch holds and the tokens of the longest. None: read from ``positions``, for which the
    host waits for the GPU once.
    """
    b, s = x.shape[:2]
    window = sight.window if sight.window is not None and sight.window < s else None
    chunk = sight.chunk if sight.chunk is not None and sight.chunk < s else None
    kernel = _kernel(x, head_dim, sight.soft_cap)
    packed = positions is not None or chunk is not None
    if not packed and window is None and kernel != "flex":
        return Visible(kernel)
    if positions is None:
        positions, documents = torch.arange(s, device=x.device).expand(b, s), (b, s)
    starts = positions == 0 if chunk is None else positions % chunk == 0
    starts[:, 0] = True
    ids = starts.flatten().cumsum(0).view(b, s) - 1  # of the document, counted over the batch
    found = Visible("flash" if kernel == "cudnn" else kernel, window)
    if packed:
        if documents is None:
            documents = count_documents(positions)
        count, longest = documents
        if chunk is not None:
            count, longest = count + b * s // chunk, min(longest, chunk)
        sizes = torch.tensor([min(count, b * s), min(longest, s)])
        found = found._replace(cu_seqlens=_cu_seqlens(starts.flatten(), ids.flatten()), sizes=sizes)
    if kernel == "dense":
        found = found._replace(mask=((ids[:, :, None] == ids[:, None, :]) & _causal(s, window, x.device))[:, None])
    elif kernel == "flex":
        found = found._replace(blocks=block_mask(ids, window))
    return found


def visible_in_cache(positions: Tensor, num_slots: int, sight: Sight) -> Visible:
    """For queries at ``positions`` [b, s] of a KV cache whose slot number is the position: slots up to their own."""
    slots = torch.arange(num_slots, device=positions.device)
    delta = positions[:, :, None] - slots
    mask = delta >= 0 if sight.window is None else (delta >= 0) & (delta < sight.window)  # [b, s, slots]
    if sight.chunk is not None:
        mask &= positions[:, :, None] // sight.chunk == slots // sight.chunk
    return Visible(mask=mask[:, None])


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


def count_documents(positions: Tensor) -> tuple[int, int]:
    """How many documents rows with these ``positions`` [b, s] hold, and the tokens of the longest. The host waits."""
    starts = positions == 0
    starts[:, 0] = True
    count, longest = torch.stack((starts.sum(), positions.max() + 1)).tolist()
    return count, longest


def _cu_seqlens(starts: Tensor, ids: Tensor) -> Tensor:
    """[t + 1] int32 from starts [t] bool: the offset of each start, and t in all places after the last one."""
    t = len(starts)
    out = torch.full((t + 2,), t, dtype=torch.int32, device=starts.device)
    place = torch.where(starts, ids, t + 1)  # what is no start goes to the place behind, which is cut off
    return out.scatter_(0, place, torch.arange(t, dtype=torch.int32, device=starts.device))[: t + 1]


def _causal(seq_len: int, window: int | None, device: torch.device) -> Tensor:
    index = torch.arange(seq_len, device=device)
    delta = index[:, None] - index[None, :]
    return delta >= 0 if window is None else (delta >= 0) & (delta < window)
