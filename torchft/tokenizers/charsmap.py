"""Sentencepiece's compiled normalization rules (NFKC and more), applied as Hugging Face's tokenizers does.

A text is taken a user-perceived character (a letter with its marks) at a time: one of less than 6 bytes whole if a rule
begins it, which then replaces all of it; else each of its code points by itself. Sentencepiece itself takes the longest
rule at each place; the two differ for letters with several marks.
"""

import re
import struct
import unicodedata
from functools import cache, lru_cache
from typing import Any

CHUNKS_KEPT = 1 << 16
WHOLE = 6  # bytes from which on a character with its marks is not looked up as a whole
# What Unicode 17 says of letters with marks (UAX 29), as far as they can have less than 6 bytes, besides what the
# categories in Python's own, older tables do: more marks, what goes with the letter behind it, and what is no mark.
_MARKS = (
    "897 cf3 e33 eb3 ece 1acf-1add 1ae0-1aeb 200c-200d ff9e-ff9f 10d69-10d6d 10efa-10eff 11241 "
    "113b8-113c0 113c2 113c5 113c7-113ca 113cc-113d0 113d2 113e1-113e2 11b60-11b67 11f00-11f01 11f03 11f34-11f3a "
    "11f3e-11f42 11f5a 13440 13447-13455 1611e-1612f 1e08f 1e4ec-1e4ef 1e5ee-1e5ef 1e6e3 1e6e6 1e6ee-1e6ef 1e6f5 "
    "1f3fb-1f3ff e0020-e007f"
)
_PREPENDED = "600-605 6dd 70f 890-891 8e2 d4e 110bd 110cd 111c2-111c3 113d1 1193f 11941 11a84-11a89 11d46 11f02"
_LETTERS = "102b-102c 1038 1062-1064 1067-106d 1083 1087-108c 108f 109a-109c 1a61 1a63-1a64 aa7b aa7d 11720-11721"


class Charsmap:
    """text -> text."""

    def __init__(self, blob: bytes) -> None:
        """``blob``: the size of a double-array trie in bytes, the trie, and what it points to, each ending in NUL."""
        (size,) = struct.unpack_from("<I", blob)
        self._units = struct.unpack_from(f"<{size // 4}I", blob, 4)
        self._texts = blob[4 + size :]
        self._replaced = lru_cache(CHUNKS_KEPT)(self._replace)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_replaced"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._replaced = lru_cache(CHUNKS_KEPT)(self._replace)

    def normalize(self, text: str) -> str:
        return "".join(map(self._replaced, _chunks().findall(text)))

    def _replace(self, chunk: str) -> str:
        if len(chunk.encode()) < WHOLE and (found := self._rule(chunk)) is not None:
            return found
        return "".join(c if (found := self._rule(c)) is None else found for c in chunk)

    def _rule(self, chunk: str) -> str | None:
        """What the shortest rule that begins ``chunk`` says."""
        node = _offset(self._units[0])
        for byte in chunk.encode():
            node ^= byte
            unit = self._units[node]
            if byte == 0 or unit & (1 << 31 | 0xFF) != byte:
                return None
            node ^= _offset(unit)
            if unit >> 8 & 1:  # a rule ends here
                start = self._units[node] & (1 << 31) - 1
                return self._texts[start : self._texts.index(0, start)].decode()
        return None


def _offset(unit: int) -> int:
    """How far the children of a trie's unit are."""
    return unit >> 10 << ((unit & 1 << 9) >> 6)


@cache
def _chunks() -> re.Pattern[str]:
    """User-perceived characters, of those that may have less than 6 bytes: longer ones may come in parts."""
    letters, marks, prepended = (_listed(codes) for codes in (_LETTERS, _MARKS, _PREPENDED))
    alone = set()
    for c in map(chr, range(0x110000)):
        category = unicodedata.category(c)
        if category in ("Mn", "Mc", "Me") and c not in letters and c not in prepended:
            marks.add(c)
        elif category in ("Cc", "Cf", "Zl", "Zp") and c not in marks and c not in prepended:
            alone.add(c)
    mark, never, before = (f"[{''.join(map(re.escape, sorted(chars)))}]" for chars in (marks, alone, prepended))
    return re.compile(rf"\r\n|{never}|{before}*(?!{never}).{mark}*", re.DOTALL)


def _listed(codes: str) -> set[str]:
    parts = (part.partition("-") for part in codes.split())
    return {chr(i) for first, _, last in parts for i in range(int(first, 16), int(last or first, 16) + 1)}
