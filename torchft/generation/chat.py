"""A conversation with a model: history, answers as they are written, and the words that steer it."""

import json
from collections.abc import Iterator
from pathlib import Path

from torchft.errors import UserError
from torchft.files import atomic_write
from torchft.generation.engine import Engine
from torchft.generation.requests import Request
from torchft.generation.sampling import Sampling
from torchft.generation.text import TextStream
from torchft.tokenizers.chat import Message
from torchft.tokenizers.tokenizer import Tokenizer

HELP = """/undo          forget the last question and its answer
/system TEXT   a new system prompt, and a new conversation; without TEXT none
/save FILE     the conversation as a row of training data, appended to a .jsonl file
/quit          or Ctrl-D; Ctrl-C ends an answer"""


class Chat:
    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, *, sampling: Sampling, seed: int = 0, system: str = ""
    ) -> None:
        self.messages: list[Message] = []
        self._engine, self._tokenizer, self._sampling, self._seed = engine, tokenizer, sampling, seed
        self._start(system)

    def answer(self, question: str) -> Iterator[str]:
        """The model's answer in pieces. It becomes part of the history, also if the reader stops early."""
        self.messages.append({"role": "user", "content": question})
        try:
            prompt = self._tokenizer.render(self.messages, add_generation_prompt=True).tokens
        except UserError:
            self.messages.pop()
            raise
        request = Request(prompt=prompt, sampling=self._sampling, seed=self._seed, is_streamed=True)
        self._seed += 1
        said = ""
        try:
            for piece in stream(self._engine, self._tokenizer, request):
                said += piece
                yield piece
        finally:
            self.messages.append({"role": "assistant", "content": said})

    def command(self, line: str) -> str:
        """Do what a line that begins with "/" says; what to tell the user."""
        word, _, rest = line.strip().partition(" ")
        if word == "/undo":
            if self.messages[-1:] and self.messages[-1]["role"] == "assistant":
                del self.messages[-2:]
                return "forgotten"
            return "there is nothing to forget"
        if word == "/system":
            self._start(rest.strip())
            return "a new conversation"
        if word == "/save":
            if not rest.strip():
                return "/save needs the name of a .jsonl file"
            return self._save(Path(rest.strip()).expanduser())
        return HELP if word == "/help" else f"{word} is no command\n{HELP}"

    def _start(self, system: str) -> None:
        self.messages = [{"role": "system", "content": system}] if system else []

    def _save(self, path: Path) -> str:
        try:
            before = path.read_text(encoding="utf-8") if path.exists() else ""
            atomic_write(path, before + json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as e:
            return f"{path} cannot be written: {e.strerror}"
        return f"saved to {path}"


def stream(engine: Engine, tokenizer: Tokenizer, request: Request) -> Iterator[str]:
    """The text of one streamed request, as it comes. UserError if its prompt is too long for the engine."""
    text = TextStream(tokenizer, stop=request.sampling.stop)
    number = engine.submit(request)
    try:
        while not engine.is_idle:
            for _, tokens, _, finish in engine.advance():
                if finish == "too_long":
                    raise UserError(
                        f"the conversation has {len(request.prompt)} tokens, and {engine.max_len} is the most with its "
                        "answer: /undo, a new conversation with /system, or a larger --max-len"
                    )
                yield text.push(tokens, is_last=finish is not None)
                if finish == "not_finite":
                    yield "\n[the model's logits are not finite]"
    finally:
        engine.cancel(number)
