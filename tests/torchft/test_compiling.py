"""Where compiled code is kept."""

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
