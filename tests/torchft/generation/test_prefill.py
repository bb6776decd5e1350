"""Prefills that are replayed: the same logits and caches as those that are computed, for every family."""

import pytest
import torch
from families import dense, experts
from tiny import transformers_model

from torchft import models
from torchft.cuda_graphs import Graphs
from torchft.generation import prefill
from torchft.generation.engine import Engine
from torchft.generation.prefill import Prefill
from torchft.generation.requests import Request
from torchft.generation.sampling import Sampling
from torchft.modules.grouped import StackedLinear

FAMILIES = dense.CASES | experts.CASES
PROMPTS = [(5, 6, 7), (9, 8, 7, 6, 5, 4, 3, 2, 1), (11,)]


class Again:
    """In place of CUDA graphs: a step that is replayed runs again, and its own memory is overwritten after."""

    def __init__(self):
        self.ran = []

    def run(self, key, step):
        self.ran.append(key)
        step()


@pytest.mark.parametrize("family", ["llama3.2_tied", "gemma3", "gemma4_e2b", "deepseek_v3"])
def test_what_is_replayed_is_what_was_computed(tmp_path, family):
    transformers_model(**FAMILIES[family]).save_pretrained(tmp_path)
    model, graphs = models.load(tmp_path, dtype=torch.float32).eval(), Again()
    replayed, eager = Prefill(model, reach=64, graphs=graphs), Prefill(model, reach=64, graphs=None)
    with torch.no_grad():
        for prompts in (PROMPTS, PROMPTS[::-1], [*PROMPTS, (3, 1)], PROMPTS[:2]):
            logits, cache = replayed(prompts, length=16)
            wanted, others = eager(prompts, length=16)
            torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
            for own, theirs in zip(cache.layers, others.layers, strict=True):
                for x, y in ((own.k, theirs.k), (own.v, theirs.v)):
                    assert (x is None) == (y is None)
                    if x is not None:
                        for row, prompt in enumerate(prompts):
                            torch.testing.assert_close(
                                x[row, : len(prompt)], y[row, : len(prompt)], rtol=1e-5, atol=1e-5
                            )
    assert graphs.ran == [(4, 16), (4, 16)]  # three prompts take four rows; two are another shape, met once


def test_large_ones_are_not_replayed(tmp_path, monkeypatch):
    transformers_model(**FAMILIES["qwen3"]).save_pretrained(tmp_path)
    monkeypatch.setattr(prefill, "GRAPH_TOKENS", 63)
    graphs = Again()
    prompts = Prefill(models.load(tmp_path, dtype=torch.float32).eval(), reach=64, graphs=graphs)
    for _ in range(3):
        prompts(PROMPTS, length=16)
    assert graphs.ran == []


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replays_change_nothing_on_a_gpu(tmp_path, family, dtype):
    transformers_model(**FAMILIES[family]).save_pretrained(tmp_path)
    model = models.load(tmp_path, dtype=dtype).to("cuda").eval()
    requests = [Request(prompt=list(p), sampling=Sampling(max_new_tokens=4, temperature=0.0)) for p in PROMPTS]
    engine = Engine(model, num_slots=3, max_len=32, stop_ids=())
    answers = [engine.complete(requests) for _ in range(3)]
    for again in answers[1:]:
        for one, two in zip(answers[0], again):
            assert one.tokens == two.tokens
            assert torch.allclose(
                torch.tensor(one.logps), torch.tensor(two.logps), atol=0.05 if dtype == torch.bfloat16 else 1e-3
            )
    waits = dtype == torch.float32 and any(isinstance(module, StackedLinear) for module in model.modules())
    is_other = any(layer.state is not None for layer in engine._slots.cache.layers) or family == "gemma2"
    assert isinstance(engine._slots.prompts.graphs, Graphs) != waits
    assert bool(engine._slots.prompts._inputs) != (is_other or waits)
