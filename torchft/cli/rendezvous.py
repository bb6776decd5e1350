"""Whether the address where nodes meet can be reached, before torchrun tries for minutes and ends in a traceback."""

import errno
import multiprocessing
import os
import socket
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from datetime import timedelta

from torchft.errors import UserError

WAIT_S = 20  # for the first node to start; rdzv-conf's read_timeout is another
ANSWER_S = 5  # for whatever listens there to answer as a node does
PORT = 29500  # torchrun's default


def check_rendezvous(options: Mapping[str, str]) -> None:
    """UserError if ``options``, torchrun's by name, say to meet where nobody can. Within WAIT_S + ANSWER_S seconds."""
    if "standalone" in options:
        return  # torchrun then meets on a free port of this machine, whatever else is said
    conf = dict(pair.split("=", 1) for pair in options.get("rdzv-conf", "").split(",") if "=" in pair)
    wait_s = float(conf.get("read_timeout", WAIT_S))
    if "rdzv-endpoint" in options and options.get("rdzv-backend", "c10d") == "c10d":
        host, _, port = options["rdzv-endpoint"].rpartition(":")
        if not host:
            host, port = options["rdzv-endpoint"], str(PORT)
        _reach(host.strip("[]"), port, "--rdzv-endpoint", is_first=None, wait_s=wait_s)
    elif "master-addr" in options or "master-port" in options:
        host, port = options.get("master-addr", "127.0.0.1"), options.get("master-port", str(PORT))
        _reach(host, port, "--master-addr", is_first=options.get("node-rank", "0") == "0", wait_s=wait_s)


def _reach(host: str, port: str, name: str, *, is_first: bool | None, wait_s: float) -> None:
    """``is_first``: whether this node is to listen there; None: if the address is this machine's and nobody does."""
    if not port.isdigit():
        raise UserError(f"{name}: {port!r} is no port; write host:port, such as node1:{PORT}")
    where, problem = f"{name} {host}:{port}", _listening(host, int(port))
    if problem is None and is_first is not False:
        return  # torchrun listens there
    if is_first and problem == errno.EADDRINUSE:
        raise UserError(f"{where}: another program has this port on this machine; take another, the same on all nodes")
    deadline, why = time.monotonic() + wait_s, "nobody listens there"
    while time.monotonic() < deadline:
        try:
            with closing(socket.create_connection((host, int(port)), timeout=deadline - time.monotonic())):
                break
        except OSError as e:
            why = e.strerror or str(e)
            time.sleep(min(0.5, max(0.0, deadline - time.monotonic())))
    else:
        raise UserError(
            f"{where} cannot be reached in {wait_s:g} s: {why}. It must be the first node's address, which all nodes "
            "can reach, and the same on all; start the first node, or wait longer for it: --rdzv-conf=read_timeout=600"
        )
    if not _answers(host, int(port)):
        raise UserError(
            f"{where}: what listens there is no launcher of this job; take a port that is free on that host"
        )


def _listening(host: str, port: int) -> int | None:
    """None if this machine could listen there, else the error's number: EADDRNOTAVAIL if it is another's address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(address)
    except OSError as e:
        return e.errno
    return None


def _answers(host: str, port: int) -> bool:
    """Whether it is a store of torch. Asked by a process that can be ended: in C++, where something listens and says
    nothing, a store waits for ever, whatever its time-out."""
    asking = multiprocessing.get_context("fork").Process(target=_ask, args=(host, port))
    asking.start()
    asking.join(ANSWER_S)
    asking.kill()
    return asking.exitcode == 0


def _ask(host: str, port: int) -> None:
    from torch.distributed import TCPStore

    with suppress(RuntimeError):  # torch's errors of the network are RuntimeErrors
        TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=ANSWER_S))
        os._exit(0)
    os._exit(1)
