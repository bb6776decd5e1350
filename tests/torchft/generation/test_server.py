"""The HTTP server, asked by OpenAI's own client."""

import json
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import openai
import pytest
import torch
import uvicorn

from torchft import shipped
from torchft.generation.loaded import engine, load
from torchft.generation.requests import Request
from torchft.generation.server import app
from torchft.generation.worker import Worker

QUESTIONS = {'Repeat the word "hello".': "hello", "What is 3 plus 4?": "7", 'Write the word "abc" backwards.': "cba"}


def started(*, num_slots=2):
    model, tokenizer = load(shipped.config_path("demo/base"), dtype=torch.float32, device=torch.device("cpu"))
    worker = Worker(engine(model, tokenizer, num_slots=num_slots, max_len=128))
    worker.tokenizer = tokenizer
    return worker


@pytest.fixture(scope="module")
def worker():
    worker = started(num_slots=4)
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def url(worker):
    with served(worker) as address:
        yield address


@contextmanager
def served(worker):
    config = uvicorn.Config(app(worker, worker.tokenizer, model="demo"), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def client(url):
    return client_of(url)


def client_of(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(client, question, **options):
    options = {"temperature": 0, "max_tokens": 24} | options
    return client.chat.completions.create(model="demo", messages=[{"role": "user", "content": question}], **options)


def test_answers_of_many_at_once(client):
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda q: ask(client, q), [*QUESTIONS] * 3))
    assert [f.choices[0].message.content for f in found] == [*QUESTIONS.values()] * 3
    assert {f.choices[0].finish_reason for f in found} == {"stop"}
    usage = found[0].usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens > usage.completion_tokens > 1


def test_streaming_is_the_same_text_in_pieces(client):
    question = 'Spell the word "streaming".'
    whole = ask(client, question).choices[0].message.content
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ask(client, question, **options))
    pieces = [c.choices[0].delta.content for c in chunks if c.choices]
    assert "".join(pieces) == whole and sum(map(bool, pieces)) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == ask(client, question).usage.completion_tokens


def test_options_reach_the_engine(client):
    question = "Count from 10 to 16."
    seeded = [ask(client, question, temperature=3.0, seed=s, n=2).choices for s in (1, 1, 2)]
    texts = [[choice.message.content for choice in choices] for choices in seeded]
    assert texts[0] == texts[1] != texts[2] and texts[0][0] != texts[0][1]
    cut = ask(client, question, stop=["13"]).choices[0]
    assert cut.message.content == "10 11 12 " and cut.finish_reason == "stop"
    short = ask(client, question, max_tokens=3).choices[0]
    assert short.finish_reason == "length" and short.message.content == "10 "
    greedy = ask(client, question, temperature=3.0, extra_body={"top_k": 1}).choices[0]
    assert greedy.message.content == ask(client, question).choices[0].message.content
    logps = ask(client, question, logprobs=True).choices[0].logprobs.content
    assert "".join(t.token for t in logps[:2]) == "10" and all(t.logprob <= 0 for t in logps)


def test_plain_completions_models_and_health(client, url):
    prompt = '<|user|>Repeat the word "yes".<|end|><|assistant|>'
    found = client.completions.create(model="demo", prompt=prompt, temperature=0, max_tokens=8)
    assert found.choices[0].text == "yes"
    assert [m.id for m in client.models.list()] == ["demo"]
    assert json.load(urllib.request.urlopen(f"{url}/health")) == {"status": "ok"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature: -1 must be at least 0"),
        ({"top_p": 2}, "top_p: 2 must be at most 1"),
        ({"n": 1000}, "n lies between"),
        ({"stop": [""]}, "stop"),
        ({"messages": []}, "no messages"),
        ({"messages": [{"role": "user", "content": "a" * 500}]}, "the prompt has 5.. tokens; between 1 and 127 fit"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "unknown role 'wizard'"),
    ],
)
def test_bad_requests_are_named(client, options, message):
    messages = options.pop("messages", [{"role": "user", "content": "Hi"}])
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(model="demo", messages=messages, **options)


def test_what_is_no_json_is_refused(url):
    request = urllib.request.Request(f"{url}/v1/chat/completions", data=b"{not json", method="POST")
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)


def test_a_client_that_leaves_frees_its_slot(client, worker):
    stream = ask(client, "Count from 10 to 16.", temperature=3.0, max_tokens=100, stream=True, seed=5)
    next(iter(stream))
    stream.close()
    until = time.monotonic() + 5
    while not worker.engine.is_idle and time.monotonic() < until:
        time.sleep(0.01)
    assert worker.engine.is_idle


@pytest.fixture
def failing():
    """A worker whose engine fails in a step, but not before ``go`` is set."""
    broken = started()
    broken.steps, broken.go = threading.Event(), threading.Event()

    def advance():
        broken.steps.set()
        assert broken.go.wait(20)
        return 1 / 0

    broken.engine.advance = advance
    return broken


def test_an_engine_that_fails_is_told_to_all(failing):
    """To a request that came while the step that failed was running, too."""
    told = [threading.Event() for _ in range(2)]
    cancel = failing.submit(Request(prompt=[1]), lambda update: told[0].set() if update is None else None)
    assert failing.steps.wait(5)
    failing.submit(Request(prompt=[1]), lambda update: told[1].set() if update is None else None)
    failing.go.set()
    assert all(event.wait(5) for event in told) and isinstance(failing.error, ZeroDivisionError)
    with pytest.raises(RuntimeError, match="engine has failed"):
        failing.submit(Request(prompt=[1]), print)
    cancel()  # does nothing


@pytest.mark.parametrize("streams", [False, True])
def test_clients_of_an_engine_that_fails_do_not_wait(failing, streams):
    with served(failing) as address:
        threading.Timer(0.5, failing.go.set).start()
        with pytest.raises(openai.APIError, match="engine has failed"):
            list(ask(client_of(address), "Hi", stream=streams))


def test_a_closed_worker_tells_those_who_wait():
    own, told = started(), threading.Event()
    own.engine.advance = lambda: time.sleep(0.1) or []
    own.submit(Request(prompt=[1]), lambda update: told.set() if update is None else None)
    own.close()
    assert told.wait(5)
    with pytest.raises(RuntimeError, match="was closed"):
        own.submit(Request(prompt=[1]), print)
