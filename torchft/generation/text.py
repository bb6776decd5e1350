"""From tokens to text as it comes, and from completions to what a reader should see."""

from collections.abc import Sequence

from torchft.generation.requests import Completion
from torchft.tokenizers.tokenizer import Tokenizer


class TextStream:
    """Tokens in, text out, without ever taking a letter back.

    Held back until it is clear: bytes of a character that is not whole, and what may be the beginning of a stop text.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._tokens: list[int] = []
        self._given = 0  # characters

    def push(self, tokens: Sequence[int], *, is_last: bool = False) -> str:
        """The text that is sure now. With ``is_last`` all of it, up to a stop token or text."""
        self._tokens += tokens
        if is_last and self._tokens and self._tokens[-1] in self._tokenizer.stop_ids:
            self._tokens.pop()
        text = self._tokenizer.decode(self._tokens)
        end = min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=len(text))
        if not is_last:
            end = min(end, len(text.rstrip("\ufffd")), *(len(text) - _begun(text, stop) for stop in self._stop))
        new = text[self._given : end]
        self._given = max(self._given, end)
        return new


def answer_text(tokenizer: Tokenizer, completion: Completion, *, stop: Sequence[str] = ()) -> str:
    """What a completion says, without the stop token or text that ended it."""
    return TextStream(tokenizer, stop=stop).push(completion.tokens, is_last=True)


def _begun(text: str, stop: str) -> int:
    """How many of the last letters of ``text`` may be the first ones of ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
