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
/quit          or Ctrl-D; Ctrl-C ends an answer, and twice in a row the conversation"""


class Chat:
    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, *, sampling: Sampling, seed: int = 0, system: str = ""
    ) -> None:
        self.messages: list[Message] = []
        self._engine, self._tokenizer, self._sampling, self._seed = engine, tokenizer, sampling, seed
        self._start(system)

    def answer(self, question: str) -> Iterator[str]:
        """The model's answer in pieces. It becomes part of the history, also if the reader stops early; a question that
        cannot be answered (UserError) does not."""
        before, said = list(self.messages), ""
        self.messages.append({"role": "user", "content": question})
        try:
            prompt = self._tokenizer.render(self.messages, add_generation_prompt=True).tokens
            request = Request(prompt=prompt, sampling=self._sampling, seed=self._seed, is_streamed=True)
            self._seed += 1
            for piece in stream(self._engine, self._tokenizer, request):
                said += piece
                yield piece
        except UserError:
            self.messages = before
            raise
        finally:
            if self.messages is not before:
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
            return self._save(rest.strip())
        return HELP if word == "/help" else f"{word} is no command\n{HELP}"

    def _start(self, system: str) -> None:
        self.messages = [{"role": "system", "content": system}] if system else []

    def _save(self, name: str) -> str:
        """What to tell the user, whatever is wrong: the conversation must not end with it."""
        if all(message["role"] != "assistant" for message in self.messages):
            return "there is no answer to save yet"
        try:
            path = Path(name).expanduser()
            before = path.read_bytes() if path.exists() else b""
            before.decode()
            gap = b"\n" if before and not before.endswith(b"\n") else b""  # an editor may leave the last row open
            row = json.dumps({"messages": self.messages}, ensure_ascii=False)
            atomic_write(path, before + gap + row.encode() + b"\n")
        except UnicodeDecodeError as e:
            return f"{name} is not UTF-8 at byte {e.start}, so no row can follow: name another file"
        except UnicodeEncodeError:
            return "the conversation holds half a character, which no file can: /undo, or a new one with /system"
        except OSError as e:
            return f"{name} cannot be written: {e.strerror}"
        except (RuntimeError, ValueError) as e:  # ~ of nobody, a name with a zero byte
            return f"{name!r} is no name of a file: {e}"
        return f"saved to {path}"


def stream(engine: Engine, tokenizer: Tokenizer, request: Request) -> Iterator[str]:
    """The text of one streamed request, as it comes. UserError if its prompt is too long for the engine."""
    text = TextStream(tokenizer, stop=request.sampling.stop)
    number = engine.submit(request)
    try:
        while not engine.is_idle:
            for _, tokens, _, finish in engine.advance():
                if finish == "too_long":
                    is_all = engine.max_len >= engine.model.config.max_seq_len
                    raise UserError(
                        f"the conversation has {len(request.prompt)} tokens, and {engine.max_len} is the most with its "
                        f"answer: /undo, a new conversation with /system{'' if is_all else ', or a larger --max-len'}"
                    )
                yield text.push(tokens, is_last=finish is not None)
                if finish == "not_finite":
                    yield "\n[the model's logits are not finite]"
    finally:
        engine.cancel(number)
