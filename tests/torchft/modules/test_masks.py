"""The descriptions of what may be seen, against their definitions and torch's own block masks."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask

from torchft.modules.attend import attend
from torchft.modules.masks import Sight, Visible, block_mask, chunk, visible, visible_in_cache
from torchft.token_shards import TokenShards


def positions(*lengths):
    return torch.cat([torch.arange(n) for n in lengths])


PACKED = torch.stack((positions(3, 1, 4), positions(7, 1)))


def test_offsets_of_documents():
    seen = visible(torch.zeros(2, 8, 4), 4, Sight(), PACKED)
    assert seen.cu_seqlens.tolist() == [0, 3, 4, 8, 15] + [16] * 12
    assert seen.cu_seqlens.dtype == torch.int32
    assert seen.sizes.tolist() == [5, 7]


def test_offsets_of_single_tokens():
    seen = visible(torch.zeros(2, 3, 4), 4, Sight(), torch.zeros(2, 3, dtype=torch.long))
    assert seen.cu_seqlens.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert seen.sizes.tolist() == [6, 1]


def test_a_row_may_start_inside_a_document():
    seen = visible(torch.zeros(2, 4, 4), 4, Sight(), torch.tensor([[5, 6, 0, 1], [0, 1, 2, 3]]))
    assert seen.cu_seqlens.tolist()[:4] == [0, 2, 4, 8]
    assert seen.sizes.tolist()[0] == 3


def test_chunks_are_documents():
    seen = visible(torch.zeros(2, 8, 4), 4, Sight(chunk=3), PACKED)
    assert seen.cu_seqlens.tolist()[:9] == [0, 3, 4, 7, 8, 11, 14, 15, 16]
    assert seen.sizes[0] >= 8 and seen.sizes[1] == 3


def test_shapes_do_not_depend_on_the_packing():
    a, b = (visible(torch.zeros(2, 8, 4), 4, Sight(chunk=3), p) for p in (PACKED, torch.arange(8).expand(2, -1)))
    shapes = [[x.shape for x in seen if isinstance(x, torch.Tensor)] for seen in (a, b)]
    assert shapes[0] == shapes[1]


def test_plain_rows_need_no_tensors():
    for sight in (Sight(), Sight(window=8), Sight(chunk=8)):
        assert visible(torch.zeros(2, 8, 4), 4, sight) == Visible()


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 400])
@pytest.mark.parametrize("lengths", [(700,), (128, 128, 444), (1, 1, 300, 398), (5,) * 140])
def test_block_mask_is_torchs(lengths, window):
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ids = torch.stack((ids, torch.zeros_like(ids)))

    def mod(b, h, q, k):
        seen = (q >= k) & (ids[b, q] == ids[b, k])
        return seen if window is None else seen & (q - k < window)

    ours, theirs = block_mask(ids, window), create_block_mask(mod, 2, 1, 700, 700, device="cpu")
    assert ours.shape == theirs.shape
    assert torch.equal(ours.to_dense(), theirs.to_dense())  # blocks with anything to see
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        # At the row's end torch calls no block full, as some of its queries do not exist.
        mine, its = getattr(ours, name)[..., :-1], getattr(theirs, name)[..., :-1]
        assert torch.equal(mine, its) or ("q_" in name and (mine - its).abs().max() <= 1), name


def test_cache_slots():
    at = torch.tensor([[4, 5], [0, 1]])
    mask = visible_in_cache(torch.zeros(2, 2, 8), 8, Sight(chunk=4, window=2), at, 7, 7).mask
    want = [[[4], [4, 5]], [[0], [0, 1]]]
    assert [[m.nonzero().flatten().tolist() for m in row] for row in mask[:, 0]] == want


def by_documents(q, k, v, cu_q, cu_k, window):
    """What FlashAttention computes of flat q [t, h, c], k and v [u, h, c]: the last query of a document is at its last
    key. Keys of no document, queries of no document: never."""
    out = torch.full_like(q, float("nan"))
    cu_q, cu_k = cu_q.tolist(), cu_k.tolist()
    assert cu_q[0] == cu_k[0] == 0 and cu_q[-1] == len(q) and cu_k[-1] == len(k)
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        index = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0) - torch.arange(k1 - k0)
        seen = (index >= 0) if window is None else (index >= 0) & (index < window)
        out[q0:q1] = F.scaled_dot_product_attention(
            *(x.transpose(0, 1) for x in (q[q0:q1], k[k0:k1], v[k0:k1])), attn_mask=seen
        ).transpose(0, 1)
    return out


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("lengths", [[[48], [48]], [[1, 30, 2, 15], [24, 24]], [[11, 37], [1] * 48]])
@pytest.mark.parametrize("cp", [2, 3])
def test_chunks_of_a_context_parallel_rank(lengths, window, cp):
    """A rank's two chunks, each by one call of the packed kernel, see what the same rows of the whole mask see."""
    torch.manual_seed(0)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    q, k, v = torch.randn(3, 2, 48, 2, 4, dtype=torch.float64).unbind()
    whole = visible(q.flatten(2), 4, Sight(window), positions)
    want = attend(q, k, v, whole)
    count = sum(len(row) for row in lengths)
    for rank in range(cp):
        shards = TokenShards(cp=cp, cp_rank=rank)
        mask = visible(shards.own(q).flatten(2), 4, Sight(window), positions, shards=shards).mask
        assert torch.equal(mask, shards.rows(whole.mask.transpose(1, 2)).transpose(1, 2))
        for part, begin in zip(shards.rows(q).chunk(2, dim=1), shards.chunk_starts(48)):
            found = chunk(positions == 0, begin, part.shape[1], count)
            n, longest_q, longest_k = found.sizes.tolist()
            assert n <= len(found.cu_seqlens) - 1 and (found.cu_seqlens[n:] == found.cu_seqlens[n]).all()
            assert longest_q >= found.cu_seqlens.diff().max() and longest_k >= found.cu_seqlens_k.diff().max()
            flat = (x.flatten(0, 1) for x in (part, k, v))
            out = by_documents(*flat, found.cu_seqlens[: n + 1], found.cu_seqlens_k[: n + 1], window)
            assert torch.allclose(out.view(part.shape), want[:, begin : begin + part.shape[1]])
