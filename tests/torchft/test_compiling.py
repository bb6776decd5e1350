"""Where compiled code is kept."""

from pathlib import Path

import pytest
import torch

from torchft import compiling


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # not set for the tests that follow


def test_the_users_own_folder_wins(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    assert compiling.prepare() == tmp_path / "mine"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert compiling.prepare().is_relative_to(tmp_path / "torchft" / "compiled")
    assert torch.__version__ in str(compiling.prepare())


@pytest.mark.parametrize("change", ["capability", "flags", "nothing"])
def test_processors_that_are_not_alike_share_no_code(monkeypatch, tmp_path, change):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    before = compiling.prepare()
    if change == "capability":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "VSX")
    if change == "flags":
        monkeypatch.setattr(compiling, "Path", lambda path: tmp_path / "cpuinfo" if "proc" in path else Path(path))
        (tmp_path / "cpuinfo").write_text("processor : 0\nflags : fpu sse2\n")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert (compiling.prepare() == before) is (change == "nothing")
