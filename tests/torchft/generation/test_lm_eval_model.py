"""The harness's requests, answered; needs lm-eval (extra eval)."""

import pytest
import torch

from torchft import shipped
from torchft.generation.loaded import load
from torchft.generation.multiple_choice import continuation_logps

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance

from torchft.generation.lm_eval_model import EngineLM


@pytest.fixture(scope="module")
def lm():
    model, tokenizer = load(shipped.config_path("demo/base"), dtype=torch.float32, device=torch.device("cpu"))
    return EngineLM(model, tokenizer, max_len=64, batch_size=4, num_slots=4)


def ask(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def test_loglikelihood_is_of_the_continuation_with_its_space(lm):
    encode = lm._tokenizer.encode
    found = lm.loglikelihood(ask("loglikelihood", ("Repeat the", " word"), ("Repeat the ", "word"), ("", "word")))
    pair = encode("Repeat the"), encode(" word")
    [want] = continuation_logps(lm._model, [pair], batch_size=1)
    assert found[0] == found[1] == pytest.approx(want)
    assert found[2][0] < 0


def test_rolling_counts_every_token_once(lm):
    text = "Repeat the word. " * 32
    [found] = lm.loglikelihood_rolling(ask("loglikelihood_rolling", (text,)))
    tokens = [lm._first(), *lm._tokenizer.encode(text)]
    assert len(tokens) > 128
    want = sum(
        continuation_logps(lm._model, [(tokens[i : i + 1], tokens[i + 1 : i + 64])], batch_size=1)[0][0]
        for i in range(0, len(tokens) - 1, 63)
    )
    assert found == pytest.approx(want, rel=1e-5)


def test_generation_stops_where_it_is_told(lm):
    prompt = '<|user|>Spell the word "cat".<|end|><|assistant|>'
    options = {"until": ["a"], "max_gen_toks": 10}, {"until": [], "max_gen_toks": 10}, {"until": [], "max_gen_toks": 1}
    assert lm.generate_until(ask("generate_until", *((prompt, o) for o in options))) == ["c-", "c-a-t", "c"]
