"""The metrics file across kills and resumes, and flops, MFU and memory against independent counts."""

import json
import logging
import subprocess
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from torchft.training.metrics import (
    MetricsFile,
    draw_loss,
    flops_per_token,
    mfu,
    peak_flops,
    peak_memory_gib,
    read_rows,
    results,
)


def write(path, steps, **options):
    metrics = MetricsFile(path, **options)
    for step in steps:
        metrics.write({"step": step, "loss": 1 / step})
    metrics.close()


def test_each_step_once_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    with open(path, "a") as f:
        f.write('{"step": 8, "lo')  # killed within a line
    write(path, range(6, 11), resume_step=5)
    assert [row["step"] for row in read_rows(path)] == list(range(1, 11))
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_new_run_starts_with_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    write(path, [1])
    assert read_rows(path) == [{"step": 1, "loss": 1.0}]


def test_rows_are_in_the_file_at_once_and_valid_json(tmp_path):
    metrics = MetricsFile(tmp_path / "m.jsonl")
    metrics.write({"step": 1, "loss": float("nan"), "mfu": None, "grad_norm": float("inf"), "lr": 1e-4})
    text = (tmp_path / "m.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "loss": None,
        "mfu": None,
        "grad_norm": None,
        "lr": 1e-4,
    }


def test_r6_full_disk_costs_one_warning(tmp_path, caplog):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("needs root, to mount a small disk")
    try:
        metrics = MetricsFile(tmp_path / "m.jsonl")
        with caplog.at_level(logging.WARNING):
            for step in range(1, 1000):
                metrics.write({"step": step, "loss": 0.123456789, "note": "x" * 50})
        metrics.close()
        assert caplog.text.count("training goes on without it") == 1 and "No space left" in caplog.text
        assert [row["step"] for row in read_rows(tmp_path / "m.jsonl")][:50] == list(range(1, 51))
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_closing_on_a_full_disk_is_no_crash(tmp_path, caplog):
    metrics = MetricsFile(tmp_path / "m.jsonl")
    metrics._file.close()
    metrics._file = open("/dev/full", "w")  # noqa: SIM115
    metrics.write({"step": 1})
    metrics.close()
    assert "No space left" in caplog.text


@pytest.mark.parametrize("num_steps", [0, 1, 300])
def test_loss_picture(tmp_path, num_steps):
    rows = [{"step": i, "loss": 2 / i} for i in range(1, num_steps + 1)] + [{"step": num_steps, "eval_loss": 1.0}]
    draw_loss(rows, tmp_path / "loss.png", title=r"größe_$\bad$ & <b>")
    assert imread(tmp_path / "loss.png").shape[:2] == (675, 1200)
    assert [p.name for p in tmp_path.iterdir()] == ["loss.png"]


def test_flops_against_torchs_counter():
    """Torch counts attention without the causal mask, so twice ours: here each layer counts as two."""
    b, s, heads, c, layers, dim = 2, 16, 4, 8, 3, 32

    def attend(x):
        x = x.view(b, s, heads, c).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x).transpose(1, 2).reshape(b, s, dim)

    torch.manual_seed(0)
    trained = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(layers))
    frozen = nn.ModuleList(nn.Linear(dim, dim, bias=False).requires_grad_(False) for _ in range(layers))
    for attention in (False, True):
        x = torch.randn(b, s, dim, requires_grad=True)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            h = x
            for one, other in zip(trained, frozen):
                h = other(attend(one(h))) if attention else other(one(h))
            h.sum().backward()
        ours = flops_per_token(
            num_matrix_params=2 * layers * dim * dim,
            num_trainable=layers * dim * dim,
            num_layers=2 * layers if attention else 0,
            attention_dim=dim,
            seq_len=s,
        )
        assert counter.get_total_flops() == ours * b * s


def test_peaks_and_mfu():
    assert peak_flops("NVIDIA H100 80GB HBM3") == peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L40S") == 362e12 and peak_flops("NVIDIA L4") == 121e12
    assert peak_flops("AMD Instinct MI300X") == 1307e12
    assert peak_flops("x86_64 CPU") is None and peak_flops("NVIDIA RTX A4000") is None
    assert mfu(1e4, 6 * 8e9, 989e12) == pytest.approx(0.4853, abs=1e-4)
    assert mfu(1e4, 6 * 8e9, None) is None


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory_of_the_cpu_is_the_kernels():
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    assert peak_memory_gib(torch.device("cpu")) == pytest.approx(int(line.split()[1]) / 2**20, rel=0.01)


def test_results_tell_what_was_held_out_before_and_after(tmp_path):
    """Of a run that went on, what an earlier start has measured; of one without, nothing."""
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    assert "held out" not in results(metrics.path, export="e")
    metrics.write({"step": 0, "eval_loss": 0.69315, "eval_own_divergence": 0.25})
    metrics.write({"step": 5, "loss": 0.5})
    metrics.write({"step": 10, "loss": 0.4, "eval_loss": 0.31234, "eval_own_divergence": 0.1234567})
    found = results(metrics.path, export="e")
    assert found["held out"] == "loss 0.6932, own divergence 0.25; after: loss 0.3123, own divergence 0.1235"
    assert found["export"] == "e" and found["metrics"] == str(metrics.path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "eval_loss": 0.5}\n')
    assert results(metrics.path)["held out"] == "loss 0.5"
