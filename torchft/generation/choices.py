"""One answer of the server, as it comes from the engine, with its log-probabilities in OpenAI's two forms."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from torchft.generation.asked import Json, Refused
from torchft.generation.requests import Finish, Request, Update
from torchft.generation.text import TextStream
from torchft.generation.worker import Worker
from torchft.tokenizers.tokenizer import Tokenizer

FINISH = {"stop": "stop", "length": "length"}  # OpenAI's words; what is not here is an error
LEAST_LOGP = -9999.0  # OpenAI's word for minus infinity, which JSON lacks


class TokenLogp(NamedTuple):
    """A token's text, its log-probability, and where the text begins in the answer, in characters."""

    text: str
    logp: float
    offset: int


class Piece(NamedTuple):
    """What is new of an answer. Text may come later than its tokens: see `TextStream`."""

    text: str
    logps: list[TokenLogp]
    finish: Finish | None


class Choice:
    """One answer, which is under way from the first of its ``pieces`` on until the last, or until nobody wants more."""

    def __init__(self, request: Request, worker: Worker, tokenizer: Tokenizer) -> None:
        self.num_tokens = 0
        self._request, self._worker, self._tokenizer = request, worker, tokenizer
        self._text = TextStream(tokenizer, stop=request.sampling.stop)
        self._last: list[int] = []  # the newest token
        self._offset = 0

    async def pieces(self) -> AsyncIterator[Piece]:
        """Refused if the engine fails."""
        updates: asyncio.Queue[Update | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listen(update: Update | None) -> None:
            with suppress(RuntimeError):  # the server's loop may have ended before the engine
                loop.call_soon_threadsafe(updates.put_nowait, update)

        try:
            cancel = self._worker.submit(self._request, listen)
        except RuntimeError as e:
            raise Refused(str(e), 503) from None
        finish = None
        try:
            while finish is None:
                update = await updates.get()
                if update is None or update.finish not in (None, *FINISH):
                    raise Refused("the engine has failed" if update is None else f"ended: {update.finish}", 500)
                self.num_tokens += len(update.tokens)
                finish = update.finish
                logps = [self._logp(token, logp) for token, logp in zip(update.tokens, update.logps)]
                yield Piece(self._text.push(update.tokens, is_last=finish is not None), logps, finish)
        finally:
            cancel()

    def _logp(self, token: int, logp: float) -> TokenLogp:
        """A token's text is what it adds to the one before: some have a space only inside a text."""
        before = self._tokenizer.decode(self._last)
        text = self._tokenizer.decode([*self._last, token])[len(before) :]
        self._last, offset = [token], self._offset
        self._offset += len(text)
        return TokenLogp(text, max(logp, LEAST_LOGP), offset)


def logps_of(found: Sequence[TokenLogp], *, is_chat: bool) -> Json:
    if is_chat:
        content = [{"token": t.text, "logprob": t.logp, "bytes": _bytes(t.text), "top_logprobs": []} for t in found]
        return {"content": content}
    return {
        "tokens": [t.text for t in found],
        "token_logprobs": [t.logp for t in found],
        "top_logprobs": None,
        "text_offset": [t.offset for t in found],
    }


def _bytes(text: str) -> list[int] | None:
    """None for a part of a character, which the text does not tell."""
    return None if not text or "\ufffd" in text else list(text.encode())
