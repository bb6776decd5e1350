"""Which of a checkpoint's tokenizer files say what, by Hugging Face's rules, and the Tokenizer that they make."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from torchft.errors import UserError
from torchft.files import read_json
from torchft.tokenizers.added import AddedToken, AddedTokens
from torchft.tokenizers.affixes import Around
from torchft.tokenizers.chat_formats import choose
from torchft.tokenizers.tokenizer import SpecialIds, Tokenizer
from torchft.tokenizers.vocabulary_files import Vocabulary, content, read_vocabulary

log = logging.getLogger(__name__)

FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tiktoken.model", "vocab.txt",
    "sentencepiece.bpe.model",
)  # fmt: skip
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


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
    vocabulary = read_vocabulary(folder, config)
    named = vocabulary.named | {name: content(config[name]) for name in NAMED if config.get(name)}
    added = AddedTokens(_added(folder, config, vocabulary, named).values())
    lookup = vocabulary.vocab | {token.content: token.id for token in added}

    generation = _read(folder / "generation_config.json")
    ends = generation.get("eos_token_id", _read(folder / "config.json").get("eos_token_id"))
    stop = [ends] if isinstance(ends, int) else list(ends or [])
    eos = lookup[named["eos_token"]] if "eos_token" in named else next(iter(stop), None)
    if eos is None:
        raise UserError(f"{folder}: no file names the end-of-text token; set eos_token in tokenizer_config.json")
    bos = lookup[named["bos_token"]] if "bos_token" in named else None
    around = vocabulary.around
    if around is None:
        before = (bos,) if bos is not None and config.get("add_bos_token") else ()
        after = (eos,) if config.get("add_eos_token") else ()
        around = Around(before, after, between=(*after, *before))
    special = SpecialIds(bos=bos, eos=eos, pad=lookup.get(named.get("pad_token", ""), eos), around=around)
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


def _added(
    folder: Path, config: dict[str, Any], vocabulary: Vocabulary, named: dict[str, str]
) -> dict[str, AddedToken]:
    """The vocabulary's added tokens and those that the configs add. UserError for one without an id."""
    added = dict(vocabulary.added)
    for i, entry in (config.get("added_tokens_decoder") or {}).items():
        added.setdefault(entry["content"], AddedToken.from_json(entry, int(i)))
    for text, i in _read(folder / "added_tokens.json").items():
        added.setdefault(text, AddedToken(content=text, id=i, special=text in named.values()))
    for name, text in [*named.items(), *_extra(config)]:
        if text in added:
            continue
        if text in vocabulary.vocab:
            added[text] = AddedToken(content=text, id=vocabulary.vocab[text], special=True)
        elif name in NAMED and name not in ("bos_token", "eos_token"):
            log.warning("%s: %s %r is not in the vocabulary and is left out", folder, name, text)
        else:
            raise UserError(
                f"{folder / 'tokenizer_config.json'}: {name} {text!r} is not in the vocabulary, so it has no id"
            )
    return added


def _extra(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(key) or []
        for entry in listed.values() if isinstance(listed, dict) else listed:
            yield key, content(entry)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
