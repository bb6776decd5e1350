"""Addresses where nodes cannot meet are refused within seconds, with the way out."""

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from processes import free_port
from torch.distributed import TCPStore

from torchft.cli import rendezvous
from torchft.cli.rendezvous import ANSWER_S, WAIT_S, check_rendezvous
from torchft.errors import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def busy():
    """A port of this machine on which something listens that never says a word."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        yield s.getsockname()[1]


@pytest.fixture
def free():
    return free_port()


def refused(options, match):
    began = time.monotonic()
    with pytest.raises(UserError, match=match):
        check_rendezvous(options)
    return time.monotonic() - began


def test_x9_a_port_that_another_program_has(busy, monkeypatch):
    monkeypatch.setattr(rendezvous, "ANSWER_S", 1)
    took = refused({"rdzv-endpoint": f"127.0.0.1:{busy}"}, "no launcher of this job; take a port that is free")
    assert took < 10
    assert refused({"master-addr": "127.0.0.1", "master-port": str(busy)}, "another program has this port") < 1


@pytest.mark.parametrize(
    "options",
    [
        {"rdzv-endpoint": "nowhere.invalid:29500"},
        {"rdzv-endpoint": "192.0.2.1:29500"},  # of no machine: https://datatracker.ietf.org/doc/html/rfc5737
        {"master-addr": "127.0.0.1", "master-port": "FREE", "node-rank": "1"},
    ],
)
def test_x9_an_address_where_nobody_is(options, free, monkeypatch):
    monkeypatch.setattr(rendezvous, "WAIT_S", 1)
    options = {name: value.replace("FREE", str(free)) for name, value in options.items()}
    assert refused(options, r"cannot be reached in 1 s: .* start the first node") < 10


def test_x9_is_said_within_30_s():
    assert WAIT_S + ANSWER_S < 30


ASK = """import sys, torch.distributed
from torchft.cli import rendezvous
rendezvous.ANSWER_S = 30
rendezvous.check_rendezvous(dict(word.split("=") for word in sys.argv[1:]))"""


def asked(*options):
    """In a process of its own, as the command is: it forks, which a process with many threads had better not."""
    subprocess.run([sys.executable, "-c", ASK, *options], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


def test_who_comes_first_listens_and_who_comes_later_finds_it(free):
    meeting = f"rdzv-endpoint=127.0.0.1:{free}"
    asked(meeting)
    asked("master-addr=127.0.0.1", f"master-port={free}", "node-rank=0")
    store = TCPStore("127.0.0.1", free, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=9))
    asked(meeting)
    asked("master-addr=127.0.0.1", f"master-port={free}", "node-rank=1")
    del store


def test_ports_and_what_torchrun_decides_itself():
    refused({"rdzv-endpoint": "node1:http"}, "'http' is no port")
    check_rendezvous({})
    check_rendezvous({"standalone": ""})
    check_rendezvous({"rdzv-backend": "etcd-v2", "rdzv-endpoint": "nowhere.invalid:2379"})


@pytest.mark.parametrize(
    ("endpoint", "conf", "message"),
    [
        ("nowhere.invalid:29500", "read_timeout=1", "--rdzv-endpoint nowhere.invalid:29500 cannot be reached in 1 s"),
        ("127.0.0.1:FREE", "join_timeout=1", "not all nodes came in time"),
    ],
)
def test_x9_on_the_command_line(free, endpoint, conf, message):
    words = ["run", "--nnodes=2", "--nproc-per-node=1", f"--rdzv-endpoint={endpoint.replace('FREE', str(free))}"]
    command = [sys.executable, "-c", "import sys; from torchft.cli.main import main; sys.exit(main())", *words]
    command += [f"--rdzv-conf={conf}", "lora_finetune", "--config", "demo/lora"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and "Traceback" not in ended.stderr, ended.stderr
    assert message in ended.stderr
