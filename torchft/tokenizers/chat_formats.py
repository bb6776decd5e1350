"""Which chat format a checkpoint gets: a family's own if it renders just what the template does, else the template."""

import importlib
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchft import registry
from torchft.errors import UserError
from torchft.files import read_json
from torchft.names import nearest
from torchft.tokenizers.added import AddedTokens
from torchft.tokenizers.chat import Message, Segment, prepare
from torchft.tokenizers.templates import TemplateChat

log = logging.getLogger(__name__)

ChatFormat = Callable[..., list[Segment]]

# The tokens that show which format a base checkpoint was given control tokens for.
MARKS_OF = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "llama4": ("<|header_start|>", "<|header_end|>", "<|eot|>"),
}

_USER: Message = {"role": "user", "content": " Hi\n"}
_ANSWER: Message = {"role": "assistant", "content": "\tHello there \n"}
_SYSTEM: Message = {"role": "system", "content": " Be brief. "}
_TOOL = {"type": "function", "function": {"name": "add", "description": "Größe", "parameters": {"type": "object"}}}
_CALL: Message = {
    "role": "assistant",
    "tool_calls": [
        {"id": "functions.add:0", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "ü"}}}
    ],
}
_RESULT: Message = {"role": "tool", "tool_call_id": "functions.add:0", "content": '{"sum": 2}'}
PROBES: list[tuple[list[Message], dict[str, Any]]] = [
    ([_USER, _ANSWER], {}),
    ([_SYSTEM, _USER, _ANSWER, _USER, _ANSWER], {}),
    ([_SYSTEM, _USER], {"add_generation_prompt": True}),
    ([_USER, _ANSWER, _USER], {"add_generation_prompt": True}),
    ([_USER, {"role": "assistant", "content": ""}], {}),
    ([_ANSWER, _USER, _ANSWER], {}),
    ([_USER, _ANSWER], {"tools": [_TOOL]}),
    ([_SYSTEM, _USER, _CALL, _RESULT, _ANSWER], {"tools": [_TOOL, _TOOL]}),
    ([_USER, _CALL, {**_RESULT, "content": {"sum": 2}}, _ANSWER], {}),
]


def choose(
    folder: Path, config: dict[str, Any], name: str | None, special: dict[str, str], added: AddedTokens
) -> tuple[ChatFormat | None, str | None]:
    """The chat format of a checkpoint, None when it has none; and its template where the folder's files say another."""
    sources, where = _named(name, folder, added) if name else _own(folder, config)
    is_own = bool(sources) and not name
    if not sources:
        family = next((f for f, tokens in MARKS_OF.items() if all(t in added.by_content for t in tokens)), None)
        if family is None:
            return None, None
        log.info(
            "%s has no chat template; its control tokens are those of %s, so that chat format is used", folder, family
        )
        sources, where = _named(family, folder, added)
    template = TemplateChat(sources, where, special, added)
    return native(template) or template, None if is_own else sources["default"]


def native(template: TemplateChat) -> ChatFormat | None:
    """The family's function that renders every probe as the template does, whose own marks win."""
    if any(t.has_marks for t in template.templates.values()):
        return None
    said = [_attempt(template.text, messages, options) for messages, options in PROBES]
    for name in registry.names("chat_format"):
        chat = registry.resolve(name)
        if all(_attempt(chat, messages, options) == text for (messages, options), text in zip(PROBES, said)):
            return chat
    return None


def _missing(chat: ChatFormat, added: AddedTokens) -> list[str]:
    """The control tokens that a format writes and a vocabulary lacks, so that they would be spelled out as text."""
    written = "".join(segment.text for segment in chat([_USER, _ANSWER]) if segment.control)
    return sorted({token for token in re.findall(r"<[^<>\s]+>", written) if token not in added.by_content})


def _attempt(chat: Callable[..., Any], messages: list[Message], options: dict[str, Any]) -> str | None:
    """What ``chat`` renders; None where it refuses."""
    prompt = options.get("add_generation_prompt", False)
    try:
        rendered = chat(prepare(messages, add_generation_prompt=prompt, train_on="assistant"), **options)
    except UserError:
        return None
    return rendered if isinstance(rendered, str) else "".join(segment.text for segment in rendered)


def _named(name: str, folder: Path, added: AddedTokens) -> tuple[dict[str, str], str]:
    """The template that the user names: a file, or a family's."""
    if name.endswith(".jinja"):
        return {"default": _text(Path(name).expanduser())}, name
    families = {full.split(".")[-2]: full for full in registry.names("chat_format") if full.endswith(".chat")}
    family = name.split(".")[-2] if name in families.values() else name
    if family not in families:
        raise UserError(
            f"unknown chat_format {name!r}{nearest(name, families)}; known: {', '.join(families)}, "
            "or the path of a .jinja file"
        )
    if missing := _missing(registry.resolve(families[family]), added):
        raise UserError(
            f"chat_format {family} needs {', '.join(missing)}, which the vocabulary of {folder} does not have"
        )
    module = importlib.import_module(families[family].rpartition(".")[0])
    return {"default": module.CHAT_TEMPLATE}, f"chat_format {family}"


def _own(folder: Path, config: dict[str, Any]) -> tuple[dict[str, str], str]:
    """The checkpoint's templates by name: a file of its own beats tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if path.is_file():
        return {"default": _text(path)} | {p.stem: _text(p) for p in more}, str(path)
    found = config.get("chat_template")
    where = folder / "tokenizer_config.json"
    if found is None and (folder / "chat_template.json").is_file():
        where = folder / "chat_template.json"
        found = read_json(where).get("chat_template")
    if found is None or isinstance(found, str):
        return {"default": found} if found else {}, str(where)
    named = {entry["name"]: entry["template"] for entry in found}
    if "default" not in named:
        raise UserError(f"{where}: chat_template has no template named 'default', only {', '.join(named)}")
    return named, str(where)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path}: not UTF-8 at byte {e.start}") from None
