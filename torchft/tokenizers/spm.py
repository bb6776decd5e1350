"""Sentencepiece BPE with byte fallback, the Llama 2 kind, on sentencepiece's engine: tokenizer.model or tokenizer.json.

Either file is rebuilt as a model that normalizes nothing and adds no space before the text; where that space goes is
decided here, because Hugging Face's answer differs from sentencepiece's and between its own versions.
"""

import re
from pathlib import Path
from typing import Any, Literal

import sentencepiece

from torchft.errors import UserError
from torchft.tokenizers.bpe import merge_order
from torchft.tokenizers.spm_file import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    read_model,
    write_model,
)

Prefix = Literal["never", "first", "always", "forced"]  # forced: also before a text that starts with a space
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class SentencePieceBPE:
    """The engine of a sentencepiece vocabulary: text without added tokens <-> ids."""

    def __init__(self, pieces: list[Piece], path: Path, *, prefix: Prefix) -> None:
        if (num_bytes := sum(kind == BYTE for _, _, kind in pieces)) != 256:
            raise UserError(f"{path}: byte fallback needs 256 byte tokens, <0x00> to <0xFF>, and it has {num_bytes}")
        self.vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
        self.prefix = prefix
        self._engine = sentencepiece.SentencePieceProcessor(model_proto=write_model(pieces, kind="BPE"))
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
    model = read_model(path)
    if model.kind != "BPE" or not model.byte_fallback:
        raise UserError(
            f"{path}: a sentencepiece model of kind {model.kind} with{'' if model.byte_fallback else 'out'} byte "
            "fallback; torchft knows BPE with byte fallback (Llama 2), and Unigram without (XLM-RoBERTa)"
        )
    if model.charsmap or model.drops_spaces:
        raise UserError(
            f"{path}: the sentencepiece model normalizes text ({model.rule!r}), which torchft does not support here"
        )
    pieces = model.pieces
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
