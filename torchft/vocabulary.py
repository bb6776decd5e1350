"""New tokens for a checkpoint: a Hub folder with rows for them, which begin as the mean of what their text was."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchft import tokenizers
from torchft.errors import UserError
from torchft.files import new_folder, read_json
from torchft.tokenizers.tokenizer import Tokenizer
from torchft.weights import INDEX, WeightFiles, write_shards

log = logging.getLogger(__name__)

# Ends of the names of tensors with a row per token, and the numbers of rows in config.json.
TABLES = ("embed_tokens.weight", "embed_tokens_per_layer.weight", "lm_head.weight")
NUM_ROWS = ("vocab_size", "vocab_size_per_layer_input")
ROWS_MULTIPLE = 64  # tensor cores like it
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "F8_E4M3": 1}


def add_tokens(source: Path, folder: Path, tokens: Mapping[str, str]) -> dict[str, int]:
    """Write ``source`` with new special ``tokens`` to ``folder``; returns their ids.

    Where the vocabulary has spare rows they are used; else the tables grow, to a multiple of 64. A row is the mean of
    the rows of the token's description, in the output head as in the embedding; a tied head has no rows of its own.

    Args:
        tokens: text -> what it stands for in words, or '' for the text itself.
    """
    tokenizer = tokenizers.load(source)
    ids = _new_ids(tokenizer, tokens, source)
    pieces = {id: tokenizer.encode(tokens[token] or token, control=False) for token, id in ids.items()}
    if empty := [token for token, id in ids.items() if not pieces[id]]:
        raise UserError(f"{empty[0]!r}: its description is no token")
    config = read_json(source / "config.json")
    old = config.get("vocab_size")
    if not isinstance(old, int):
        raise UserError(
            f"{source / 'config.json'} has no vocab_size of its own; of a multimodal model nothing is added"
        )
    need = max(ids.values()) + 1
    num_rows = old if need <= old else -(-need // ROWS_MULTIPLE) * ROWS_MULTIPLE
    files = WeightFiles(source)

    def table(name: str) -> Tensor:
        weight = files.read(name)
        if not name.endswith(TABLES):
            return weight
        grown = weight.new_empty(num_rows, weight.shape[1])
        grown[:old] = weight
        grown[old:] = weight.float().mean(0).to(weight.dtype)  # never met; a logit like the others'
        for id, of in pieces.items():
            grown[id] = weight[of].float().mean(0).to(weight.dtype)
        return grown

    sizes = {}
    for name in sorted(files.names()):
        rows, *rest = files.shape(name) or (1,)
        is_table = name.endswith(TABLES)
        if is_table and (rows != old or not rest):
            raise UserError(f"{source}: {name} has {rows} rows, but config.json says vocab_size {old}")
        sizes[name] = (num_rows if is_table else rows) * torch.Size(rest).numel() * BYTES.get(files.dtype(name), 4)
    with new_folder(folder) as new:
        write_shards(new, sizes, table)
        for file in source.iterdir():
            if file.is_file() and file.suffix != ".safetensors" and file.name not in (INDEX, "download.json"):
                shutil.copyfile(file, new / file.name)
        _write(new / "config.json", config | {key: num_rows for key in NUM_ROWS if key in config})
        _write_tokenizer(new, ids)
    return ids


def _new_ids(tokenizer: Tokenizer, tokens: Mapping[str, str], source: Path) -> dict[str, int]:
    if not tokens:
        raise UserError("name at least one token")
    if not (source / "tokenizer.json").is_file():
        raise UserError(f"{source} has no tokenizer.json, to which tokens are added; download the checkpoint's own")
    for token in tokens:
        if not token.strip() or token != token.strip():
            raise UserError(f"{token!r}: a token is text without white space around it")
        if len(tokenizer.encode(token)) == 1:
            raise UserError(f"{token!r} is a token of {source} already; train its row with trainable_tokens")
    return {token: tokenizer.vocab_size + i for i, token in enumerate(tokens)}


def _write_tokenizer(folder: Path, ids: Mapping[str, int]) -> None:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    path = folder / "tokenizer.json"
    spec = read_json(path)
    spec["added_tokens"] = [*spec.get("added_tokens", []), *({"id": i, "content": t, **flags} for t, i in ids.items())]
    _write(path, spec)
    path = folder / "tokenizer_config.json"
    if path.is_file() and (config := read_json(path)).get("added_tokens_decoder"):
        config["added_tokens_decoder"] |= {str(i): {"content": t, **flags} for t, i in ids.items()}
        _write(path, config)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
