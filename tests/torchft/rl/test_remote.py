"""The client of a vLLM server, against a stub of it: the built-in engine's answers, and every way to fail."""

import math
import time

import pytest
import torch
from vllm_stub import Refused, served

from torchft import shipped
from torchft.errors import UserError
from torchft.generation.loaded import engine, load
from torchft.generation.requests import Request
from torchft.generation.sampling import Sampling
from torchft.rl import remote
from torchft.rl.remote import RemoteEngine, ServerConfig

BASE = shipped.config_path("demo/base")


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.02)
    with served(BASE) as stub:
        yield stub


@pytest.fixture(scope="module")
def local():
    model, tokenizer = load(BASE, dtype=torch.float32, device=torch.device("cpu"))
    return engine(model, tokenizer, num_slots=4, max_len=64), tokenizer


def client(stub, tokenizer, *, patience_s=5.0, max_len=64, temperature=1.5, url=None):
    config = ServerConfig(url=url or stub.url, patience_s=patience_s)
    about = {"num_slots": 3, "max_len": max_len, "stop_ids": tokenizer.stop_ids, "temperature": temperature}
    return RemoteEngine(config, lambda **_: BASE, adapters=False, **about)


def questions(tokenizer, sampling, count=6):
    words = ["hello", "What is 3 plus 4?", "a", "green red", "12", "x" * 40][:count]
    prompts = [tokenizer.render([{"role": "user", "content": w}], add_generation_prompt=True).tokens for w in words]
    return [Request(prompt=p, sampling=sampling, seed=i << 40) for i, p in enumerate(prompts)]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.5, max_new_tokens=12),
        Sampling(temperature=0.0, max_new_tokens=5),
        Sampling(temperature=3.0, top_k=3, max_new_tokens=12),
        Sampling(temperature=3.0, top_p=0.7, max_new_tokens=12),
        Sampling(temperature=3.0, min_p=0.2, repetition_penalty=1.5, max_new_tokens=12),
        Sampling(temperature=0.0, max_new_tokens=12, stop=["l", "7"]),
    ],
)
def test_answers_are_those_of_the_built_in_engine(stub, local, sampling):
    own, tokenizer = local
    requests = [*questions(tokenizer, sampling), Request(prompt=[5] * 64, sampling=sampling)]
    ours, theirs = client(stub, tokenizer).complete(requests), own.complete(requests)
    assert [c.tokens for c in ours] == [c.tokens for c in theirs]
    assert [c.finish for c in ours] == [c.finish for c in theirs] and ours[-1].finish == "too_long"
    assert torch.allclose(*(torch.tensor([x for c in found for x in c.logps]) for found in (ours, theirs)), atol=1e-5)


def test_a_server_that_is_back_in_time_is_asked_again_and_counted(stub, local, caplog):
    own = client(stub, local[1])
    stub.failures = 4
    found = own.complete(questions(local[1], Sampling(max_new_tokens=3)))
    assert len(found) == 6 and own.num_retries == 4
    assert "503: overloaded; asking again for 5 s" in caplog.text and len(caplog.records) == 1


def test_adapters_that_were_loaded_at_the_first_try(stub, local):
    """The answer was lost; asked again, the server says that it has them."""
    config = ServerConfig(url=stub.url, patience_s=5.0)
    about = {"num_slots": 3, "max_len": 64, "stop_ids": local[1].stop_ids, "temperature": 1.5}
    own = RemoteEngine(config, lambda **_: BASE, adapters=True, **about)
    stub.on_v1_load_lora_adapter = lambda body: (
        stub.models.setdefault(body["lora_name"], stub.models["demo"]) and refuse()
    )

    def refuse():
        raise Refused(400, "The lora adapter 'x' has already been loaded.")

    own.update()
    assert len(own.complete(questions(local[1], Sampling(max_new_tokens=3)))) == 6


def test_a_failure_whose_text_is_cut_off_is_asked_again(stub, local):
    own = client(stub, local[1])
    stub.failures, stub.cuts = 2, True
    assert len(own.complete(questions(local[1], Sampling(max_new_tokens=3)))) == 6 and own.num_retries == 2


def test_a_server_that_is_gone_is_named(stub, local):
    own = client(stub, local[1], patience_s=0.3)
    stub.failures = 10**6
    began = time.monotonic()
    with pytest.raises(UserError, match=r"/v1/completions answers 503: overloaded, asked again for 0.3 s. Start it, "):
        own.complete(questions(local[1], Sampling(max_new_tokens=3)))
    assert time.monotonic() - began < 3 and own.num_retries
    with pytest.raises(UserError, match=r"rollout.server: http://127.0.0.1:9/v1/models answers .*refused"):
        client(stub, local[1], patience_s=0.1, url="http://127.0.0.1:9")


def test_what_a_server_says_is_final_is_not_asked_again(stub, local):
    own = client(stub, local[1])
    stub.models.clear()  # restarted without what was sent
    with pytest.raises(UserError, match="404: The model `demo` does not exist"):
        own.complete(questions(local[1], Sampling(max_new_tokens=3), count=1))
    assert own.num_retries == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda choice: choice.pop("token_ids"), "lack token ids"),
        (lambda choice: choice.update(logprobs=None), "lack token ids or their log-probabilities"),
        (lambda choice: choice["token_ids"].append(1), "lack token ids"),
        (lambda choice: choice.update(finish_reason="abort"), "an answer ended with 'abort'"),
    ],
)
def test_answers_that_cannot_be_used(stub, local, change, message):
    own = client(stub, local[1])
    stub.change = change
    with pytest.raises(UserError, match=message):
        own.complete(questions(local[1], Sampling(max_new_tokens=3), count=1))


@pytest.mark.parametrize("bad", [None, math.nan])
def test_log_probabilities_that_are_none(stub, local, bad):
    own = client(stub, local[1])
    asked = questions(local[1], Sampling(max_new_tokens=3))[1:2]
    [want] = own.complete(asked)
    stub.change = lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(-1, bad)
    [found] = own.complete(asked)
    assert (found.tokens, found.logps, found.finish) == (want.tokens[:-1], want.logps[:-1], "not_finite")


def test_a_server_that_does_not_fit_is_refused(stub, local):
    with pytest.raises(UserError, match="its --max-model-len 256 is less than seq_len 300"):
        client(stub, local[1], max_len=300)
    stub.ignores_temperature = True
    client(stub, local[1], temperature=1.0)
    with pytest.raises(UserError, match=r"temperature 1.5: start it with --logprobs-mode processed_logprobs"):
        client(stub, local[1], temperature=1.5)
