"""Vocabularies of tiktoken's form, a base64 token and its rank in each line: Meta's tokenizer.model of Llama 3, and
tiktoken.model of Kimi K2 and Moonlight. How text is cut and which added tokens follow the ranks is in neither file."""

import base64
import binascii
from pathlib import Path
from typing import Any

from torchft.errors import UserError
from torchft.tokenizers.added import AddedToken
from torchft.tokenizers.bpe import PATTERNS, ByteBPE

NUM_SPECIAL = 256  # ids behind the ranks, of both
# Llama 3.1's names for its own; the rest is <|reserved_special_token_N|>.
LLAMA3 = {
    0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>",
}  # fmt: skip


def llama3(path: Path) -> tuple[ByteBPE, dict[str, AddedToken]]:
    """The engine of Llama 3's tokenizer.model, and the added tokens, of which the first two begin and end a text."""
    engine = _engine(path, PATTERNS["Llama 3"])
    first = 1 + max(engine.token_bytes)
    reserved = iter(range(NUM_SPECIAL))
    names = [LLAMA3.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(NUM_SPECIAL)]
    return engine, {name: AddedToken(content=name, id=first + i, special=True) for i, name in enumerate(names)}


def kimi(path: Path, config: dict[str, Any]) -> tuple[ByteBPE, dict[str, AddedToken]]:
    """The engine of Kimi's tiktoken.model, and the added tokens, some of which tokenizer_config.json names."""
    engine = _engine(path, PATTERNS["Kimi"])
    first = 1 + max(engine.token_bytes)
    named = {int(i): entry for i, entry in (config.get("added_tokens_decoder") or {}).items()}
    added = {}
    for i in range(first, first + NUM_SPECIAL):
        entry = named.get(i, {"content": f"<|reserved_token_{i}|>", "special": True})
        added[entry["content"]] = AddedToken.from_json(entry, i)
    return engine, added


def _engine(path: Path, pattern: str) -> ByteBPE:
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}:{number}: expected a base64 token and its rank, found {line[:40]!r}") from None
    return ByteBPE(ranks, None, pattern=pattern)
