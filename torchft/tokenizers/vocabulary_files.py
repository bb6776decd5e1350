"""What a checkpoint's vocabulary file gives: an engine, added tokens, what stands around a text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchft.errors import UserError
from torchft.files import read_json, what_is
from torchft.tokenizers import bpe, ranks, spm, unigram, wordpiece
from torchft.tokenizers.added import AddedToken
from torchft.tokenizers.affixes import Around, affixes
from torchft.tokenizers.tokenizer import Engine

XLM_ROBERTA = "XLMRobertaTokenizer"
FAIRSEQ = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}  # where no config names others


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What tokenizer.json or tokenizer.model gives."""

    engine: Engine
    vocab: dict[str, int]  # to look names up
    added: dict[str, AddedToken]
    around: Around | None  # None: the file does not say
    named: dict[str, str]  # bos_token and eos_token where no config gives them


def read_vocabulary(folder: Path, config: dict[str, Any]) -> Vocabulary:
    path = folder / "tokenizer.json"
    if path.is_file():
        return _from_json(path, config)
    path = folder / "vocab.txt"
    if path.is_file():
        return _from_wordpiece(wordpiece.from_vocab(path, config), {}, config, path)
    names = ("tokenizer.model", "tiktoken.model", "sentencepiece.bpe.model")
    models = [folder / name for name in names if (folder / name).is_file()]
    if not models:
        raise UserError(
            f"{folder} has neither tokenizer.json nor tokenizer.model; `tune download ORG/MODEL` fetches them"
        )
    path = models[0]
    head = path.open("rb").read(200)
    if kind := what_is(head):
        raise UserError(f"{path} is {kind}")
    if path.name == names[-1]:
        return _from_fairseq(path, config)
    return _from_sentencepiece(path, config) if head[:1] == b"\n" else _from_ranks(path, config)


def _from_json(path: Path, config: dict[str, Any]) -> Vocabulary:
    spec = read_json(path)
    model = spec.get("model")
    entries = spec.get("added_tokens") or []
    added = {entry["content"]: AddedToken.from_json(entry, entry["id"]) for entry in entries}
    if isinstance(model, dict) and model.get("type") == "WordPiece":
        return _from_wordpiece(wordpiece.from_json(spec, path), added, config, path)
    if isinstance(model, dict) and model.get("type") == "Unigram":
        is_xlm_roberta = _class(config) == XLM_ROBERTA
        words = unigram.from_json(spec, set(added), path, is_xlm_roberta=is_xlm_roberta)
        around = affixes(spec.get("post_processor"), path)
        return Vocabulary(engine=words, vocab=words.vocab, added=added, around=around, named=FAIRSEQ)
    if (
        not isinstance(model, dict)
        or not isinstance(model.get("vocab"), dict)
        or not isinstance(model.get("merges"), list)
    ):
        kind = model.get("type") if isinstance(model, dict) else None
        raise UserError(f"{path}: unknown model type {kind!r}; torchft knows BPE, WordPiece, Unigram")
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"{path}: unknown model type {model['type']!r}; torchft knows BPE, WordPiece, Unigram")
    if "ByteLevel" in str(spec.get("pre_tokenizer")):
        engine: Engine = bpe.from_json(spec, set(added), path)
        named = {}
    elif model.get("byte_fallback"):
        is_llama = _class(config) == "LlamaTokenizer"  # transformers 5 then disregards what the file says about spaces
        if not is_llama and spec.get("normalizer") and any(e.get("normalized") for e in entries):
            raise UserError(
                f"{path}: an added token is marked 'normalized' and the normalizer changes it; "
                "set tokenizer_class to LlamaTokenizer"
            )
        engine = spm.from_json(spec, set(added), path, prefix=_llama_prefix(config) if is_llama else None)
        named = {"bos_token": "<s>", "eos_token": "</s>"} if is_llama else {}
    else:
        raise UserError(
            f"{path}: unknown pre_tokenizer {spec.get('pre_tokenizer')}; torchft knows byte-level BPE and BPE with "
            "byte fallback"
        )
    around = affixes(spec.get("post_processor"), path)
    return Vocabulary(engine=engine, vocab=model["vocab"], added=added, around=around, named=named)


def _from_wordpiece(
    engine: wordpiece.WordPiece, added: dict[str, AddedToken], config: dict[str, Any], path: Path
) -> Vocabulary:
    """Around a text stand [CLS] and [SEP], whatever they are called; the latter is its end."""
    named = {name: content(config.get(f"{name}_token", f"[{name.upper()}]")) for name in ("cls", "sep")}
    if absent := [token for token in named.values() if token not in engine.vocab]:
        raise UserError(f"{path} has no {absent[0]!r}, which stands around every text; take the checkpoint's own files")
    cls, sep = (engine.vocab[token] for token in named.values())
    return Vocabulary(
        engine=engine, vocab=engine.vocab, added=added, around=Around((cls,), (sep,), between=(sep,)),
        named={"bos_token": named["cls"], "eos_token": named["sep"]},
    )  # fmt: skip


def _from_sentencepiece(path: Path, config: dict[str, Any]) -> Vocabulary:
    engine, cut = spm.from_model(path, prefix=_llama_prefix(config))
    added = {text: AddedToken(content=text, id=i, special=special) for i, text, special in cut}
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    named = {name: text for name, text in named.items() if text in engine.vocab}
    return Vocabulary(engine=engine, vocab=engine.vocab, added=added, around=None, named=named)


def _from_fairseq(path: Path, config: dict[str, Any]) -> Vocabulary:
    """Control tokens at the places that fairseq gave them."""
    if (kind := _class(config) or XLM_ROBERTA) != XLM_ROBERTA:
        raise UserError(f"{path} is {kind}'s, and torchft reads {XLM_ROBERTA}'s; take a folder with tokenizer.json")
    engine = unigram.from_model(path)
    special = (*unigram.FIRST, unigram.LAST)
    added = {text: AddedToken(content=text, id=engine.vocab[text], special=True) for text in special}
    begin, end = (added[text].id for text in ("<s>", "</s>"))
    around = Around((begin,), (end,), between=(end, end))
    return Vocabulary(engine=engine, vocab=engine.vocab, added=added, around=around, named=FAIRSEQ)


def _from_ranks(path: Path, config: dict[str, Any]) -> Vocabulary:
    if path.name == "tiktoken.model":
        engine, added = ranks.kimi(path, config)
        return Vocabulary(engine=engine, vocab={}, added=added, around=None, named={})
    engine, added = ranks.llama3(path)
    bos, eos, *_ = added
    begin = (added[bos].id,)
    named = {"bos_token": bos, "eos_token": eos}
    return Vocabulary(engine=engine, vocab={}, added=added, around=Around(begin, (), between=begin), named=named)


def _class(config: dict[str, Any]) -> str:
    return str(config.get("tokenizer_class", "")).removesuffix("Fast")


def _llama_prefix(config: dict[str, Any]) -> spm.Prefix:
    """Where LlamaTokenizer of transformers 5 puts a space; ``legacy`` is its word for "before every run of text"."""
    if config.get("add_prefix_space") is False:
        return "never"
    return "always" if config.get("legacy") else "first"


def content(token: Any) -> str:
    """The text of a token that a config names, as an object or as it is."""
    return token["content"] if isinstance(token, dict) else str(token)
