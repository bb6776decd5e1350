"""YAML files as plain trees of dicts, lists and scalars, with the place of every value for error messages.

Scalars follow YAML 1.2, so that nothing changes its meaning silently: ``no`` and ``on`` are text, ``010`` is text,
``1e-5`` is a number. Aliases and tags are refused; ``${other.key}`` does what aliases are for.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from torchft.errors import UserError

SIZE_LIMIT = 1 << 20  # bytes; a config is a page, not a database
DEPTH_LIMIT = 50
BROKEN = object()  # stands for a value whose problem is already noted

_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
_INF_NAN = re.compile(r"[-+]?\.inf|\.nan", re.IGNORECASE)
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}


@dataclass(frozen=True, kw_only=True)
class Document:
    """A config as written. Paths look like ``datasets.0.source``."""

    tree: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict)  # path -> "file:line" or "command line"
    expressions: dict[str, str] = field(default_factory=dict)  # path -> the ${...} that gave the value
    problems: list[str] = field(default_factory=list)

    def fail(self, path: str, message: str) -> None:
        """Note a problem with the value at ``path``."""
        self.problems.append(": ".join(part for part in (nearest_above(self.places, path), path, message) if part))


def nearest_above(table: dict[str, str], path: str) -> str:
    """The entry of ``path``, or else of the nearest node above it; '' if there is none."""
    while path and path not in table:
        path = path.rpartition(".")[0]
    return table.get(path, "")


def join(path: str, key: str | int) -> str:
    """The path of ``key`` below ``path``."""
    return f"{path}.{key}" if path else str(key)


def scalar(text: str) -> bool | int | float | str | None:
    """What a plain (unquoted) YAML 1.2 scalar means."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(text.lower().replace(".", "")) if _INF_NAN.fullmatch(text) else text


def read(file: Path) -> Document:
    """The mapping in a YAML file. UserError with file:line:column if it is not one."""
    node = _compose(_text(file), str(file))
    if node is None:
        raise UserError(f"{file}: the file is empty; a config needs at least one 'key: value'")
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{file}:{node.start_mark.line + 1}: expected 'key: value' lines")
    document = Document(tree={}, places={"": str(file)})
    document.tree.update(_plain(node, "", document, str(file)))
    if document.problems:
        raise UserError(*document.problems)
    return document


def parse(text: str, where: str) -> Any:
    """One value in YAML's flow form, ``[a, b]`` or ``{a: 1}`` or ``"text"``. UserError if it is not valid."""
    node, document = _compose(text, where), Document(tree={})
    value = None if node is None else _plain(node, "", document, where)
    if document.problems:
        raise UserError(*document.problems)
    return value


def write(tree: dict[str, Any]) -> str:
    """YAML text that ``read`` reads back equal."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    is_plain = isinstance(scalar(text), str) and text.replace("\n", "").isprintable()
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else '"')


_Dumper.add_representer(str, _represent_text)


def _text(file: Path) -> str:
    try:
        data = file.read_bytes() if file.stat().st_size <= SIZE_LIMIT else None
    except OSError as e:
        raise UserError(f"{file} cannot be read: {e.strerror}") from None
    if data is None:
        raise UserError(f"{file} is larger than {SIZE_LIMIT >> 10} KiB; that is not a config")
    try:
        return data.decode("utf-8-sig")  # a byte order mark is harmless
    except UnicodeDecodeError as e:
        line, column = _position(data[: e.start].decode("latin-1"))
        raise UserError(f"{file}:{line}:{column}: byte 0x{data[e.start]:02x} is not UTF-8; save it as UTF-8") from None


def _compose(text: str, where: str) -> yaml.Node | None:
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.BaseLoader):
            at = f"{where}:{event.start_mark.line + 1}:{event.start_mark.column + 1}"
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH_LIMIT:
                raise UserError(f"{at}: nested too deeply for a config")
            if isinstance(event, yaml.AliasEvent):  # also the door of the "billion laughs" attack
                raise UserError(f"{at}: YAML aliases (*{event.anchor}) are not supported; write ${{key}} instead")
        return yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.reader.ReaderError as e:
        line, column = _position(text[: e.position])
        raise UserError(f"{where}:{line}:{column}: the character {chr(e.character)!r} is not allowed") from None
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        hint = "; indent with spaces, not tabs" if r"'\t'" in str(e.problem) else ""
        raise UserError(f"{where}:{mark.line + 1}:{mark.column + 1}: not valid YAML: {e.problem}{hint}") from None


def _plain(node: yaml.Node, path: str, document: Document, where: str) -> Any:
    at = f"{where}:{node.start_mark.line + 1}"
    document.places.setdefault(path, at)
    if node.tag not in _PLAIN_TAGS:
        document.fail(path, f"the YAML tag {node.tag!r} is not supported; remove it")
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, join(path, i), document, where) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return scalar(node.value) if node.style is None else node.value
    tree: dict[str, Any] = {}
    for key, value in node.value:
        at = f"{where}:{key.start_mark.line + 1}"
        if not isinstance(key, yaml.ScalarNode) or (key.style is None and not isinstance(scalar(key.value), str)):
            shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
            document.problems.append(f"{at}: keys must be text, found {shown}; quote it")
            continue
        child = join(path, key.value)
        if key.value in tree:
            document.problems.append(f"{at}: {child} is given twice (also at {document.places[child]}); remove one")
            continue
        document.places[child] = at
        tree[key.value] = _plain(value, child, document, where)
    return tree


def _position(text: str) -> tuple[int, int]:
    return text.count("\n") + 1, len(text) - text.rfind("\n")
