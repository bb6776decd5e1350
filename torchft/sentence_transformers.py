"""Folders of the sentence-transformers library: a Hub folder, and beside it how its hidden states become embeddings."""

import json
from pathlib import Path
from typing import Any

from torchft.errors import UserError
from torchft.files import read_json
from torchft.ranks import is_main

MODES = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}  # our word -> its
SHORT = {"cls": "cls", "mean": "mean", "lasttoken": "last"}  # the newer spelling -> ours
PACKAGE = "sentence_transformers.models."


def read_pooling(folder: Path) -> str | None:
    """ "cls", "mean" or "last" as ``folder`` says; None if it is no sentence-transformers folder.

    UserError for what torchft does not have: other poolings, several, modules besides Transformer, Pooling, Normalize.
    """
    if not (folder / "modules.json").is_file():
        return None
    modules: Any = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    kinds = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules}
    if strange := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise UserError(f"{folder / 'modules.json'} has {sorted(strange)[0]}, which torchft does not have")
    if kinds.get("Transformer") or "Pooling" not in kinds:
        raise UserError(f"{folder / 'modules.json'}: expected a Transformer in the folder itself, and a Pooling")
    path = folder / kinds["Pooling"] / "config.json"
    config = read_json(path)
    if "pooling_mode" in config:
        found = [config["pooling_mode"]] if isinstance(config["pooling_mode"], str) else list(config["pooling_mode"])
        modes = [SHORT.get(mode, "") for mode in found]
    else:
        words = {f"pooling_mode_{word}": mode for mode, word in MODES.items()}
        found = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
        modes = [words.get(key, "") for key in found]
    if len(modes) != 1 or not modes[0]:
        raise UserError(f"{path} asks for pooling {', '.join(map(str, found))}; torchft has cls, mean and last")
    return modes[0]


def save_modules(
    folder: Path, *, pooling: str, dim: int, seq_len: int, query_prompt: str, document_prompt: str, pad_token: str
) -> None:
    """Make the Hub folder ``folder`` one of sentence-transformers, which gives normalised embeddings of ``dim``.

    ``seq_len``: tokens of a text, what is longer loses its end. ``pad_token``: of a tokenizer that names none. Of
    several ranks the main one writes.
    """
    if not is_main():
        return
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": PACKAGE + kind} for i, (kind, path) in enumerate(paths.items())
    ]
    modes = {f"pooling_mode_{word}": mode == pooling for mode, word in MODES.items()}
    prompts = {name: text for name, text in (("query", query_prompt), ("document", document_prompt)) if text}
    files: dict[str, Any] = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": dim, **modes, "include_prompt": True},
        "sentence_bert_config.json": {"max_seq_length": seq_len, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "2_Normalize").mkdir(exist_ok=True)
    path = folder / "tokenizer_config.json"
    tokenizer = read_json(path) if path.is_file() else {}
    if not tokenizer.get("pad_token"):  # without one no batch can be made; which it is changes nothing
        path.write_text(json.dumps(tokenizer | {"pad_token": pad_token}, indent=2, ensure_ascii=False) + "\n")
