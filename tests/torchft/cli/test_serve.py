"""``tune serve``: what it refuses at its start, and that it answers."""

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import openai
import pytest

from torchft import shipped
from torchft.cli import serve
from torchft.generation import room

BASE = str(shipped.config_path("demo/base"))


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        (("--num-slots", "0"), ["--num-slots: 0 must be at least 1"]),
        (("--port", "99999"), ["--port: 99999 must be at most 65535"]),
        (("--port=-1",), ["--port: -1 must be at least 0"]),
        (("--max-len", "257"), ["--max-len: 257 is more than the model's context of 256 tokens"]),
        (("--host", "no.such.host.invalid"), ["--host: 'no.such.host.invalid' is no address"]),
        (("--host", "192.0.2.1"), ["of 192.0.2.1 cannot be had"]),
        (
            ("--num-slots", "0", "--port", "99999", "--max-len", "1"),
            ["--num-slots: 0", "--port: 99999", "--max-len: 1"],
        ),
    ],
)
def test_mistakes_are_told_before_the_model_is_read(tune, monkeypatch, words, problems):
    monkeypatch.setattr(serve, "load_model", None)
    code, _, err = tune("serve", BASE, *words)
    assert code == 2 and all(problem in err for problem in problems)


def test_a_port_in_use_is_told_before_the_model_is_read(tune, monkeypatch):
    monkeypatch.setattr(serve, "load_model", None)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, _, err = tune("serve", BASE, "--port", str(port))
    assert code == 2 and f"--port: {port} of 127.0.0.1 cannot be had: Address already in use" in err


def test_two_servers_cannot_wait_for_their_models_at_one_port():
    with serve._bound("127.0.0.1", 0) as first, pytest.raises(serve.UserError, match="already in use"):
        serve._bound("127.0.0.1", first.getsockname()[1])


def test_more_than_fits_is_refused_at_the_start(tune, monkeypatch):
    monkeypatch.setattr(room, "free_memory", lambda device: 2 * 8 * 256 * 8192)
    options = ("--port", "0", "--device", "cpu", "--dtype", "fp32")
    code, _, err = tune("serve", BASE, *options, "--max-len", "256")
    assert code == 2 and "16 answers at a time, each with its question up to 256 tokens" in err and "--num-slots" in err


def test_it_answers_says_its_sizes_and_ends_in_order():
    words = ("serve", BASE, "--port", "0", "--device", "cpu", "--dtype", "fp32", "--name", "demo", "--num-slots", "3")
    env = os.environ | {"PYTHONPATH": str(Path(shipped.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torchft.cli.main", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as server:
        guard = threading.Timer(100, server.kill)
        guard.start()
        said = []
        for line in server.stderr:
            said.append(line)
            if line.startswith("demo answers at "):
                break
        url = said[-1].split()[-1]
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        question = [{"role": "user", "content": "What is 3 plus 4?"}]
        found = client.chat.completions.create(model="demo", messages=question, temperature=0)
        server.send_signal(signal.SIGINT)
        rest = server.communicate(timeout=60)[1]
        guard.cancel()
    assert found.choices[0].message.content == "7" and server.returncode == 0
    assert "3 answers at a time (--num-slots), each up to 256 tokens" in said[-2] and "--max-len" in said[-2]
    assert "Traceback" not in rest
