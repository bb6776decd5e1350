"""An OpenAI-compatible HTTP server on the engine: /v1/chat/completions, /v1/completions, /v1/models, /health.

https://platform.openai.com/docs/api-reference/chat; Starlette and uvicorn come with the extra ``serve``.
"""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from torchft.generation.asked import Asked, Json, Refused, asked, parse
from torchft.generation.choices import FINISH, Choice, Piece, logps_of
from torchft.generation.worker import Worker
from torchft.tokenizers.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_BODY = 16 * 2**20  # bytes of a request
GONE = 499  # nginx's status of a request whose client has left; nobody reads it


def app(worker: Worker, tokenizer: Tokenizer, *, model: str) -> Starlette:
    """``model``: the name that clients see."""
    about = {"id": model, "object": "model", "created": int(time.time()), "owned_by": "torchft"}

    async def models(_: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [about]})

    async def one_model(http: HTTPRequest) -> Response:
        if (name := http.path_params["name"]) != model:
            return _error(Refused(f"there is no model {name!r}, but {model!r}", 404, param="model"))
        return JSONResponse(about)

    async def health(_: HTTPRequest) -> Response:
        return JSONResponse(
            {"status": "ok" if worker.error is None else "failed"}, 200 if worker.error is None else 503
        )

    async def chat(http: HTTPRequest) -> Response:
        return await _answered(http, worker, tokenizer, model, is_chat=True)

    async def plain(http: HTTPRequest) -> Response:
        return await _answered(http, worker, tokenizer, model, is_chat=False)

    async def no_route(http: HTTPRequest, e: Exception) -> Response:
        assert isinstance(e, HTTPException)
        return _error(Refused(f"{http.method} {http.url.path}: {e.detail}", e.status_code), headers=e.headers)

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", plain, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/health", health),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: no_route})


async def _answered(http: HTTPRequest, worker: Worker, tokenizer: Tokenizer, model: str, *, is_chat: bool) -> Response:
    engine = worker.engine
    try:
        body = parse(await _body(http))
        sizes = {"max_len": engine.max_len, "vocab_size": engine.model.config.vocab_size}
        found = asked(body, tokenizer, **sizes, is_chat=is_chat)
        if worker.error is not None:
            raise Refused("the engine has failed or was closed", 503)
        about = {"id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}", "created": int(time.time())}
        about |= {"model": model, "object": "chat.completion" if is_chat else "text_completion"}
        choices = [Choice(request, worker, tokenizer) for request in found.requests]
        if found.is_streamed:
            return StreamingResponse(_events(about, choices, found, is_chat=is_chat), media_type="text/event-stream")
        whole = await _unless_gone(http, _whole(about, choices, found, is_chat=is_chat))
        return Response(status_code=GONE) if whole is None else JSONResponse(whole)
    except ClientDisconnect:  # before its request was whole
        return Response(status_code=GONE)
    except Refused as e:
        return _error(e)


async def _body(http: HTTPRequest) -> bytearray:
    raw = bytearray()
    async for part in http.stream():
        raw += part
        if len(raw) > MAX_BODY:
            raise Refused(f"the request is larger than {MAX_BODY >> 20} MiB", 413)
    return raw


async def _unless_gone(http: HTTPRequest, answer: Coroutine[Any, Any, Json]) -> Json | None:
    """None if the client leaves, for whom nothing is computed any more."""

    async def left() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.create_task(answer), asyncio.create_task(left())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait((task, gone))


async def _whole(about: Json, choices: list[Choice], found: Asked, *, is_chat: bool) -> Json:
    async def one(i: int, choice: Choice) -> Json:
        pieces = [piece async for piece in choice.pieces()]
        text, finish = "".join(piece.text for piece in pieces), pieces[-1].finish
        said = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        logps = [logp for piece in pieces for logp in piece.logps]
        own = logps_of(logps, is_chat=is_chat) if found.with_logps else None
        return {"index": i, **said, "finish_reason": FINISH[str(finish)], "logprobs": own}

    tasks = [asyncio.create_task(one(i, choice)) for i, choice in enumerate(choices)]
    try:
        said = await asyncio.gather(*tasks)
    finally:  # if one fails, or the client has gone, nobody wants the others
        for task in tasks:
            task.cancel()
    return {**about, "choices": said, "usage": _usage(choices, found)}


async def _events(about: Json, choices: list[Choice], found: Asked, *, is_chat: bool) -> AsyncIterator[str]:
    """Server-sent events; the choices' pieces as they come."""
    about = {**about, "object": "chat.completion.chunk" if is_chat else "text_completion"}
    merged: asyncio.Queue[tuple[int, Piece] | Refused] = asyncio.Queue()

    async def feed(i: int, choice: Choice) -> None:
        try:
            async for piece in choice.pieces():
                merged.put_nowait((i, piece))
        except Refused as e:
            merged.put_nowait(e)
        except Exception as e:  # or the client would wait for ever
            log.exception("an answer has failed")
            merged.put_nowait(Refused(str(e), 500))

    def event(i: int, piece: Piece, *, is_first: bool = False) -> str:
        delta = ({"role": "assistant"} if is_first else {}) | {"content": piece.text}
        said = {"delta": delta} if is_chat else {"text": piece.text}
        logps = logps_of(piece.logps, is_chat=is_chat) if found.with_logps and piece.logps else None
        reason = FINISH[piece.finish] if piece.finish else None
        return _event({**about, "choices": [{"index": i, **said, "finish_reason": reason, "logprobs": logps}]})

    feeders = [asyncio.create_task(feed(i, choice)) for i, choice in enumerate(choices)]
    try:
        for i in range(len(choices)):
            yield event(i, Piece("", [], None), is_first=True)
        left = len(choices)
        while left:
            new = await merged.get()
            if isinstance(new, Refused):
                yield _event({"error": _told(new)})
                return
            i, piece = new
            left -= piece.finish is not None
            if piece.text or piece.finish or (found.with_logps and piece.logps):
                yield event(i, piece)
        if found.with_usage:
            yield _event({**about, "choices": [], "usage": _usage(choices, found)})
        yield "data: [DONE]\n\n"
    finally:  # the client may have gone
        for feeder in feeders:
            feeder.cancel()


def _event(value: Json) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _error(e: Refused, **more: Any) -> Response:
    return JSONResponse({"error": _told(e)}, e.status, **more)


def _told(e: Refused) -> Json:
    """In OpenAI's form; a message may quote half a character."""
    message = str(e).encode(errors="backslashreplace").decode()
    kind = "invalid_request_error" if e.status < 500 else "server_error"
    return {"message": message, "type": kind, "param": e.param, "code": None}


def _usage(choices: list[Choice], found: Asked) -> Json:
    prompt, answer = found.num_prompt_tokens, sum(choice.num_tokens for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
