"""Sentencepiece Unigram, the XLM-RoBERTa kind, on sentencepiece's engine: sentencepiece.bpe.model or tokenizer.json.

The text is normalized here, as Hugging Face does it (`Charsmap`), and cut at white space; each word begins with the
character that spells a space. https://arxiv.org/abs/1804.10959
"""

import base64
import re
from pathlib import Path
from typing import Any

import sentencepiece

from torchft.errors import UserError
from torchft.tokenizers.charsmap import Charsmap
from torchft.tokenizers.spm_file import CONTROL, NORMAL, SPACE, UNKNOWN, Piece, read_model, write_model

_WORDS = re.compile(r"[\S\x1c-\x1f]+")  # what Unicode calls white space; Python's \s adds four separators
_PARTS = re.compile(r"[^ ]+")
FIRST = ("<s>", "<pad>", "</s>", "<unk>")  # fairseq's, in place of a model's own <unk>, <s>, </s>
LAST = "<mask>"
WORDS = {"type": "WhitespaceSplit"}
PREFIX = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "always", "split": True}


class Unigram:
    """The engine of a Unigram vocabulary: text without added tokens <-> ids."""

    def __init__(self, pieces: list[Piece], *, charsmap: bytes, only_spaces: bool = False) -> None:
        """``only_spaces``: they part words, and other white space only ends a text."""
        self.vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
        self._engine = sentencepiece.SentencePieceProcessor(model_proto=write_model(pieces, kind="Unigram"))
        self._charsmap = Charsmap(charsmap) if charsmap else None
        self._only_spaces = only_spaces
        self.token_bytes = {i: text.replace(SPACE, " ").encode() for text, i in self.vocab.items()}

    def normalize(self, text: str) -> str:
        return self._charsmap.normalize(text) if self._charsmap else text

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """Ids of ``text``, in which nothing is special; each run of text begins with a space, wherever it stands."""
        text = self.normalize(text)
        words = _PARTS.findall(text[: _end(text)]) if self._only_spaces else _WORDS.findall(text)
        return self._engine.encode("".join(word if word[0] == SPACE else f" {word}" for word in words))

    def widths(self, ids: list[int], text: str, *, at_start: bool) -> list[int]:
        raise AssertionError("only a chat's tokens are learned in part, and no Unigram vocabulary has a chat format")

    def decode(self, ids: list[int], added: dict[int, str]) -> str:
        """The text of ``ids``, less the first space; what was normalized does not come back."""
        parts = [added[i].encode() if i in added else self.token_bytes.get(i, b"") for i in ids]
        return b"".join(parts).decode(errors="replace").removeprefix(" ")


def from_json(spec: dict[str, Any], added: set[str], path: Path, *, is_xlm_roberta: bool) -> Unigram:
    """The engine that tokenizer.json describes, or UserError for any part of it that we do not know.

    ``is_xlm_roberta``: the tokenizer's class, with which transformers 5 disregards what the file says about spaces.
    """
    model = spec["model"]
    if model.get("byte_fallback") or not isinstance(model.get("unk_id"), int):
        raise UserError(
            f"{path}: model.byte_fallback is {model.get('byte_fallback')}, unk_id {model.get('unk_id')}; of Unigram "
            "torchft knows a token for what is unknown, and no bytes (XLM-RoBERTa)"
        )
    normalizers = _steps(spec.get("normalizer"), "normalizers")
    maps = [step["precompiled_charsmap"] for step in normalizers if step["type"] == "Precompiled"]
    only_spaces = not is_xlm_roberta and _parts_only_at_spaces(
        normalizers, _steps(spec.get("pre_tokenizer"), "pretokenizers"), path
    )
    pieces = [(text, float(score), NORMAL) for text, score in model["vocab"]]
    for i, (text, score, _) in enumerate(pieces):
        if i == model["unk_id"]:
            pieces[i] = (text, score, UNKNOWN)
        elif text in added or not text:
            pieces[i] = (text or f"<hole {i}>", score, CONTROL)  # never made from text
    return Unigram(pieces, charsmap=base64.b64decode(maps[0]) if maps else b"", only_spaces=only_spaces)


def from_model(path: Path) -> Unigram:
    """The engine of XLM-RoBERTa's sentencepiece.bpe.model, whose ids are fairseq's: `FIRST` before, `LAST` behind."""
    model = read_model(path)
    if model.kind != "Unigram" or model.byte_fallback:
        raise UserError(f"{path}: a sentencepiece model of kind {model.kind}; XLM-RoBERTa's is Unigram without bytes")
    first: list[Piece] = [(text, 0.0, UNKNOWN if text == "<unk>" else CONTROL) for text in FIRST]
    return Unigram([*first, *model.pieces[3:], (LAST, 0.0, CONTROL)], charsmap=model.charsmap)


def _steps(node: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if not node:
        return []
    return list(node[inner]) if node["type"] == "Sequence" else [node]


def _parts_only_at_spaces(normalizers: list[dict[str, Any]], pre_tokenizers: list[dict[str, Any]], path: Path) -> bool:
    """False: at all white space. UserError unless any amount of it counts as one."""
    known = [step for step in normalizers if step["type"] != "Precompiled"]
    prefix = [_spelled_out(step) for step in pre_tokenizers]
    strip = {"type": "Strip", "strip_left": False, "strip_right": True}
    blank = {"type": "Replace", "pattern": {"Regex": " {2,}"}}
    if prefix == [WORDS, PREFIX] and known in ([], [blank | {"content": " "}]):
        return False
    if prefix == [PREFIX] and known == [strip, blank | {"content": SPACE}]:
        return True
    raise UserError(
        f"{path}: unknown normalizer {known} with pre_tokenizer {pre_tokenizers}; with Unigram torchft knows "
        "WhitespaceSplit and Metaspace (XLM-RoBERTa), and Metaspace alone where Strip and Replace leave one space"
    )


def _end(text: str) -> int:
    """Where the white space at its end begins."""
    return max((match.end() for match in _WORDS.finditer(text)), default=0)


def _spelled_out(step: dict[str, Any]) -> dict[str, Any]:
    """Metaspace in its newer spelling."""
    if step["type"] != "Metaspace" or "add_prefix_space" not in step:
        return step
    rest = {key: value for key, value in step.items() if key not in ("add_prefix_space", "str_rep")}
    return {"prepend_scheme": "always" if step["add_prefix_space"] else "never", "split": True} | rest
