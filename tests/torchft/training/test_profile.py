"""Traces of the steps that were asked for, and of no others."""

import gzip
import json

import pytest
import torch

from torchft.training import profile
from torchft.training.communication import Communication
from torchft.training.profile import ProfileConfig, profiled


def run(config, folder, steps=8):
    with profiled(config, folder) as end_of_step:
        for i in range(1, steps + 1):
            with torch.profiler.record_function(f"mark {i}"):
                torch.ones(4, 4) @ torch.ones(4, 4)
            end_of_step()


@pytest.mark.parametrize(("first", "steps"), [(2, 1), (4, 2)])
def test_the_trace_holds_the_steps(tmp_path, first, steps, caplog):
    run(ProfileConfig(first_step=first, steps=steps, memory=not torch.cuda.is_available()), tmp_path / "profile")
    events = json.loads(gzip.decompress((tmp_path / "profile" / "trace_rank_00000.json.gz").read_bytes()))[
        "traceEvents"
    ]
    marks = {event["name"] for event in events if event.get("name", "").startswith("mark ")}
    assert marks == {f"mark {i}" for i in range(first, first + steps)}
    assert torch.cuda.is_available() or "profile.memory" in caplog.text


def test_nothing_is_written_without_it_or_before_its_steps(tmp_path):
    run(None, tmp_path / "profile")
    run(ProfileConfig(first_step=7, steps=2), tmp_path / "profile", steps=5)
    assert not (tmp_path / "profile").exists()


def test_shares_of_communication_go_into_the_rows_after_the_profiled_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "communication", lambda profiler: Communication(running=0.3, exposed=0.1))
    with profiled(ProfileConfig(first_step=2, steps=2), tmp_path) as end_of_step:
        rows = [dict(end_of_step()) for _ in range(5)]
    assert rows == [{}, {}] + [{"communication": 0.3, "communication_exposed": 0.1}] * 3
    with profiled(None, tmp_path) as end_of_step:
        assert end_of_step() == {}


@pytest.mark.gpu
def test_memory_is_taken_of_the_same_steps(tmp_path):
    with profiled(ProfileConfig(first_step=2, steps=1, memory=True), tmp_path) as end_of_step:
        for i in range(4):
            torch.ones(1 << (20 + i), device="cuda").sum().item()
            end_of_step()
    assert (tmp_path / "memory_rank_00000.pickle").stat().st_size > 0
