"""The HTTP server, asked by OpenAI's own client."""

import json
import socket
import threading
import time
import urllib.error
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


def started(*, num_slots=2, **how):
    how |= {"dtype": torch.float32, "device": torch.device("cpu")}
    model, tokenizer = load(shipped.config_path("demo/base"), **how)
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
    own = app(worker, worker.tokenizer, model="demo")
    config = uvicorn.Config(own, port=0, log_level="error", log_config=None)  # so that caplog has its errors
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
        ({"n": 1000}, "n: 1000 must be at most 128"),
        ({"stop": [""]}, "stop"),
        ({"messages": []}, "no messages"),
        ({"messages": [{"role": "user", "content": "a" * 500}]}, "the prompt has 5.. tokens; between 1 and 127 fit"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "unknown role 'wizard'"),
        ({"extra_body": {"min_tokens": 5}}, "'min_tokens' is not available.*leave it out"),
        ({"extra_body": {"guided_json": {}}}, "'guided_json' is not available.*leave it out"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls is not available"),
    ],
)
def test_bad_requests_are_named(client, options, message):
    messages = options.pop("messages", [{"role": "user", "content": "Hi"}])
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(model="demo", messages=messages, **options)


def post(url, body, path="chat/completions"):
    """(status, answer) of a body, as it stands or as JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/{path}", data=data, method="POST")) as found:
            return found.status, json.load(found)
    except urllib.error.HTTPError as e:
        return e.code, json.load(e)


HI = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
CALL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"top_logprobs": 3, "logprobs": True}, "top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"presence_penalty": -1}, "presence_penalty"),
        ({"logit_bias": {"5": 100}}, "logit_bias"),
        ({"tools": [CALL]}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": "weather"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -3}, "max_completion_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"n": True}, "n"),
        ({"n": 0}, "n"),
        ({"seed": True}, "seed"),
        ({"seed": 1.0}, "seed"),
        ({"temperature": True}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": -1}, "top_k"),
        ({"stream": "yes"}, "stream"),
        ({"stream": True, "stream_options": [1]}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 3}}, "include_usage"),
        ({"logprobs": 2}, "logprobs"),
        ({"stop": [3]}, "stop"),
        ({"stop": "\ud800"}, "stop"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [3]}, "messages"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"messages": [{"role": "\ud800", "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": 5}]}, "messages"),
    ],
)
def test_what_is_not_done_is_refused_by_name(url, options, param, caplog):
    status, answer = post(url, HI | options)
    assert (status, answer["error"]["type"], answer["error"]["param"]) == (400, "invalid_request_error", param)
    assert param.partition("_")[0] in answer["error"]["message"] or param == "messages"
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"echo": True}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 4}, "best_of"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [448]}, "prompt"),
        ({"prompt": [[1], [-1]]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": ["a"] * 3000}, "prompt"),
        ({"prompt": "a" * 500}, "prompt"),
    ],
)
def test_what_completions_do_not_do_is_refused_by_name(url, options, param):
    status, answer = post(url, {"prompt": "a", "max_tokens": 2} | options, "completions")
    assert (status, answer["error"]["param"]) == (400, param), answer


def test_neutral_values_are_no_wish(url):
    nothing = {"top_logprobs": 0, "response_format": {"type": "text"}, "frequency_penalty": 0.0, "logit_bias": {}}
    nothing |= {"presence_penalty": 0, "tools": [], "stream_options": None, "max_tokens": None, "seed": None}
    nothing |= {"max_completion_tokens": 2, "tool_choice": "none", "logprobs": False, "stop": []}
    assert post(url, HI | nothing)[0] == 200
    nothing = {"echo": False, "best_of": 1, "suffix": "", "logprobs": None}
    assert post(url, nothing | {"prompt": "a", "max_tokens": 2}, "completions")[0] == 200
    assert post(url, HI | {"temperature": 1e-38})[0] == 200  # logits divided by it would not be finite


@pytest.mark.parametrize(
    "body",
    [
        b"{not json",
        b"[1]",
        b"\xff",
        b'{"temperature": NaN}',
        b'{"temperature": Infinity}',
        b'{"temperature": -Infinity}',
        b'{"temperature": 1e999, "messages": [{"role": "user", "content": "a"}]}',
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages": [{"role": "tool", "content": ' + b"[" * 900 + b"]" * 900 + b"}]}",
        b'{"seed": ' + b"1" * 10_000 + b"}",
    ],
)
def test_bodies_that_are_no_request(url, body, caplog):
    status, answer = post(url, body)
    assert status == 400 and answer["error"]["message"] and not caplog.records


def test_tools_that_the_template_knows_are_rendered(tmp_path):
    template = (
        "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}<|user|>{{ m.content }}"
    )
    (tmp_path / "t.jinja").write_text(
        template + "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    own = started(chat_format=str(tmp_path / "t.jinja"))
    with served(own) as address:
        status, answer = post(address, HI | {"tools": [CALL]})
        more = answer["usage"]["prompt_tokens"] - post(address, HI)[1]["usage"]["prompt_tokens"]
        assert status == 200 and more == len(own.tokenizer.encode("weather"))
        left = post(address, HI | {"tools": [CALL], "tool_choice": "none"})[1]["usage"]["prompt_tokens"]
        assert left == answer["usage"]["prompt_tokens"] - more
        broken = post(address, HI | {"tools": [{"function": {"name": "f"}} | {"x": "\ud800"}]})
        assert broken[0] == 400
    own.close()


def test_logprobs_of_a_stream_are_those_of_the_whole(client):
    question = 'Spell the word "streaming".'
    whole = ask(client, question, logprobs=True).choices[0]
    chunks = [c.choices[0] for c in ask(client, question, logprobs=True, stream=True)]
    found = [token for c in chunks if c.logprobs for token in c.logprobs.content]
    assert [(t.token, t.bytes) for t in found] == [(t.token, t.bytes) for t in whole.logprobs.content]
    assert [t.logprob for t in found] == pytest.approx([t.logprob for t in whole.logprobs.content], abs=1e-5)
    assert "".join(t.token for t in found).startswith(whole.message.content) and len(found) > 5
    assert all(c.logprobs is None for c in ask(client, question, stream=True) for c in c.choices)


@pytest.mark.parametrize("streams", [False, True])
def test_logprobs_of_completions_have_their_own_form(client, streams):
    prompt = '<|user|>Spell the word "streaming".<|end|><|assistant|>'
    how = {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 24, "stream": streams}
    found = client.completions.create(**how, logprobs=1)
    choices = [c.choices[0] for c in found] if streams else [found.choices[0]]
    text, own = "".join(c.text for c in choices), [c.logprobs for c in choices if c.logprobs]
    tokens, offsets = ([y for x in own for y in getattr(x, name)] for name in ("tokens", "text_offset"))
    assert "".join(tokens) == text + "<|end|>" and all(x.top_logprobs is None for x in own)
    assert offsets == [len("".join(tokens[:i])) for i in range(len(tokens))] and len(tokens) > 5
    assert all(logp <= 0 for x in own for logp in x.token_logprobs)
    assert client.completions.create(**how | {"stream": False}).choices[0].logprobs is None
    assert client.completions.create(**how | {"stream": False}, logprobs=0).choices[0].logprobs.tokens == tokens


def test_prompts_of_every_form(client, worker):
    words = ("yes", "hello", "abc")
    texts = [f'<|user|>Repeat the word "{word}".<|end|><|assistant|>' for word in words]
    ids = [worker.tokenizer.encode(text) for text in texts]

    def answers(prompt, **more):
        how = {"temperature": 0, "max_tokens": 8} | more
        found = client.completions.create(model="demo", prompt=prompt, **how)
        assert [c.index for c in found.choices] == list(range(len(found.choices)))
        return [c.text for c in found.choices], found.usage

    alone = [answers(text) for text in texts]
    assert [text for text, _ in alone] == [[word] for word in words]
    assert answers(texts)[0] == answers(ids)[0] == [*words]
    assert answers(ids[1])[0] == ["hello"]
    twice, usage = answers(texts, n=2)
    assert twice == ["yes", "yes", "hello", "hello", "abc", "abc"]
    assert usage.prompt_tokens == sum(len(tokens) for tokens in ids) == sum(u.prompt_tokens for _, u in alone)
    chunks = client.completions.create(model="demo", prompt=texts, temperature=0, max_tokens=8, stream=True)
    pieces = {}
    for choice in (chunk.choices[0] for chunk in chunks):
        pieces[choice.index] = pieces.get(choice.index, "") + choice.text
    assert pieces == dict(enumerate(words))


def test_a_model_by_its_name(client, url):
    assert client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="no model 'other', but 'demo'"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="GET /v1/nowhere"):
        client.get("/nowhere", cast_to=object)


def idle(worker):
    """Whether its slots are free within 5 s."""
    until = time.monotonic() + 5
    while not worker.engine.is_idle and time.monotonic() < until:
        time.sleep(0.01)
    return worker.engine.is_idle


@pytest.fixture
def slow():
    """A worker whose engine takes 0.2 s a step, so that an answer of 100 tokens lasts far longer than a test waits."""
    own = started()
    advance = own.engine.advance

    def later():
        time.sleep(0.2)
        return advance()

    own.engine.advance = later
    yield own
    own.close()


def test_a_client_that_leaves_frees_its_slot(slow):
    with served(slow) as address:
        stream = ask(client_of(address), "Count from 10 to 16.", temperature=3.0, max_tokens=100, stream=True, seed=5)
        next(iter(stream))
        stream.close()
        assert idle(slow)


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_client_that_leaves_before_the_whole_answer_frees_its_slots(slow, path):
    """More choices than slots: those that wait go, too."""
    with served(slow) as address:
        body = json.dumps(HI | {"prompt": ["a"] * 8, "temperature": 3.0, "max_tokens": 100, "n": 5}).encode()
        host, port = address.removeprefix("http://").split(":")
        head = f"POST /v1/{path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((host, int(port))) as client:
            client.sendall(head.encode() + body)
            until = time.monotonic() + 5
            while slow.engine.is_idle and time.monotonic() < until:
                time.sleep(0.01)
            assert not slow.engine.is_idle
        assert idle(slow)


def test_a_client_that_leaves_in_its_request_is_no_error(url, caplog, worker):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 99\r\n\r\nabc".encode())
        time.sleep(0.2)
    time.sleep(0.5)
    assert not caplog.records and worker.engine.is_idle


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
