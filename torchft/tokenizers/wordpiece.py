"""BERT's WordPiece: words of a cleaned text, each the longest pieces of the vocabulary from its start, or unknown.

In Python, with each word's pieces remembered; there is no engine for it among the dependencies.
"""

import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Any

from torchft.errors import UserError

LONGEST_WORD = 100  # characters; what is longer is unknown
WORDS_KEPT = 1 << 18
CONTINUES = "##"
CJK = (
    (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F),
)  # fmt: skip

# Accents, marks and invisible characters of Unicode 9 and later, which Hugging Face's tables take for letters.
_NEWER = (
    "61d 7fd 890-891 898-89f 8ca-8e2 9fd-9fe a76 afa-aff b55 c04 c3c c77 c84 d00 d3b-d3c d81 eba 180f 1885-1886 "
    "1abf-1ace 1b7d-1b7e 1df6-1dfb 2e43-2e4f 2e52-2e5d a82c a8c5 a8ff a9bd 10d24-10d27 10eab-10ead 10f46-10f50 "
    "10f55-10f59 10f82-10f89 11070 11073-11074 110c2 110cd 111c9 111cf 1123e 1133b 11438-1143f 11442-11444 11446 "
    "1144b-1144f 1145a-1145b 1145d-1145e 11660-1166c 116b9 1182f-11837 11839-1183b 1193b-1193c 1193e 11943-11946 "
    "119d4-119d7 119da-119db 119e0 119e2 11a01-11a0a 11a33-11a38 11a3b-11a47 11a51-11a56 11a59-11a5b 11a8a-11a96 "
    "11a98-11a9c 11a9e-11aa2 11c30-11c36 11c38-11c3d 11c3f 11c41-11c45 11c70-11c71 11c92-11ca7 11caa-11cb0 "
    "11cb2-11cb3 11cb5-11cb6 11d31-11d36 11d3a 11d3c-11d3d 11d3f-11d45 11d47 11d90-11d91 11d95 11d97 11ef3-11ef4 "
    "11ef7-11ef8 11fff 12ff1-12ff2 13430-13438 16e97-16e9a 16f4f 16fe2 16fe4 1cf00-1cf2d 1cf30-1cf46 1e000-1e006 "
    "1e008-1e018 1e01b-1e021 1e023-1e024 1e026-1e02a 1e130-1e136 1e2ae 1e2ec-1e2ef 1e944-1e94a 1e95e-1e95f"
)
NEWER = frozenset(
    chr(i)
    for first, _, last in (part.partition("-") for part in _NEWER.split())
    for i in range(int(first, 16), int(last or first, 16) + 1)
)


class WordPiece:
    """The engine of a WordPiece vocabulary: text without added tokens <-> ids."""

    def __init__(
        self, vocab: dict[str, int], *, unknown: str, lowercase: bool, strips_accents: bool, parts_cjk: bool
    ) -> None:
        self.vocab = vocab
        self.token_bytes = {i: token.encode() for token, i in vocab.items()}
        self._texts = {i: token for token, i in vocab.items()}
        self._unknown = vocab[unknown]
        self._lowercase, self._strips_accents, self._parts_cjk = lowercase, strips_accents, parts_cjk
        self._remembered = lru_cache(WORDS_KEPT)(self._pieces)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_remembered"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._remembered = lru_cache(WORDS_KEPT)(self._pieces)

    def normalize(self, text: str) -> str:
        """``text`` without control characters, in small letters without accents if the vocabulary has no others."""
        if not text.isascii() or not text.isprintable():
            text = "".join(map(self._cleaned, text))
        if self._strips_accents and not text.isascii():
            text = "".join(c for c in unicodedata.normalize("NFD", text) if not _is_accent(c))
        return "".join(map(str.lower, text)) if self._lowercase else text  # one by one: a last sigma is like any other

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """Ids of ``text``, in which nothing is special; no token knows what stands before it."""
        ids: list[int] = []
        for word in self.normalize(text).split():
            for part in [word] if word.isalnum() else _parted(word):
                ids += self._remembered(part)
        return ids

    def widths(self, ids: list[int], text: str, *, at_start: bool) -> list[int]:
        raise AssertionError("only a chat's tokens are learned in part, and no WordPiece vocabulary has a chat format")

    def decode(self, ids: list[int], added: dict[int, str]) -> str:
        """Words with a space between them, none before . , ! and ?; what was cleaned away does not come back."""
        text = ""
        for i in ids:
            token = added.get(i, self._texts.get(i, ""))
            if text and token.startswith(CONTINUES):
                text += token[len(CONTINUES) :]
            else:
                text += token if not text or token in (".", ",", "!", "?") else f" {token}"
        return text

    def _cleaned(self, c: str) -> str:
        if c in "\t\n\r":
            return " "
        if c == "\ufffd" or (unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs") and c not in NEWER):
            return ""
        if c.isspace():
            return " "
        return f" {c} " if self._parts_cjk and any(low <= ord(c) <= high for low, high in CJK) else c

    def _pieces(self, word: str) -> tuple[int, ...]:
        if len(word) > LONGEST_WORD:
            return (self._unknown,)
        ids, start = [], 0
        while start < len(word):
            prefix = CONTINUES if start else ""
            for end in range(len(word), start, -1):
                if (found := self.vocab.get(prefix + word[start:end])) is not None:
                    break
            else:
                return (self._unknown,)
            ids.append(found)
            start = end
        return tuple(ids)


def from_json(spec: dict[str, Any], path: Path) -> WordPiece:
    """The engine that tokenizer.json describes, or UserError for any part of it that we do not know."""
    model, normalizer = spec["model"], spec.get("normalizer") or {}
    expected = {
        "pre_tokenizer": (spec.get("pre_tokenizer"), {"type": "BertPreTokenizer"}),
        "model.continuing_subword_prefix": (model.get("continuing_subword_prefix", CONTINUES), CONTINUES),
        "model.max_input_chars_per_word": (model.get("max_input_chars_per_word", LONGEST_WORD), LONGEST_WORD),
        "normalizer.type": (normalizer.get("type"), "BertNormalizer"),
        "normalizer.clean_text": (normalizer.get("clean_text"), True),
    }
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise UserError(f"{path}: {name} is {found!r}, but of WordPiece torchft knows {wanted!r}")
    lowercase, accents = bool(normalizer["lowercase"]), normalizer.get("strip_accents")
    return WordPiece(
        model["vocab"],
        unknown=model["unk_token"],
        lowercase=lowercase,
        strips_accents=lowercase if accents is None else bool(accents),
        parts_cjk=bool(normalizer["handle_chinese_chars"]),
    )


def from_vocab(path: Path, config: dict[str, Any]) -> WordPiece:
    """The engine of a vocab.txt, a token a line, with what tokenizer_config.json says."""
    vocab = {line: i for i, line in enumerate(path.read_text(encoding="utf-8").split("\n")) if line}
    unknown = str(config.get("unk_token", "[UNK]"))
    if unknown not in vocab:
        raise UserError(f"{path} has no {unknown!r}, which words get that it cannot spell: it is damaged, or no BERT's")
    lowercase, accents = bool(config.get("do_lower_case", True)), config.get("strip_accents")
    return WordPiece(
        vocab,
        unknown=unknown,
        lowercase=lowercase,
        strips_accents=lowercase if accents is None else bool(accents),
        parts_cjk=bool(config.get("tokenize_chinese_chars", True)),
    )


def _parted(word: str) -> list[str]:
    """Each punctuation mark alone, and what is between them."""
    parts = [""]
    for c in word:
        if _is_mark(c):
            parts += [c, ""]
        else:
            parts[-1] += c
    return [part for part in parts if part]


def _is_accent(c: str) -> bool:
    return (unicodedata.category(c) == "Mn" or c == "\u1734") and c not in NEWER


def _is_mark(c: str) -> bool:
    if c.isascii():
        return not c.isalnum() and c.isprintable() and c != " "
    return (unicodedata.category(c)[0] == "P" and c not in NEWER) or c in "\u166d\U000111c9"
