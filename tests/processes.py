"""Functions of a test run as the ranks of a job: processes of one machine that talk through gloo."""

import faulthandler
import importlib.util
import multiprocessing
import os
import pickle
import queue
import random
import socket
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

NEEDS_TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
TWO_GPUS = [pytest.mark.gpu, NEEDS_TWO_GPUS]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed.tensor", "torch.distributed.fsdp", "torch._dynamo"])


def run_ranks(function, size, *args, timeout_s=240, grace_s=0, env=None):
    """``function(*args)`` as each of ``size`` ranks, with torchrun's variables; what they returned, by rank.

    ``function`` is one of a test module's own. Each is told to initialise the process group itself (env://). The first
    error of any rank is raised here, and the others are killed, if they do not end within ``grace_s``.
    """
    found, deadline = {}, time.monotonic() + timeout_s
    with started(function, size, *args, env=env) as (ranks, results):
        try:
            while len(found) < size:
                try:
                    rank, ok, value = results.get(timeout=1)
                except queue.Empty:
                    dead = [r for r, p in enumerate(ranks) if r not in found and p.exitcode not in (None, 0)]
                    codes = [f"rank {r} ended with exit code {ranks[r].exitcode}" for r in dead]
                    what = [f"{code}\n{_stacks(ranks[r].pid)}" for code, r in zip(codes, dead)]
                    assert not dead, "\n".join(what)
                    late = set(range(size)) - set(found)
                    assert time.monotonic() < deadline, f"ranks {late} did not end in {timeout_s} s"
                    continue
                assert ok, f"rank {rank}:\n{value}"
                found[rank] = pickle.loads(value)
        finally:
            for process in ranks:
                process.join(timeout=5 if len(found) == size else grace_s)
    return [found[r] for r in range(size)]


@contextmanager
def started(function, size, *args, env=None):
    """Processes that do it, by rank, and the queue of (rank, whether all went well, what was returned or raised).

    They meet at a store of this process, as torchrun's do. A port that is free now and bound by rank 0 seconds later,
    when it has imported torch, would be another test's by then, once in some runs. Whoever is left is killed.
    """
    results = _CONTEXT.Queue()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), **(env or {})}
    env |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    where = Path(sys.modules[function.__module__].__file__), function.__name__
    ranks = [
        _CONTEXT.Process(
            target=_run,
            args=(where, pickle.dumps(args), results, env | {"RANK": str(r), "LOCAL_RANK": str(r)}),
            daemon=True,
        )
        for r in range(size)
    ]
    for process in ranks:
        process.start()
    try:
        yield ranks, results
    finally:
        for process in ranks:
            process.kill()
            _stacks_file(process.pid).unlink(missing_ok=True)


def free_port():
    """A port for a program that a test starts: below those that connections get unasked, so none of them takes it."""
    for port in random.Random().sample(range(20_000, 32_768), 100):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")


def _run(where, args, results, env):
    os.environ.update(env)
    torch.set_num_threads(1)
    faulthandler.enable(_stacks_file(os.getpid()).open("w"))
    tests = Path(__file__).parent
    sys.path[:0] = [str(tests), str(tests.parent)]
    path, name = where
    try:
        spec = importlib.util.spec_from_file_location(f"ranks_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        results.put((int(env["RANK"]), True, pickle.dumps(getattr(module, name)(*pickle.loads(args)))))
    except BaseException:  # whatever it is, the test shall show it
        results.put((int(env["RANK"]), False, traceback.format_exc()))
        raise


def _stacks(pid):
    return _stacks_file(pid).read_text() if _stacks_file(pid).exists() else ""


def _stacks_file(pid):
    """Where a process writes what it was doing when it crashed in compiled code."""
    return Path(tempfile.gettempdir()) / f"torchft_tests_stacks_{pid}.txt"
