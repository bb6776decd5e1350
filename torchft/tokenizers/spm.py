"""Sentencepiece BPE with byte fallback, the Llama 2 kind, on sentencepiece's engine: tokenizer.model or tokenizer.json.

Either file is rebuilt as a model that normalizes nothing and adds no space before the text; where that space goes is
decided here, because Hugging Face's answer differs from sentencepiece's and between its own versions.
Format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from torchft.errors import UserError
from torchft.tokenizers.bpe import merge_order

Prefix = Literal["never", "first", "always", "forced"]  # forced: also before a text that starts with a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # types of a piece
SPACE = "\u2581"  # how a piece spells a space
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")

Piece = tuple[str, float, int]  # text, score, type


class SentencePieceBPE:
    """The engine of a sentencepiece vocabulary: text without added tokens <-> ids."""

    def __init__(self, pieces: list[Piece], path: Path, *, prefix: Prefix) -> None:
        if (num_bytes := sum(kind == BYTE for _, _, kind in pieces)) != 256:
            raise UserError(f"{path}: byte fallback needs 256 byte tokens, <0x00> to <0xFF>, and it has {num_bytes}")
        self.vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
        self.prefix = prefix
        self._engine = sentencepiece.SentencePieceProcessor(model_proto=_write_model(pieces))
        self.token_bytes = {i: _piece_bytes(text) for text, i in self.vocab.items()}

    def normalize(self, text: str) -> str:
        return text.replace(SPACE, " ")  # the two are one character to the vocabulary

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """Ids of ``text``, in which nothing is special. ``at_start``: nothing comes before it."""
        text = self.normalize(text)
        return self._engine.encode(" " + text if self._has_prefix(text, at_start) else text)

    def widths(self, ids: list[int], text: str, *, at_start: bool) -> list[int]:
        """How many bytes of the normalized ``text`` each token covers; the added space counts as none."""
        widths = [len(self.token_bytes[i]) for i in ids]
        if self._has_prefix(self.normalize(text), at_start):
            widths[0] -= 1
        return widths

    def decode(self, ids: list[int], added: dict[int, str]) -> str:
        """The text of ``ids``, less the space that ``encode`` adds to its start."""
        parts = [added[i].encode() if i in added else self.token_bytes.get(i, b"") for i in ids]
        text = b"".join(parts).decode(errors="replace")
        return text if self.prefix == "never" else text.removeprefix(" ")

    def _has_prefix(self, text: str, at_start: bool) -> bool:
        if self.prefix == "forced":
            return True
        wanted = self.prefix == "always" or (self.prefix == "first" and at_start)
        return wanted and not text.startswith(" ")


def from_json(spec: dict[str, Any], added: set[str], path: Path, *, prefix: Prefix | None) -> SentencePieceBPE:
    """The engine that tokenizer.json describes. ``prefix`` overrides what the file says about the leading space."""
    model = spec["model"]
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(option):
            raise UserError(f"{path}: model.{option} is {model[option]!r}, which torchft does not support here")
    rank = {token: i for i, token in enumerate(merge_order(model, path))}
    prefix = prefix or _prefix(spec, path)
    names = {i: token for token, i in model["vocab"].items()}

    def piece(i: int) -> Piece:
        token = names.get(i, f"<hole {i}>")
        if _BYTE.fullmatch(token):
            return token, 0.0, BYTE
        if token in added or (token not in rank and len(token) > 1) or i not in names:
            return token, 0.0, CONTROL  # never made from text
        return token, -float(rank.get(token, 0)), NORMAL

    return SentencePieceBPE([piece(i) for i in range(max(names) + 1)], path, prefix=prefix)


def from_model(path: Path, *, prefix: Prefix) -> tuple[SentencePieceBPE, list[tuple[int, str, bool]]]:
    """The engine of a sentencepiece tokenizer.model, and its (id, text, whether special) that text must be cut at."""
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = [_read_piece(value) for number, value in fields if number == 1]
        trainer = dict(_fields(next(value for number, value in fields if number == 2)))
        normalizer = dict(_fields(next((value for number, value in fields if number == 3), b"")))
    except (IndexError, ValueError, StopIteration, struct.error, UnicodeDecodeError, TypeError):
        raise UserError(
            f"{path} is neither a sentencepiece model nor a list of base64 tokens: download it again"
        ) from None
    if trainer.get(3, 1) != 2 or not trainer.get(35, 0):
        kind = {1: "Unigram", 2: "BPE", 3: "word", 4: "character"}.get(trainer.get(3, 1), "unknown")
        raise UserError(
            f"{path}: a sentencepiece model of kind {kind} with{'' if trainer.get(35) else 'out'} byte fallback; "
            "torchft knows BPE with byte fallback (Llama 2)"
        )
    if normalizer.get(2) or normalizer.get(4, 1):
        raise UserError(
            f"{path}: the sentencepiece model normalizes text ({normalizer.get(1, b'').decode()!r}), which torchft "
            "does not support"
        )
    cut = [
        (i, text, kind != USER_DEFINED)
        for i, (text, _, kind) in enumerate(pieces)
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    return SentencePieceBPE(
        [(t, s, k if k in (NORMAL, BYTE) else CONTROL) for t, s, k in pieces], path, prefix=prefix
    ), cut


def _prefix(spec: dict[str, Any], path: Path) -> Prefix:
    """Where tokenizer.json puts the space before a text."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    prepend = {"type": "Prepend", "prepend": SPACE}
    metaspace = {"type": "Metaspace", "replacement": SPACE, "split": False}
    schemes: list[Prefix] = ["never", "first", "always"]
    by_pre_tokenizer: list[tuple[Any, Any, Prefix]] = [(None, metaspace | {"prepend_scheme": s}, s) for s in schemes]
    for normalizer, pre_tokenizer, prefix in [
        *by_pre_tokenizer,
        ({"type": "Sequence", "normalizers": [prepend, replace]}, None, "forced"),
        ({"type": "Sequence", "normalizers": [replace]}, None, "never"),
        (replace, None, "never"),
        (replace, split, "never"),  # Gemma: there is no space left to split at
    ]:
        if (spec.get("normalizer"), spec.get("pre_tokenizer")) == (normalizer, pre_tokenizer):
            return prefix
    raise UserError(
        f"{path}: unknown normalizer {spec.get('normalizer')} with pre_tokenizer {spec.get('pre_tokenizer')}; with "
        "byte fallback torchft knows Metaspace without split, and Prepend and Replace of a space (Llama 2)"
    )


def _piece_bytes(piece: str) -> bytes:
    match = _BYTE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece.replace(SPACE, " ").encode()


def _read_piece(message: bytes) -> Piece:
    fields = dict(_fields(message))
    return fields[1].decode(), struct.unpack("<f", fields.get(2, bytes(4)))[0], fields.get(3, NORMAL)


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protocol buffer: int for a varint, else bytes."""
    i = 0

    def varint() -> int:
        nonlocal i
        value = shift = 0
        while True:
            byte = message[i]
            i += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while i < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 2: None, 5: 4}[wire]
        if size is None:
            size = varint()
        if i + size > len(message):
            raise ValueError("a field goes beyond the end")
        yield number, message[i : i + size]
        i += size


def _write_model(pieces: list[Piece]) -> bytes:
    """A BPE model of these pieces with byte fallback, which normalizes nothing and adds no space."""
    unknown = ("<no byte lacks a piece>", 0.0, UNKNOWN)  # the engine wants one; with all bytes it is never made
    out = bytearray()
    for text, score, kind in [*pieces, unknown]:
        out += _bytes(1, _bytes(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _int(3, kind))
    out += _bytes(2, _int(3, 2) + _int(4, len(pieces) + 1) + _int(35, 1) + _int(40, len(pieces)))
    out += _bytes(3, _bytes(1, b"identity") + _int(3, 0) + _int(4, 0) + _int(5, 1))
    return bytes(out)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _int(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value
