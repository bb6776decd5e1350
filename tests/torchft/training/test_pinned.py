"""Pinned memory: zeros, known to CUDA as long as a view of it lives, and no longer."""

import pytest
import torch

from torchft.training.pinned import pinned_zeros


class Runtime:
    """CUDA's, as far as it is asked."""

    def __init__(self, error=0):
        self.error, self.locked = error, {}

    def cudaHostRegister(self, address, nbytes, flags):
        if not self.error:
            self.locked[address] = nbytes
        return self.error

    def cudaHostUnregister(self, address):
        del self.locked[address]


@pytest.fixture
def runtime(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return runtime


def test_locked_as_long_as_a_view_lives(runtime):
    x = pinned_zeros(3, 5, dtype=torch.bfloat16)
    assert x.shape == (3, 5) and x.dtype == torch.bfloat16 and not x.any()
    assert list(runtime.locked.items()) == [(x.data_ptr(), 30)]
    view = x[1:].float(), x[2:]
    del x
    view[1].add_(1)
    assert runtime.locked and view[1].sum() == 5
    del view
    assert not runtime.locked


def test_no_bytes_and_no_memory(runtime):
    assert pinned_zeros(0, 4, dtype=torch.float32).shape == (0, 4)
    assert pinned_zeros(dtype=torch.float32).shape == ()
    assert not runtime.locked
    runtime.error = 2
    with pytest.raises(torch.OutOfMemoryError, match=r"no 0\.0 GiB of memory to pin: 2"):
        pinned_zeros(8, dtype=torch.uint8)


@pytest.mark.gpu
def test_cuda_takes_it_for_pinned():
    x = pinned_zeros(1 << 20, dtype=torch.float32)
    assert x.is_pinned() and x[5:].is_pinned()
    on_gpu = torch.randn(1 << 20, device="cuda")
    x.copy_(on_gpu, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(x, on_gpu.cpu())
    small = [pinned_zeros(3, dtype=torch.uint8) for _ in range(5)]  # pages of their own: none is locked twice
    assert all(s.is_pinned() for s in small)
    del x, small
    torch.zeros(4, device="cuda").sum().item()  # and no error is left behind
