"""An OpenAI-compatible HTTP server on the engine: /v1/chat/completions, /v1/completions, /v1/models, /health.

https://platform.openai.com/docs/api-reference/chat; Starlette and uvicorn come with the extra ``serve``.
"""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from torchft.errors import UserError
from torchft.generation.requests import Finish, Request, Update
from torchft.generation.sampling import sampling_of
from torchft.generation.text import TextStream
from torchft.generation.worker import Worker
from torchft.tokenizers.tokenizer import Tokenizer

log = logging.getLogger(__name__)

FINISH = {"stop": "stop", "length": "length"}  # OpenAI's words; what is not here is an error
MAX_BODY = 16 * 2**20  # bytes of a request
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
Json = dict[str, Any]


class Refused(Exception):
    """A request that cannot be answered, with its HTTP status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def app(worker: Worker, tokenizer: Tokenizer, *, model: str) -> Starlette:
    """``model``: the name that clients see."""

    async def models(_: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": model, "object": "model", "owned_by": "torchft"}]})

    async def health(_: HTTPRequest) -> Response:
        return JSONResponse(
            {"status": "ok" if worker.error is None else "failed"}, 200 if worker.error is None else 503
        )

    async def chat(http: HTTPRequest) -> Response:
        return await _answered(http, worker, tokenizer, model, is_chat=True)

    async def plain(http: HTTPRequest) -> Response:
        return await _answered(http, worker, tokenizer, model, is_chat=False)

    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/completions", plain, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
    ]
    return Starlette(routes=routes)


async def _answered(http: HTTPRequest, worker: Worker, tokenizer: Tokenizer, model: str, *, is_chat: bool) -> Response:
    try:
        body = await _body(http)
        requests = _requests(body, tokenizer, worker.engine.max_len, is_chat=is_chat)
        about = {"id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}", "created": int(time.time())}
        about |= {"model": model, "object": "chat.completion" if is_chat else "text_completion"}
        choices = [_Choice(request, worker, tokenizer) for request in requests]
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            events = _events(about, choices, is_chat=is_chat, usage=usage)
            return StreamingResponse(events, media_type="text/event-stream")
        return JSONResponse(await _whole(about, choices, is_chat=is_chat, with_logps=bool(body.get("logprobs"))))
    except Refused as e:
        error = {"message": str(e), "type": "invalid_request_error" if e.status < 500 else "server_error"}
        return JSONResponse({"error": error | {"param": None, "code": None}}, e.status)


async def _body(http: HTTPRequest) -> Json:
    raw = bytearray()
    async for part in http.stream():
        raw += part
        if len(raw) > MAX_BODY:
            raise Refused(f"the request is larger than {MAX_BODY >> 20} MiB", 413)
    try:
        body = json.loads(raw)
    except ValueError as e:
        raise Refused(f"the request is not JSON: {e}") from None
    if not isinstance(body, dict):
        raise Refused("the request must be a JSON object")
    return body


def _requests(body: Json, tokenizer: Tokenizer, max_len: int, *, is_chat: bool) -> list[Request]:
    """One for each of the ``n`` answers that are asked for."""
    try:
        if is_chat:
            if not isinstance(body.get("messages"), list):
                raise Refused("messages: a list of {role, content} objects is needed")
            rendered = tokenizer.render(body["messages"], tools=body.get("tools"), add_generation_prompt=True)
            prompt = rendered.tokens
        else:
            if not isinstance(body.get("prompt"), str):
                raise Refused("prompt: text is needed")
            prompt = tokenizer.encode(body["prompt"], add_special_tokens=True)
        stop = body.get("stop") or []
        most = body.get("max_completion_tokens") or body.get("max_tokens") or max_len
        numbers = {name: body[name] for name in SAMPLING if body.get(name) is not None}
        n, seed = body.get("n") or 1, body.get("seed")
        if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in (*numbers.values(), most, n)):
            raise Refused(f"{', '.join((*SAMPLING, 'max_tokens', 'n'))} are numbers")
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise Refused("stop: a text or a list of texts")
        if not isinstance(seed, int | None) or not 1 <= n <= 128:
            raise Refused("seed is a whole number, and n lies between 1 and 128")
        sampling = sampling_of({**numbers, "max_new_tokens": int(most), "stop": stops})
    except UserError as e:
        raise Refused(str(e)) from None
    if not prompt or len(prompt) >= max_len:
        raise Refused(f"the prompt has {len(prompt)} tokens; between 1 and {max_len - 1} fit")
    first = secrets.randbits(62) if seed is None else seed
    return [
        Request(prompt=prompt, sampling=sampling, seed=(first + (i << 32)) % 2**63, is_streamed=True)
        for i in range(int(n))
    ]


class _Choice:
    """One answer under way."""

    def __init__(self, request: Request, worker: Worker, tokenizer: Tokenizer) -> None:
        self.request, self.num_tokens = request, 0
        self.logps: list[tuple[int, float]] = []
        self._tokenizer = tokenizer
        self._text = TextStream(tokenizer, stop=request.sampling.stop)
        updates: asyncio.Queue[Update | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self._updates = updates

        def listen(update: Update | None) -> None:
            loop.call_soon_threadsafe(updates.put_nowait, update)

        try:
            self.cancel = worker.submit(request, listen)
        except RuntimeError as e:
            raise Refused(str(e), 503) from None

    async def pieces(self) -> AsyncIterator[tuple[str, Finish | None]]:
        """New text as it comes, the last with how it ended."""
        finish = None
        try:
            while finish is None:
                update = await self._updates.get()
                if update is None or update.finish not in (None, *FINISH):
                    raise Refused("the engine has failed" if update is None else f"ended: {update.finish}", 500)
                self.num_tokens += len(update.tokens)
                self.logps += zip(update.tokens, update.logps)
                finish = update.finish
                yield self._text.push(update.tokens, is_last=finish is not None), finish
        finally:
            self.cancel()

    def token_logps(self) -> Json:
        text = [self._tokenizer.decode([token]) for token, _ in self.logps]
        return {
            "content": [
                {"token": t, "logprob": logp, "bytes": list(t.encode()), "top_logprobs": []}
                for t, (_, logp) in zip(text, self.logps)
            ]
        }


async def _whole(about: Json, choices: list[_Choice], *, is_chat: bool, with_logps: bool) -> Json:
    async def one(i: int, choice: _Choice) -> Json:
        pieces = [piece async for piece in choice.pieces()]
        text, finish = "".join(piece for piece, _ in pieces), pieces[-1][1]
        said = {"message": {"role": "assistant", "content": text}} if is_chat else {"text": text}
        logps = choice.token_logps() if with_logps else None
        return {"index": i, **said, "finish_reason": FINISH[str(finish)], "logprobs": logps}

    found = await asyncio.gather(*(one(i, choice) for i, choice in enumerate(choices)))
    return {**about, "choices": list(found), "usage": _usage(choices)}


async def _events(about: Json, choices: list[_Choice], *, is_chat: bool, usage: bool) -> AsyncIterator[str]:
    """Server-sent events; the choices' pieces as they come."""
    about = {**about, "object": "chat.completion.chunk" if is_chat else "text_completion"}
    merged: asyncio.Queue[tuple[int, str, Finish | None] | Refused] = asyncio.Queue()

    async def feed(i: int, choice: _Choice) -> None:
        try:
            async for piece, finish in choice.pieces():
                merged.put_nowait((i, piece, finish))
        except Refused as e:
            merged.put_nowait(e)
        except Exception as e:  # or the client would wait for ever
            log.exception("an answer has failed")
            merged.put_nowait(Refused(str(e), 500))

    def event(i: int, piece: str, finish: Finish | None, *, is_first: bool) -> str:
        delta = ({"role": "assistant"} if is_first else {}) | {"content": piece}
        said = {"delta": delta} if is_chat else {"text": piece}
        reason = FINISH[finish] if finish else None
        return _event({**about, "choices": [{"index": i, **said, "finish_reason": reason, "logprobs": None}]})

    feeders = [asyncio.create_task(feed(i, choice)) for i, choice in enumerate(choices)]
    try:
        for i in range(len(choices)):
            yield event(i, "", None, is_first=True)
        left = len(choices)
        while left:
            found = await merged.get()
            if isinstance(found, Refused):
                yield _event({"error": {"message": str(found), "type": "server_error"}})
                return
            i, piece, finish = found
            left -= finish is not None
            if piece or finish:
                yield event(i, piece, finish, is_first=False)
        if usage:
            yield _event({**about, "choices": [], "usage": _usage(choices)})
        yield "data: [DONE]\n\n"
    finally:  # the client may have gone
        for feeder in feeders:
            feeder.cancel()


def _event(value: Json) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _usage(choices: list[_Choice]) -> Json:
    prompt, answer = len(choices[0].request.prompt), sum(choice.num_tokens for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
