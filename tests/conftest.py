"""Settings for all tests: GPU tests are skipped without a GPU, and nothing reaches for the network."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    torch.set_num_threads(1)  # models are tiny, and idle threads cost more than they give
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fp32_is_fp32() -> None:
    """On GPUs with TF32 too: trainers of oracles allow it for the whole process."""
    import torch

    torch.set_float32_matmul_precision("highest")


@pytest.fixture(autouse=True)
def _no_tokens_of_earlier_tests(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Data sets are tokenised by each test anew."""
    from torchft.data import cache

    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(cache, "cache_folder", lambda: folder)
