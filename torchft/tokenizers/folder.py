"""Which of a checkpoint's tokenizer files say what, by Hugging Face's rules, and the Tokenizer that they make."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from torchft.errors import UserError
from torchft.files import read_json, what_is
from torchft.tokenizers import bpe, ranks, spm, wordpiece
from torchft.tokenizers.added import AddedToken, AddedTokens
from torchft.tokenizers.affixes import affixes
from torchft.tokenizers.chat_formats import choose
from torchft.tokenizers.tokenizer import Engine, SpecialIds, Tokenizer

log = logging.getLogger(__name__)

FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tiktoken.model", "vocab.txt",
)  # fmt: skip
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What tokenizer.json or tokenizer.model gives."""

    engine: Engine
    vocab: dict[str, int]  # to look names up
    added: dict[str, AddedToken]
    before: tuple[int, ...] | None  # None: the file does not say what surrounds a text
    after: tuple[int, ...]
    named: dict[str, str]  # bos_token and eos_token where no config gives them


def load(checkpoint_dir: str | Path, *, chat_format: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    Args:
        chat_format: overrides the folder's chat template: "llama2", "llama3", or the path of a .jinja file.

    Raises UserError for a folder without a tokenizer, and for any part of one that torchft would have to guess at.
    """
    folder = Path(checkpoint_dir).expanduser()
    config = _read(folder / "tokenizer_config.json")
    if not config.get("added_tokens_decoder"):
        config = {**config, **_read(folder / "special_tokens_map.json")}
    vocabulary = _vocabulary(folder, config)
    named = vocabulary.named | {name: _content(config[name]) for name in NAMED if config.get(name)}
    added = AddedTokens(_added(folder, config, vocabulary, named).values())
    lookup = vocabulary.vocab | {token.content: token.id for token in added}

    generation = _read(folder / "generation_config.json")
    ends = generation.get("eos_token_id", _read(folder / "config.json").get("eos_token_id"))
    stop = [ends] if isinstance(ends, int) else list(ends or [])
    eos = lookup[named["eos_token"]] if "eos_token" in named else next(iter(stop), None)
    if eos is None:
        raise UserError(f"{folder}: no file names the end-of-text token; set eos_token in tokenizer_config.json")
    bos = lookup[named["bos_token"]] if "bos_token" in named else None
    before, after = vocabulary.before, vocabulary.after
    if before is None:
        before = (bos,) if bos is not None and config.get("add_bos_token") else ()
        after = (eos,) if config.get("add_eos_token") else ()
    special = SpecialIds(bos=bos, eos=eos, pad=lookup.get(named.get("pad_token", ""), eos), before=before, after=after)
    files = [folder / name for name in FILES if (folder / name).is_file()]
    chat, template = choose(folder, config, chat_format, named, added)
    return Tokenizer(
        vocabulary.engine, added, special, files=files, chat=chat, chat_template=template, stop_ids=stop,
        fingerprint=_fingerprint(folder, chat_format, template) if _is_ours(chat) else "",
    )  # fmt: skip


def token_ids(checkpoint_dir: str | Path, tokens: Sequence[str]) -> list[int]:
    """The ids of added tokens by their text. UserError for what is none of the checkpoint's."""
    tokenizer = load(checkpoint_dir)
    found = {token: tokenizer.encode(token) for token in tokens}
    if strange := [token for token, ids in found.items() if len(ids) != 1]:
        raise UserError(
            f"trainable_tokens: {strange[0]!r} is {len(found[strange[0]])} tokens of {checkpoint_dir}; "
            "`tune vocab` makes a checkpoint in which it is one"
        )
    return [ids[0] for ids in found.values()]


def _is_ours(chat: object) -> bool:
    """Whether it changes only with this package: a format that somebody registered is code that nobody hashes."""
    return chat is None or str(getattr(chat, "__module__", "")).partition(".")[0] == "torchft"


def _fingerprint(folder: Path, chat_format: str | None, template: str | None = None) -> str:
    """Of every file that `load` may read, of the template in use, and of the day if a template may write it."""
    files = [folder / name for name in (*FILES, "config.json", "generation_config.json")]
    files += sorted((folder / "additional_chat_templates").glob("*.jinja"))
    files += [Path(chat_format).expanduser()] if chat_format else []
    digest = hashlib.sha256(f"{chat_format}\n{template}".encode())
    for file in files:
        content = file.read_bytes() if file.is_file() else b""
        day = str(date.today()) if b"strftime_now" in content else ""
        digest.update(f"{file.name} {len(content)} {day}\n".encode() + content)
    return digest.hexdigest()


def _vocabulary(folder: Path, config: dict[str, Any]) -> Vocabulary:
    path = folder / "tokenizer.json"
    if path.is_file():
        return _from_json(path, config)
    path = folder / "vocab.txt"
    if path.is_file():
        return _from_wordpiece(wordpiece.from_vocab(path, config), {}, config, path)
    models = [folder / name for name in ("tokenizer.model", "tiktoken.model") if (folder / name).is_file()]
    if not models:
        raise UserError(
            f"{folder} has neither tokenizer.json nor tokenizer.model; `tune download ORG/MODEL` fetches them"
        )
    path = models[0]
    head = path.open("rb").read(200)
    if kind := what_is(head):
        raise UserError(f"{path} is {kind}")
    return _from_sentencepiece(path, config) if head[:1] == b"\n" else _from_ranks(path, config)


def _from_json(path: Path, config: dict[str, Any]) -> Vocabulary:
    spec = read_json(path)
    model = spec.get("model")
    if isinstance(model, dict) and model.get("type") == "WordPiece":
        listed = {e["content"]: AddedToken.from_json(e, e["id"]) for e in spec.get("added_tokens") or []}
        return _from_wordpiece(wordpiece.from_json(spec, path), listed, config, path)
    if (
        not isinstance(model, dict)
        or not isinstance(model.get("vocab"), dict)
        or not isinstance(model.get("merges"), list)
    ):
        kind = model.get("type") if isinstance(model, dict) else None
        raise UserError(f"{path}: unknown model type {kind!r}; torchft knows BPE and WordPiece")
    if model.get("type", "BPE") != "BPE":
        raise UserError(f"{path}: unknown model type {model['type']!r}; torchft knows BPE and WordPiece")
    entries = spec.get("added_tokens") or []
    added = {entry["content"]: AddedToken.from_json(entry, entry["id"]) for entry in entries}
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
    before, after = affixes(spec.get("post_processor"), path)
    return Vocabulary(engine=engine, vocab=model["vocab"], added=added, before=before, after=after, named=named)


def _from_wordpiece(
    engine: wordpiece.WordPiece, added: dict[str, AddedToken], config: dict[str, Any], path: Path
) -> Vocabulary:
    """Around a text stand [CLS] and [SEP], whatever they are called; the latter is its end."""
    named = {name: _content(config.get(f"{name}_token", f"[{name.upper()}]")) for name in ("cls", "sep")}
    if absent := [token for token in named.values() if token not in engine.vocab]:
        raise UserError(f"{path} has no {absent[0]!r}, which stands around every text; take the checkpoint's own files")
    cls, sep = (engine.vocab[token] for token in named.values())
    return Vocabulary(
        engine=engine, vocab=engine.vocab, added=added, before=(cls,), after=(sep,),
        named={"bos_token": named["cls"], "eos_token": named["sep"]},
    )  # fmt: skip


def _from_sentencepiece(path: Path, config: dict[str, Any]) -> Vocabulary:
    engine, cut = spm.from_model(path, prefix=_llama_prefix(config))
    added = {text: AddedToken(content=text, id=i, special=special) for i, text, special in cut}
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    named = {name: text for name, text in named.items() if text in engine.vocab}
    return Vocabulary(engine=engine, vocab=engine.vocab, added=added, before=None, after=(), named=named)


def _from_ranks(path: Path, config: dict[str, Any]) -> Vocabulary:
    if path.name == "tiktoken.model":
        engine, added = ranks.kimi(path, config)
        return Vocabulary(engine=engine, vocab={}, added=added, before=None, after=(), named={})
    engine, added = ranks.llama3(path)
    bos, eos, *_ = added
    named = {"bos_token": bos, "eos_token": eos}
    return Vocabulary(engine=engine, vocab={}, added=added, before=(added[bos].id,), after=(), named=named)


def _added(
    folder: Path, config: dict[str, Any], vocabulary: Vocabulary, named: dict[str, str]
) -> dict[str, AddedToken]:
    """The vocabulary's added tokens and those that the configs add. UserError for one without an id."""
    added = dict(vocabulary.added)
    for i, entry in (config.get("added_tokens_decoder") or {}).items():
        added.setdefault(entry["content"], AddedToken.from_json(entry, int(i)))
    for content, i in _read(folder / "added_tokens.json").items():
        added.setdefault(content, AddedToken(content=content, id=i, special=content in named.values()))
    for name, content in [*named.items(), *_extra(config)]:
        if content in added:
            continue
        if content in vocabulary.vocab:
            added[content] = AddedToken(content=content, id=vocabulary.vocab[content], special=True)
        elif name in NAMED and name not in ("bos_token", "eos_token"):
            log.warning("%s: %s %r is not in the vocabulary and is left out", folder, name, content)
        else:
            raise UserError(
                f"{folder / 'tokenizer_config.json'}: {name} {content!r} is not in the vocabulary, so it has no id"
            )
    return added


def _extra(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(key) or []
        for entry in listed.values() if isinstance(listed, dict) else listed:
            yield key, _content(entry)


def _class(config: dict[str, Any]) -> str:
    return str(config.get("tokenizer_class", "")).removesuffix("Fast")


def _llama_prefix(config: dict[str, Any]) -> spm.Prefix:
    """Where LlamaTokenizer of transformers 5 puts a space; ``legacy`` is its word for "before every run of text"."""
    if config.get("add_prefix_space") is False:
        return "never"
    return "always" if config.get("legacy") else "first"


def _content(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
