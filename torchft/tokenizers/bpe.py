"""Byte-level BPE on tiktoken's engine: tokenizer.json of the GPT-2, Llama 3 and Qwen kinds; ranks.py has others.

tiktoken encodes 11 to 14 MB/s on one thread, Hugging Face's tokenizers 1.4 to 1.9.
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import tiktoken

from torchft.errors import UserError
from torchft.tokenizers.nfc import nfc

# How a text is cut before the merges run. A regex that is not one of these is refused: the engines' dialects differ,
# and only for these are the ids known to be Hugging Face's. Llama 3's is also that of GLM 4, OLMo 2, Phi 4 and
# SmolLM 3, Digits' that of Command R, Granite and SmolLM 2, o200k's that of Phi 4 mini and gpt-oss.
_BLANKS = r"""\s*[\r\n]+|\s+(?!\S)|\s+"""
_WORD = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"""
_CASED = (  # a word that ends in small letters, and one that does not
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+""",
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*""",
)
_NO_HAN = [word.replace(r"\p{M}]", r"\p{M}&&[^\p{Han}]]") for word in _CASED]
_SUFFIX = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
PATTERNS = {
    "GPT-2": r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
    "Llama 3": rf"""{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}""",
    "Qwen 2": rf"""{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}""",
    "Qwen 3.5": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}|"""
    rf""" ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}""",
    "Tekken": rf"""{"|".join(_CASED)}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}""",
    "o200k": rf"""{"|".join(word + _SUFFIX for word in _CASED)}|\p{{N}}{{1,3}}|"""
    rf""" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}""",
    "Kimi": rf"""[\p{{Han}}]+|{"|".join(word + _SUFFIX for word in _NO_HAN)}|\p{{N}}{{1,3}}|"""
    rf""" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}""",
}
# GPT-2's after every number was cut out by itself, which leaves white space before one at the end of its piece.
DIGITS = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"""
# DeepSeek V3's, one after the other: of what each leaves, the next cuts its pieces. As one regex: what the first two
# take ends a piece, so white space before it may be taken whole; what no regex takes is a piece, too.
DEEPSEEK = (
    r"""\p{N}{1,3}""",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    rf""" ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}""",
)
_KANA = DEEPSEEK[1][:-1]  # and Han
_LETTERS = rf"""[\p{{L}}\p{{M}}&&[^{_KANA}]]"""
_REST = rf"""[^\s\p{{L}}\p{{M}}\p{{P}}\p{{S}}\p{{N}}{_KANA}]"""
DEEPSEEK_AT_ONCE = (
    rf"""{DEEPSEEK[0]}|{_KANA}+|[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{{|}}~][A-Za-z]+|"""
    rf"""[^\r\n\p{{L}}\p{{P}}\p{{S}}\p{{N}}{_KANA}]?{_LETTERS}+| ?[\p{{P}}\p{{S}}&&[^{_KANA}]]+[\r\n]*|\s*[\r\n]+|"""
    rf"""\s+(?![^\s\p{{N}}{_KANA}])|\s+|{_REST}+(?={_REST}{_LETTERS})|{_REST}+"""
)
LONGEST_BLANK = 200_000  # characters of white space in a row; tiktoken's regex engine overflows its stack at about 10^6
_BLANK = re.compile(r"\s+")


class ByteBPE:
    """The engine of a byte-level vocabulary: text without added tokens <-> ids."""

    def __init__(self, ranks: dict[bytes, int], ids: list[int] | None, *, pattern: str, is_nfc: bool = False) -> None:
        """``ranks``: tokens by merge order. ``ids``: rank -> id where the two differ."""
        self._ids = ids
        self.token_bytes = {ids[rank] if ids else rank: token for token, rank in ranks.items()}
        self._num_bytes = {id: len(token) for id, token in self.token_bytes.items()}
        # tiktoken panics when one of the 256 bytes has no rank
        absent = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
        self._num_ranks = len(ids) if ids else max(ranks.values()) + 1
        self._is_whole = not absent
        ranks = ranks | {byte: self._num_ranks + i for i, byte in enumerate(absent)}
        self._engine = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self._is_nfc = is_nfc

    def normalize(self, text: str) -> str:
        return nfc(text) if self._is_nfc else text

    def encode(self, text: str, *, at_start: bool) -> list[int]:
        """Ids of ``text``, in which nothing is special. Raises UserError for what the vocabulary cannot hold."""
        if len(text) > LONGEST_BLANK and max(map(len, _BLANK.findall(text)), default=0) > LONGEST_BLANK:
            raise UserError(f"text holds more than {LONGEST_BLANK:,} characters of white space in a row; remove them")
        ranks = self._engine.encode_ordinary(self.normalize(text))
        if not self._is_whole and max(ranks, default=0) >= self._num_ranks:
            missing = next(c for c in text if max(self._engine.encode_ordinary(c)) >= self._num_ranks)
            raise UserError(f"the tokenizer has no token for {missing!r} (its vocabulary lacks some of the 256 bytes)")
        return list(map(self._ids.__getitem__, ranks)) if self._ids else ranks

    def widths(self, ids: list[int], text: str, *, at_start: bool) -> list[int]:
        """How many bytes of the normalized ``text`` each token covers."""
        return list(map(self._num_bytes.__getitem__, ids))

    def decode(self, ids: list[int], added: dict[int, str]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD, ids without a token nothing."""
        parts = [added[i].encode() if i in added else self.token_bytes.get(i, b"") for i in ids]
        return b"".join(parts).decode(errors="replace")


def from_json(spec: dict[str, Any], added: set[str], path: Path) -> ByteBPE:
    """The engine that a byte-level tokenizer.json describes, or UserError for any part of it that we do not know."""
    model = spec["model"]
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise UserError(f"{path}: model.{option} is {model[option]!r}, which torchft does not support")
    products = merge_order(model, path)
    byte_of = {ord(char): byte for byte, char in _byte_alphabet().items()}
    order = [token for token in model["vocab"] if len(token) == 1 and ord(token) in byte_of] + products
    if model.get("ignore_merges") and (odd := set(model["vocab"]) - set(order) - added):
        raise UserError(f"{path}: no merge makes the token {min(odd)!r}, so its place in the merge order is unknown")
    try:
        tokens = [token.translate(byte_of).encode("latin-1") for token in order]
    except UnicodeEncodeError as e:
        raise UserError(f"{path}: the token {e.object!r} is not spelled in the byte alphabet of ByteLevel") from None
    ids = [model["vocab"][token] for token in order]
    pattern, is_nfc = _pattern(spec, path), _is_nfc(spec, path)
    merged = ids[len(ids) - len(products) :]
    if all(a < b for a, b in pairwise(merged)):  # ids serve as ranks; bytes have no rank of their own
        return ByteBPE(dict(zip(tokens, ids)), None, pattern=pattern, is_nfc=is_nfc)
    return ByteBPE({token: rank for rank, token in enumerate(tokens)}, ids, pattern=pattern, is_nfc=is_nfc)


def merge_order(model: dict[str, Any], path: Path) -> list[str]:
    """The tokens that merges make, first made first. UserError if a merge or the order is not one an engine can keep.

    Both engines merge the pair whose *product* comes first, so the merges of one product must stand together.
    """
    products: dict[str, None] = {}
    last = None
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        product = left + right
        if not (left in model["vocab"] and right in model["vocab"] and product in model["vocab"]):
            raise UserError(f"{path}: the merge {left!r} + {right!r} uses a token that is not in the vocabulary")
        if product != last and product in products:
            raise UserError(
                f"{path}: the merges that make {product!r} are not next to each other; torchft cannot order them"
            )
        products[product] = None
        last = product
    return list(products)


def _pattern(spec: dict[str, Any], path: Path) -> str:
    """The regex of the pre-tokenizer: ByteLevel alone (GPT-2's), or one Split by a known regex and then ByteLevel."""
    node = spec["pre_tokenizer"]
    steps = node["pretokenizers"] if node["type"] == "Sequence" else [node]
    match steps:
        case [{"type": "ByteLevel", "add_prefix_space": False, **rest}] if rest.get("use_regex", True):
            return PATTERNS["GPT-2"]
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, **rest},
        ] if rest.get("use_regex", True):
            return DIGITS
        case [*splits, {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}] if [
            (s.get("pattern", {}).get("Regex", "").replace("\r", r"\r").replace("\n", r"\n"), s.get("behavior"))
            for s in splits
        ] == [(regex, "Isolated") for regex in DEEPSEEK]:
            return DEEPSEEK_AT_ONCE
        case [
            {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": behavior, "invert": invert},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if (behavior, invert) in (("Isolated", False), ("Removed", True)):  # the same, as a regex matches all text
            if regex in PATTERNS.values():
                return regex
            raise UserError(
                f"{path}: pre_tokenizer splits by an unknown regex, {regex!r}; known: {', '.join(PATTERNS)}"
            )
    described = " then ".join(str(step) for step in steps)
    known = ", ".join([*PATTERNS, "DeepSeek"])
    raise UserError(f"{path}: unknown pre_tokenizer {described}; torchft knows those of {known}")


def _is_nfc(spec: dict[str, Any], path: Path) -> bool:
    match spec.get("normalizer"):
        case None | {"type": "Sequence", "normalizers": []}:
            return False
        case {"type": "NFC"} | {"type": "Sequence", "normalizers": [{"type": "NFC"}]}:
            return True
        case other:
            raise UserError(
                f"{path}: unknown normalizer {other}; with a byte-level vocabulary torchft knows NFC and none"
            )


def _byte_alphabet() -> dict[int, str]:
    """byte -> the character that stands for it in tokenizer.json: itself if it prints, else the next from U+0100 on."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in prints]
    return {byte: chr(byte) for byte in prints} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
