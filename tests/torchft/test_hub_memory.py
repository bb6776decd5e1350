"""Host memory of loading and export by ranks: real shards, measured by the kernel."""

import ctypes
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from torchft import hub, models, ranks

SHARD = 104_000_000  # bytes; four of them, of tensors of 8 MB
M_MMAP_THRESHOLD = -3
SIZES = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 999, "hidden_size": 1024,
    "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 8, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def build():
    return models.build(SIZES).to(torch.bfloat16)


def status(key):
    """Bytes, of this process: VmRSS now, VmHWM at most since `reset`."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def peak_of(action):
    """By how much the resident memory grew at most, pages of mapped files included."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = status("VmRSS")
    action()
    return status("VmHWM") - before


def load_and_export(folder):
    # malloc keeps some of what is freed in pieces under 32 MB, and nothing of larger ones, for which ours stand
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    dist.init_process_group("gloo")
    model, mesh = build(), init_device_mesh("cpu", (ranks.num_ranks(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")  # no page of it is there yet
    own = sum(ranks.local(p).nbytes for p in model.parameters())
    loading = peak_of(lambda: hub.load_weights(model, folder / "model"))
    exporting = peak_of(lambda: hub.save(model, folder / "again", shard_bytes=SHARD))
    return own, loading, exporting


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_r1_ranks_hold_their_part_and_one_shard(tmp_path):
    model = build().to_empty(device="cpu")
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.fill_(i)
    hub.save(model, tmp_path / "model", shard_bytes=SHARD)
    total = sum(p.nbytes for p in model.parameters())
    del model
    shards = sorted(f.stat().st_size for f in (tmp_path / "model").glob("*.safetensors"))
    assert len(shards) == 4 and shards[-1] > 95e6
    for own, loading, exporting in run_ranks(load_and_export, 2, tmp_path):
        print(f"{own / 1e6:.0f} MB own, loading {loading / 1e6:.0f}, export {exporting / 1e6:.0f}")
        assert 0.49 * total < own < 0.51 * total
        assert own <= loading < own + 1.2 * shards[-1]
        assert exporting < 1.2 * shards[-1]
    for file in (tmp_path / "model").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
