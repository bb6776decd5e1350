"""Files of sentencepiece, read and written as protocol buffers: the pieces, and what the trainer and normalizer say.

Format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torchft.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # types of a piece
SPACE = "\u2581"  # how a piece spells a space
KINDS = {1: "Unigram", 2: "BPE", 3: "word", 4: "character"}

Piece = tuple[str, float, int]  # text, score, type


class ModelFile(NamedTuple):
    """A sentencepiece model."""

    pieces: list[Piece]
    kind: str  # of KINDS
    byte_fallback: bool
    rule: str  # the normalizer's name
    charsmap: bytes  # what it replaces, compiled; b"": nothing
    drops_spaces: bool  # at both ends of a text, and all but one in a row


def read_model(path: Path) -> ModelFile:
    """UserError for a file that is none."""
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = [_read_piece(value) for number, value in fields if number == 1]
        trainer = dict(_fields(next(value for number, value in fields if number == 2)))
        normalizer = dict(_fields(next((value for number, value in fields if number == 3), b"")))
        return ModelFile(
            pieces=pieces,
            kind=KINDS.get(trainer.get(3, 1), "unknown"),
            byte_fallback=bool(trainer.get(35, 0)),
            rule=normalizer.get(1, b"").decode(),
            charsmap=normalizer.get(2, b""),
            drops_spaces=bool(normalizer.get(4, 1)),
        )
    except (IndexError, ValueError, StopIteration, struct.error, UnicodeDecodeError, TypeError, AttributeError):
        raise UserError(
            f"{path} is neither a sentencepiece model nor a list of base64 tokens: download it again"
        ) from None


def write_model(pieces: Sequence[Piece], *, kind: str) -> bytes:
    """A model of these pieces, which normalizes nothing and adds no space; BPE with byte fallback.

    The engine wants a piece for what is unknown. If there is none, one is added, which is never made if every byte has
    a piece.
    """
    unknown = [i for i, piece in enumerate(pieces) if piece[2] == UNKNOWN] or [len(pieces)]
    own: list[Piece] = [] if unknown[0] < len(pieces) else [("<no byte lacks a piece>", 0.0, UNKNOWN)]
    number = next(number for number, name in KINDS.items() if name == kind)
    out = bytearray()
    for text, score, type_ in [*pieces, *own]:
        out += _bytes(1, _bytes(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _int(3, type_))
    falls_back = int(any(type_ == BYTE for _, _, type_ in pieces))
    out += _bytes(2, _int(3, number) + _int(4, len(pieces) + len(own)) + _int(35, falls_back) + _int(40, unknown[0]))
    out += _bytes(3, _bytes(1, b"identity") + _int(3, 0) + _int(4, 0) + _int(5, 1))
    return bytes(out)


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
