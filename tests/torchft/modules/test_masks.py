"""The descriptions of what may be seen, against their definitions and torch's own block masks."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from torchft.modules.masks import Sight, block_mask, visible, visible_in_cache


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
        assert all(x is None for x in visible(torch.zeros(2, 8, 4), 4, sight)[1:])


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
    mask = visible_in_cache(at, 7, Sight(chunk=4, window=2)).mask
    want = [[[4], [4, 5]], [[0], [0, 1]]]
    assert [[m.nonzero().flatten().tolist() for m in row] for row in mask[:, 0]] == want
