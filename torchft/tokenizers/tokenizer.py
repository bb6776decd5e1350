"""The Tokenizer: text <-> ids, and conversations -> ids with a loss mask."""

import inspect
import logging
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from torchft.errors import UserError
from torchft.names import nearest
from torchft.tokenizers.added import AddedTokens
from torchft.tokenizers.affixes import Around
from torchft.tokenizers.bpe import ByteBPE
from torchft.tokenizers.chat import Message, Rendered, Segment, check_unicode, left_out, prepare
from torchft.tokenizers.spm import SentencePieceBPE
from torchft.tokenizers.unigram import Unigram
from torchft.tokenizers.wordpiece import WordPiece

log = logging.getLogger(__name__)

Engine = ByteBPE | SentencePieceBPE | Unigram | WordPiece
ChatFormat = Callable[..., list[Segment]]
_FLAGS = (b"\0", b"\1")


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """The ids that have a role of their own."""

    bos: int | None
    eos: int
    pad: int
    around: Around  # what add_special_tokens puts around a text


class Tokenizer:
    """A checkpoint's tokenizer; ``torchft.tokenizers.load`` makes it. Pickles, so that worker processes can have it."""

    def __init__(
        self, engine: Engine, added: AddedTokens, special: SpecialIds, *,
        files: Sequence[Path] = (), chat: ChatFormat | None = None, chat_template: str | None = None,
        stop_ids: Sequence[int] = (), fingerprint: str = "",
    ) -> None:  # fmt: skip
        self._engine = engine
        self._added = added
        self._special = special
        self._files = tuple(files)
        self._chat = chat
        self.fingerprint = fingerprint  # of all that decides a token; "" where nobody knows
        self.chat_template = chat_template  # Jinja; None if files() say it, else an exported folder needs it too
        self._added_text = {token.id: token.content for token in added}
        self.vocab_size = 1 + max([*engine.token_bytes, *self._added_text])  # rows that an embedding needs
        self.stop_ids = tuple(dict.fromkeys([special.eos, *stop_ids, *self._turn_end()]))

    @property
    def bos_id(self) -> int | None:
        return self._special.bos

    @property
    def eos_id(self) -> int:
        return self._special.eos

    @property
    def pad_id(self) -> int:
        """May equal ``eos_id``: padding must be told by its position, never by its id."""
        return self._special.pad

    @property
    def has_chat(self) -> bool:
        return self._chat is not None

    def files(self) -> tuple[Path, ...]:
        """The tokenizer's own files in the checkpoint, which an exported folder needs too."""
        return self._files

    def encode(self, text: str, *, add_special_tokens: bool = False, control: bool = True) -> list[int]:
        """Ids of ``text``, as Hugging Face's. ``control=False``: a control token in it is plain text (user data)."""
        tokens = self._encode([Segment(text, control=control)]).tokens
        return [*self._special.around.before, *tokens, *self._special.around.after] if add_special_tokens else tokens

    def encode_within(self, text: str, max_tokens: int) -> list[int]:
        """As ``encode`` with special tokens, of plain text, whose end is cut off where they are over ``max_tokens``."""
        before, after, _ = self._special.around
        room = max_tokens - len(before) - len(after)
        return [*before, *self.encode(text, control=False)[: max(room, 0)], *after]

    def encode_pair_within(self, one: str, other: str, max_tokens: int) -> list[int]:
        """Two plain texts with the special tokens of a pair; of the longer one the end is cut off, then of both.

        As transformers' ``truncation=True`` does it. UserError if this tokenizer has no such pairs.
        """
        before, after, between = self._special.around
        if between is None:
            raise UserError("this checkpoint's tokenizer.json does not say how two texts stand together")
        first, second = (self.encode(text, control=False) for text in (one, other))
        room = max(max_tokens - len(before) - len(between) - len(after), 0)
        if len(first) + len(second) > room:
            shorter = min(len(first), len(second), room // 2)
            if len(first) <= len(second):
                first, second = first[:shorter], second[: room - shorter]
            else:
                first, second = first[: room - shorter], second[:shorter]
        return [*before, *first, *between, *second, *after]

    @property
    def separator_id(self) -> int | None:
        """What ends each text of a pair, where something does."""
        return self._special.around.after[-1] if self._special.around.after else None

    def num_control(self, text: str, *, special_only: bool = False) -> int:
        """How many strings in ``text`` look like control tokens; with ``special_only`` not counting ``<think>``."""
        if not self._added.may_stand_in(text):
            return 0
        tokens = (self._added.by_id[i] for _, _, i in self._added.find(text, [(len(text), True)]))
        return sum(token.special if special_only else token.is_control for token in tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, control tokens included."""
        return self._engine.decode(list(ids), self._added_text)

    def render(
        self, messages: Sequence[Message], *, tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = False, train_on: str = "assistant", **options: Any,
    ) -> Rendered:  # fmt: skip
        """The ids of a conversation and which of them are to be learned.

        Args:
            train_on: "assistant" (every assistant message and its end-of-turn token), "last" (the last one), "all"
                (every token). ``"train": bool`` in an assistant message overrides the first two.
            options: what the chat template reads besides, for example ``date_string``.

        Raises UserError, with the message's index and the rule, for a conversation that cannot be rendered.
        """
        if self._chat is None:
            raise UserError(
                "this checkpoint has no chat template and its control tokens belong to no known format; name one with "
                "chat_format (llama2, llama3, or the path of a .jinja file)"
            )
        if options:
            _check_options(self._chat, options)
        prepared = prepare(messages, add_generation_prompt=add_generation_prompt, train_on=train_on)
        segments = self._chat(prepared, tools=tools, add_generation_prompt=add_generation_prompt, **options)
        rendered = self._encode(segments)
        train = [True] * len(rendered.tokens) if train_on == "all" else rendered.train
        absent = left_out(prepared, tools, "".join(segment.text for segment in segments))
        return Rendered(rendered.tokens, train, sum(map(self._num_escaped, prepared)), absent)

    def _encode(self, segments: Sequence[Segment]) -> Rendered:
        """Control tokens are cut out of control segments; the rest is encoded in runs that cross segment borders."""
        text = "".join(segment.text for segment in segments)
        check_unicode(text)
        wanted = bytearray().join([_FLAGS[s.train] * len(s.text) for s in segments])  # of each character
        tokens: list[int] = []
        train: list[bool] = []

        def run(start: int, end: int) -> None:
            ids = self._engine.encode(text[start:end], at_start=start == 0)
            tokens.extend(ids)
            if wanted.find(1, start, end) < 0 or wanted.find(0, start, end) < 0:
                train.extend([bool(wanted[start])] * len(ids))
            else:
                train.extend(self._learned(text[start:end], wanted[start:end], ids, start == 0))

        done = 0
        for start, end, token in self._added.find(text, [(len(s.text), s.control) for s in segments]):
            if start > done:
                run(done, start)
            tokens.append(token)
            train.append(wanted.find(1, start, end) >= 0)
            done = end
        if done < len(text):
            run(done, len(text))
        return Rendered(tokens, train)

    def _learned(self, text: str, wanted: bytearray, ids: list[int], at_start: bool) -> list[bool]:
        """Whether each token overlaps a wanted character. Tokens may end inside one, so places are counted in bytes."""
        ends = list(accumulate(self._engine.widths(ids, text, at_start=at_start)))
        starts = [0, *ends[:-1]]
        train = [False] * len(ids)
        place = done = 0  # the same place, in bytes and in characters
        for border in (*_borders(wanted), len(text)):
            next_place = len(self._engine.normalize(text[:border]).encode())
            if wanted[done] and next_place > place:
                # A token of no width goes with what follows it: the first that starts here, if none ends later.
                first = min(bisect_right(ends, place), bisect_left(starts, place))
                last = bisect_left(starts, next_place)
                train[first:last] = [True] * (last - first)
            place, done = max(place, next_place), border
        return train

    def _turn_end(self) -> list[int]:
        """The control token that ends an assistant's turn, if the chat format has one."""
        if self._chat is None:
            return []
        try:
            rendered = self.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
        except UserError as e:  # e.g. a template that is for generating only
            log.info("no end-of-turn token could be found: %s", e)
            return []
        learned = [token for token, train in zip(rendered.tokens, rendered.train) if train]
        return learned[-1:] if learned and learned[-1] in self._added_text else []

    def _num_escaped(self, message: Message) -> int:
        """How many strings in a message look like control tokens; an assistant may write those that are not special."""
        is_answer = message["role"] == "assistant"
        return sum(self.num_control(text, special_only=is_answer) for text in _strings(message))


def _borders(wanted: bytearray) -> Iterator[int]:
    """Where 0s and 1s change."""
    at, other = 0, 1 - wanted[0]
    while (at := wanted.find(other, at)) >= 0:
        yield at
        other = 1 - other


def _check_options(chat: ChatFormat, options: dict[str, Any]) -> None:
    """A family's format names its options in its signature; a template checks them itself."""
    parameters = inspect.signature(chat).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in options if not takes_any else ():
        if name not in parameters:
            raise UserError(f"the chat format has no option {name!r}{nearest(name, parameters)}")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
