"""``tune serve``: a model over HTTP, in OpenAI's form, on this machine alone unless ``--host`` says otherwise."""

import socket
import sys
from contextlib import suppress
from pathlib import Path

from torchft.cli.arguments import Parser
from torchft.cli.model_options import add_model_options, load_model, model_problems, range_problems
from torchft.config import Range
from torchft.errors import UserError, collecting
from torchft.generation.loaded import engine, warm_up
from torchft.generation.room import gib, longest_slots
from torchft.generation.worker import Worker

RANGES = {"num_slots": Range(min=1), "max_len": Range(min=2), "port": Range(min=0, max=65535)}


def main(arguments: list[str]) -> None:
    """``tune serve CHECKPOINT [--port 8000]``"""
    parser = Parser("serve", "Answer OpenAI-compatible requests: http://127.0.0.1:8000/v1. There is no password.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a Hub folder, such as a run's export/")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets every machine that reaches this one ask")
    parser.add_argument("--port", type=int, default=8000, help="0: one that is free")
    parser.add_argument("--name", help="of the model, for clients; default: the folder's")
    parser.add_argument("--num-slots", type=int, default=16, help="answers that are computed together")
    add_model_options(parser)
    given = parser.parse(arguments)
    try:
        import uvicorn

        from torchft.generation.server import app
    except ImportError as e:
        raise UserError(f"tune serve needs {e.name}: pip install 'torchft-recipes[serve]'") from None
    problems = [*range_problems(given, RANGES), *model_problems(given)]
    with collecting(problems):
        door = _bound(given.host, given.port if 0 <= given.port <= 65535 else 0)  # before minutes of loading
    if problems:
        raise UserError(*problems)
    with door:
        model, tokenizer = load_model(given)
        if not tokenizer.has_chat:
            raise UserError(f"{given.checkpoint} has no chat template: name a format with --chat-format")
        max_len, need = longest_slots(model, num_slots=given.num_slots, asked=given.max_len)
        slots = engine(model, tokenizer, num_slots=given.num_slots, max_len=max_len, compile=given.compile)
        if given.compile:  # now, while nobody waits
            warm_up(slots)
        name = given.name or given.checkpoint.resolve().name
        host, port = door.getsockname()[:2]
        print(
            f"{given.num_slots} answers at a time (--num-slots), each up to {max_len:,} tokens with its question "
            f"(--max-len; the model's context is {model.config.max_seq_len:,}): "
            f"{gib(need.cache(given.num_slots, max_len))} of cache\n"
            f"{name} answers at http://{f'[{host}]' if ':' in host else host}:{port}/v1",
            file=sys.stderr,
            flush=True,
        )
        worker = Worker(slots)
        server = uvicorn.Server(uvicorn.Config(app(worker, tokenizer, model=name), log_level="info"))
        with suppress(KeyboardInterrupt):  # raised again behind an orderly end
            server.run(sockets=[door])
        worker.close()


def _bound(host: str, port: int) -> socket.socket:
    """A socket that listens; who connects before there is a model waits. UserError if the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host: {host!r} is no address of this machine") from None
    door = socket.socket(family, kind, protocol)
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just ended is no hindrance
        door.bind(address)
        door.listen()  # two that only bind could have the same port
    except OSError as e:
        door.close()
        way = "name another --port, or 0 for one that is free" if port else "name another --host"
        raise UserError(f"--port: {port} of {host} cannot be had: {e.strerror}; {way}") from None
    return door
