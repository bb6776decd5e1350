"""Added tokens: strings of a vocabulary that are cut out of a text before its merges run, found as Hugging Face does.

They are found here and not by the engines: tiktoken ignores lstrip, rstrip and single_word and takes the first of two
tokens that start alike, sentencepiece finds none.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_SPACES_BEFORE = re.compile(r"[^\S\x1c-\x1f]+$")  # what Unicode calls white space; Python's \s adds four separators
_SPACES_AFTER = re.compile(r"[^\S\x1c-\x1f]+")
_WORD = {"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc"}


SHORT = 40  # characters of a text that the regex searches as fast


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """``special`` ones are control tokens always; others (``<think>``) are markup that a model writes."""

    content: str
    id: int
    special: bool = False
    lstrip: bool = False  # takes the white space before it
    rstrip: bool = False
    single_word: bool = False  # only between non-word characters
    normalized: bool = False  # looked for in what those that are not left, so that their lstrip may take it

    @classmethod
    def from_json(cls, json: dict[str, Any], id: int) -> "AddedToken":
        """From an entry of tokenizer.json or of ``added_tokens_decoder``."""
        flags = {name: bool(json.get(name)) for name in ("special", "lstrip", "rstrip", "single_word", "normalized")}
        return cls(content=json["content"], id=id, **flags)

    @property
    def is_control(self) -> bool:
        """False only for runs of white space, which some vocabularies list here and which are ordinary text."""
        return self.special or not self.content.isspace()


class AddedTokens:
    """The added tokens of one vocabulary."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self.by_content = {token.content: token for token in tokens}
        self.by_id = {token.id: token for token in self}
        self._every, self._ordinary = (
            [_longest_first(t.content for t in self if t.normalized == late and (control or not t.is_control))
             for late in (False, True)]
            for control in (True, False)
        )  # fmt: skip
        self._heads = sorted({content[:2] for content in self.by_content})  # of tokens, to pass over text without any

    def __iter__(self) -> Iterator[AddedToken]:
        return iter(self.by_content.values())

    def contents(self, *, special_only: bool = False) -> list[str]:
        """The strings that act as control tokens, longest first."""
        found = [t.content for t in self if (t.special if special_only else t.is_control)]
        return sorted(found, key=len, reverse=True)

    def may_stand_in(self, text: str, start: int = 0, stop: int | None = None) -> bool:
        """False where two characters with which every token begins are missing: quick, and true of most text."""
        for head in self._heads:  # noqa: SIM110  a generator costs more than the search
            if text.find(head, start, stop) >= 0:
                return True
        return False

    def find(self, text: str, pieces: Iterable[tuple[int, bool]]) -> Iterator[tuple[int, int, int]]:
        """(start, end, id) of each added token in ``text``, left to right.

        ``pieces`` cut the text up: (length, whether control tokens count in it). A token never lies across a cut.
        """
        position = done = 0
        for length, control in pieces:
            first, second = self._every if control else self._ordinary
            stop = position + length
            if length <= SHORT or self.may_stand_in(text, position, stop):
                for start, end, i in self._matches(first, text, position, stop, done):
                    yield from self._matches(second, text, max(position, done), start, done, limit=start)
                    yield start, end, i
                    done = end
                for start, end, i in self._matches(second, text, max(position, done), stop, done):
                    yield start, end, i
                    done = end
            position = stop

    def _matches(
        self, regex: re.Pattern[str] | None, text: str, begin: int, stop: int, done: int, limit: int | None = None
    ) -> Iterator[tuple[int, int, int]]:
        """Tokens in text[begin:stop], of which what is before ``done`` is taken, and from ``limit`` on is another's."""
        limit = len(text) if limit is None else limit
        for match in regex.finditer(text, begin, stop) if regex else ():
            token, start, end = self.by_content[match[0]], match.start(), match.end()
            if token.single_word and (_is_word(text, start - 1) or _is_word(text, end)):
                continue
            if token.lstrip and (spaces := _SPACES_BEFORE.search(text, done, start)):
                start = spaces.start()
            if token.rstrip and (spaces := _SPACES_AFTER.match(text, end, limit)):
                end = spaces.end()
            start = max(start, done)  # a token of white space that rstrip took counts all the same
            end = done = max(end, done)
            yield start, end, token.id


def _longest_first(contents: Iterable[str]) -> re.Pattern[str] | None:
    ordered = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _is_word(text: str, i: int) -> bool:
    """Whether text[i] is a word character as Rust's regexes have it: letters, marks, decimal digits, connectors."""
    if not 0 <= i < len(text):
        return False
    return unicodedata.category(text[i]) in _WORD or text[i] in "\u200c\u200d" or "\u24b6" <= text[i] <= "\u24e9"
