"""Folders of the sentence-transformers library: a Hub folder, and beside it how its hidden states become embeddings.

What such a folder says (pooling, prompts, length, similarity) is what a run begins with, and what it leaves says again.
Files: https://sbert.net/docs/sentence_transformer/usage/custom_models.html
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torchft.errors import UserError
from torchft.files import read_json
from torchft.ranks import is_main

MODES = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}  # our word -> its
SHORT = {"cls": "cls", "mean": "mean", "lasttoken": "last"}  # the newer spelling -> ours
PACKAGE = "sentence_transformers.models."
SIMILARITIES = ("cosine", "dot")
UNBOUNDED = 1_000_000  # a tokenizer without a limit says 10^30


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """How texts become embeddings. As it stands: of a folder that does not say."""

    pooling: str | None = None  # "cls", "mean" or "last"
    similarity: str = "cosine"  # or "dot"
    is_normalized: bool = True  # embeddings have length 1, so that both are the same
    max_seq_len: int | None = None  # tokens of a text, what is longer loses its end
    prompts: dict[str, str] = field(default_factory=dict)  # by name; each is put before a text
    default_prompt: str | None = None  # the name of the one that texts get for which none is named

    def choose(self, *, pooling: str | None = None, similarity: str | None = None) -> "Embedder":
        """It with another pooling or similarity, where one is given."""
        found = self if pooling is None else replace(self, pooling=pooling)
        if similarity is None:
            return found
        return replace(found, similarity=similarity, is_normalized=found.is_normalized and similarity == "cosine")

    def prompt(self, *names: str) -> str:
        """What is put before a text of that name: the first of ``names`` that has a prompt, else the default one."""
        return next((self.prompts[name] for name in (*names, self.default_prompt or "") if self.prompts.get(name)), "")

    @property
    def by_angle(self) -> bool:
        """Whether the length of an embedding says nothing."""
        return self.similarity == "cosine" or self.is_normalized

    def settings_of_texts(self) -> dict[str, Any]:
        """What a data set of texts needs to know, in its words."""
        found: dict[str, Any] = {
            "query_prompt": self.prompt("query"),
            "document_prompt": self.prompt("document", "passage", "corpus"),
            "text_len": self.max_seq_len,
        }
        return {name: value for name, value in found.items() if value}


def read_embedder(folder: Path) -> Embedder:
    """What ``folder`` says, if it is one of sentence-transformers.

    UserError for what torchft does not have: other poolings, several, other modules than Transformer, Pooling,
    Normalize; prompts that pooling passes over; lower case; similarities by distance.
    """
    if not (folder / "modules.json").is_file():
        return Embedder()
    modules: Any = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    kinds = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules}
    if strange := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise UserError(f"{folder / 'modules.json'} has {sorted(strange)[0]}, which torchft does not have")
    if kinds.get("Transformer") or "Pooling" not in kinds:
        raise UserError(f"{folder / 'modules.json'}: expected a Transformer in the folder itself, and a Pooling")
    about = _read(folder / "config_sentence_transformers.json")
    prompts = {name: str(text) for name, text in (about.get("prompts") or {}).items() if text is not None}
    default = about.get("default_prompt_name")
    if default and default not in prompts:
        raise UserError(
            f"{folder / 'config_sentence_transformers.json'}: default_prompt_name is {default!r}, but prompts has only "
            f"{', '.join(prompts) or 'none'}"
        )
    similarity = about.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise UserError(
            f"{folder / 'config_sentence_transformers.json'}: similarity_fn_name is {similarity!r}; torchft has "
            f"{' and '.join(SIMILARITIES)}"
        )
    return Embedder(
        pooling=_pooling(folder / kinds["Pooling"] / "config.json", has_prompts=any(prompts.values())),
        similarity=similarity,
        is_normalized="Normalize" in kinds,
        max_seq_len=_max_seq_len(folder),
        prompts=prompts,
        default_prompt=default or None,
    )


def save_modules(folder: Path, embedder: Embedder, *, dim: int, pad_token: str) -> None:
    """Make the Hub folder ``folder`` one of sentence-transformers, which gives embeddings of ``dim``.

    ``pad_token``: of a tokenizer that names none. Of several ranks the main one writes.
    """
    if not is_main():
        return
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    if embedder.is_normalized:
        paths["Normalize"] = "2_Normalize"
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": PACKAGE + kind} for i, (kind, path) in enumerate(paths.items())
    ]
    modes = {f"pooling_mode_{word}": mode == embedder.pooling for mode, word in MODES.items()}
    files: dict[str, Any] = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": dim, **modes, "include_prompt": True},
        "sentence_bert_config.json": {"max_seq_length": embedder.max_seq_len, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": embedder.prompts,
            "default_prompt_name": embedder.default_prompt,
            "similarity_fn_name": embedder.similarity,
        },
    }
    for module in paths.values():
        (folder / module).mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    path = folder / "tokenizer_config.json"
    tokenizer = _read(path)
    if not tokenizer.get("pad_token"):  # without one no batch can be made; which it is changes nothing
        text = json.dumps(tokenizer | {"pad_token": pad_token}, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def _pooling(path: Path, *, has_prompts: bool) -> str:
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
    if has_prompts and config.get("include_prompt") is False:
        raise UserError(f"{path}: include_prompt is false, but torchft pools the tokens of prompts too; set it to true")
    return modes[0]


def _max_seq_len(folder: Path) -> int | None:
    """The older library's own file comes before the tokenizer's limit, which is the newer one's word for it."""
    own = _read(folder / "sentence_bert_config.json")
    if own.get("do_lower_case"):
        raise UserError(
            f"{folder / 'sentence_bert_config.json'}: do_lower_case is true, which torchft does not do; set it to "
            "false if the tokenizer does it anyway, or write the data in small letters"
        )
    length = own.get("max_seq_length") or _read(folder / "tokenizer_config.json").get("model_max_length")
    return int(length) if length and length < UNBOUNDED else None


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
