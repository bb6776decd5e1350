"""Adapters that are cast once for many steps: the same bits, live, and given back as they were."""

import pytest
import torch
from families.experts import QWEN3_MOE
from tiny import decoder, tokens

from torchft.adapters.fused import fuse_lora
from torchft.adapters.lora import LoRAConfig, LoRALinear, apply_lora, init_adapters, lora_layers
from torchft.generation import engine as engine_file
from torchft.generation.engine import Engine
from torchft.generation.requests import Request
from torchft.generation.sampling import Sampling

PROMPTS = [tokens(1, n, seed=n, vocab_size=97)[0].tolist() for n in (5, 33, 17)]


def adapted(kind="plain"):
    model = decoder(**(QWEN3_MOE if kind == "experts" else {})).to(torch.bfloat16)
    apply_lora(model, LoRAConfig(rank=4, dora=kind == "dora"))
    fuse_lora(model)
    init_adapters(model)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_b, std=0.3, generator=torch.Generator().manual_seed(1))
    return model.eval()


def answers(engine):
    sampling = Sampling(max_new_tokens=12)
    found = engine.complete([Request(prompt=p, sampling=sampling, seed=i) for i, p in enumerate(PROMPTS)])
    return [(c.tokens, c.logps) for c in found]


class AsTheyAre:
    def __init__(self, model):
        pass

    def used(self):
        return torch.no_grad()


@pytest.mark.parametrize("kind", ["plain", "dora", "experts"])
@pytest.mark.parametrize("compile", [None, "aot_eager"])
def test_answers_are_those_of_the_adapters_as_they_are(monkeypatch, kind, compile):
    model = adapted(kind)
    how = {"num_slots": 2, "max_len": 64, "stop_ids": (), "compile": compile}
    narrow = Engine(model, **how)
    monkeypatch.setattr(engine_file, "NarrowAdapters", AsTheyAre)
    plain = Engine(model, **how)
    seen = []
    parameters = dict(model.named_parameters())
    for _ in range(2):
        found = answers(narrow)
        assert found == answers(plain)
        seen.append(found)
        assert dict(model.named_parameters()) == parameters and all(
            p.dtype == torch.float32 and p.requires_grad for n, p in parameters.items() if "lora_" in n
        )
        with torch.no_grad():
            for n, p in parameters.items():
                if n.endswith("lora_b"):
                    p.mul_(-2)
    assert seen[0] != seen[1]


def test_steps_cast_nothing_more(monkeypatch):
    """What a step reads is narrow already; the copies keep their memory from step to step."""
    model, places = adapted(), []
    layer = model.layers[0].self_attn.o_proj
    inner = LoRALinear.inner
    monkeypatch.setattr(LoRALinear, "inner", lambda own, x: places.append((own, own.lora_a)) or inner(own, x))
    engine = Engine(model, num_slots=2, max_len=64, stop_ids=())
    answers(engine)
    own = [a for module, a in places if module is layer]
    assert len(own) > 12 and {a.dtype for a in own} == {torch.bfloat16} and len({a.data_ptr() for a in own}) == 1
