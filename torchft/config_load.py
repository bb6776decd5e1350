"""YAML + ``key=value`` -> a recipe's frozen Config, or one error with every problem, before anything else is loaded.

Precedence: dataclass < YAML < command line. A problem says the place (file:line), the path, the value and the way out.
"""

import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

from torchft import registry, shipped
from torchft.config import Component, Folder, Kind, Range, plain
from torchft.config_override import interpolate, override
from torchft.config_types import NO_FIT, fit, is_known, members, parameters, words
from torchft.config_yaml import BROKEN, Document, join, nearest_above, read
from torchft.errors import UserError
from torchft.names import nearest
from torchft.redact import redact_tree

C = TypeVar("C")


def load(cls: type[C], *, recipe: str, file: Path | None, overrides: Sequence[str], import_trusted: bool = True) -> C:
    """The ``cls`` that ``file`` and ``overrides`` describe. UserError with all problems.

    Args:
        recipe: its name; a file whose ``recipe:`` says another is refused.
        import_trusted: whether components of the user's own package are imported, to check their arguments.
    """
    document = read(file) if file else Document(tree={})
    meant = document.tree.pop("recipe", recipe)
    if meant != recipe:
        raise UserError(
            f"{file} is a config for the recipe {meant!r}, not {recipe!r}: tune run {meant} --config {file}"
        )
    written = list(document.tree)
    document = replace(document, tree=_over_defaults(cls, document.tree))
    override(document, overrides)
    interpolate(document)
    config = _Check(document, import_trusted).section(cls, document.tree, "")
    if document.problems:
        raise UserError(*document.problems, *_better_recipe(recipe, written, cls))
    return cast(C, config)


class _Check:
    """Walks a document along the types of a Config, notes every problem and builds what is right.

    Each method returns the value to use, or NO_FIT once the problem is noted.
    """

    def __init__(self, document: Document, import_trusted: bool) -> None:
        self.document = document
        self.import_trusted = import_trusted

    def fail(self, path: str, message: str) -> Any:
        self.document.fail(path, message)
        return NO_FIT

    def section(self, cls: type, tree: dict[str, Any], path: str) -> Any:
        hints = get_type_hints(cls, include_extras=True)
        known = {f.name: f for f in fields(cls) if f.init}
        for key in tree:
            if key not in known:
                self.fail(join(path, key), f"unknown key{nearest(key, known) or '; there are ' + ', '.join(known)}")
        values = {}
        for name, field in known.items():
            if name in tree:
                values[name] = self.value(hints[name], tree[name], join(path, name))
            elif field.default is MISSING and field.default_factory is MISSING:
                values[name] = self.fail(join(path, name), f"must be given: {words(hints[name])}")
        if any(value is NO_FIT for value in values.values()):
            return NO_FIT
        config = cls(**values)
        for conflict in getattr(config, "conflicts", tuple)():  # the one optional method of a Config
            key, _, message = conflict.partition(": ")
            self.fail(join(path, key), message)
        return config

    def value(self, kind: Any, value: Any, path: str) -> Any:
        """``value`` as the type of a field, or of a component's parameter."""
        choices = members(kind)
        if value is BROKEN:
            return NO_FIT
        if value == "???":
            return self.fail(path, f"must be given: {words(kind)}")
        if isinstance(value, dict):
            return self.mapping(kind, value, path)
        if isinstance(value, list):
            return self.sequence(kind, value, path)
        for exact in (True, False):
            for member, notes in choices:
                found = fit(member, value, exact=exact)
                if found is not NO_FIT:
                    return self.noted(found, notes, path)
        for member, notes in choices:
            if member is Component and isinstance(value, str):
                return self.component({"_component_": value}, notes, path)
        return value if _is_open(kind) else self.misfit(kind, value, path)

    def mapping(self, kind: Any, value: dict[str, Any], path: str) -> Any:
        for member, notes in members(kind):
            if "_component_" in value and (member is Component or _is_open(kind)):
                return self.component(value, notes, path)
            if member is Component and _kind(notes).default:
                return self.component({"_component_": _kind(notes).default, **value}, notes, path)
            if member is Component:
                return self.fail(path, f"needs _component_: the name of what to use{_known(_kind(notes).name)}")
            if is_dataclass(member):
                return self.section(cast(type, member), value, path)
            if (get_origin(member) or member) in (dict, Mapping):
                _, kind_of_items = get_args(member) or (str, Any)
                return self.items(Annotated[(kind_of_items, None, *notes)], value, path)
        return self.items(Any, value, path) if _is_open(kind) else self.misfit(kind, value, path)

    def items(self, kind: Any, value: dict[str, Any], path: str) -> Any:
        built = {key: self.value(kind, item, join(path, key)) for key, item in value.items()}
        return NO_FIT if any(item is NO_FIT for item in built.values()) else built

    def sequence(self, kind: Any, value: list[Any], path: str) -> Any:
        for member, notes in members(kind):
            if (get_origin(member) or member) not in (list, tuple, Sequence) and not _is_open(kind):
                continue
            kinds = list(get_args(member)) or [Any]
            if get_origin(member) is not tuple or kinds[-1] is ...:
                kinds = [kinds[0]] * len(value)
            if len(kinds) != len(value):
                return self.fail(path, f"expected {len(kinds)} values, got {len(value)}")
            built = [
                self.value(Annotated[(k, None, *notes)], v, join(path, i)) for i, (k, v) in enumerate(zip(kinds, value))
            ]
            if any(item is NO_FIT for item in built):
                return NO_FIT
            return tuple(built) if get_origin(member) is tuple else built
        return self.misfit(kind, value, path)

    def component(self, tree: dict[str, Any], notes: Sequence[Any], path: str) -> Any:
        name, given = tree["_component_"], {key: value for key, value in tree.items() if key != "_component_"}
        at, note = join(path, "_component_"), _kind(notes)
        if not isinstance(name, str):
            return NO_FIT if name is BROKEN else self.fail(at, f"expected the name of a component{_known(note.name)}")
        is_right = self.is_kind(name, note.name, at)
        if not is_right or (registry.is_trusted(name) and not self.import_trusted):
            args = self.items(Any, given, path)  # components within it are looked at all the same
            return Component(name, args) if is_right and args is not NO_FIT else NO_FIT
        try:
            accepted = parameters(registry.resolve(name))
        except UserError as e:
            return self.fail(at, str(e))
        args = {}
        for key, value in given.items():
            if key in (*note.supplied, *note.offered):
                args[key] = self.fail(join(path, key), "the recipe sets this itself; remove it")
            elif key in accepted.types or accepted.takes_any:
                args[key] = self.value(accepted.types.get(key, Any), value, join(path, key))
            else:
                near = nearest(key, accepted.types) or f"; it has {', '.join(accepted.types)}"
                args[key] = self.fail(join(path, key), f"{name} has no such parameter{near}")
        for key in accepted.required:
            if key not in given and key not in (*note.supplied, *note.offered):
                args[key] = self.fail(join(path, key), f"{name} needs it: {words(accepted.types[key])}")
        for key in note.supplied:
            if key not in accepted.types and not accepted.takes_any:
                args[key] = self.fail(at, f"{name} must accept {key!r}, which the recipe passes to it")
        return NO_FIT if any(arg is NO_FIT for arg in args.values()) else Component(name, args)

    def is_kind(self, name: str, wanted: str, path: str) -> bool:
        try:
            kind = registry.kind(name)
        except UserError as e:
            self.fail(path, f"{e}{_known(wanted)}")
            return False
        if wanted and kind not in (wanted, None):
            self.fail(path, f"{name!r} is of kind {kind}, not {wanted}{_known(wanted)}")
            return False
        return True

    def noted(self, value: Any, notes: Sequence[Any], path: str) -> Any:
        """``value``, if it is in its Range, its Folder is right, the name is one of its Kind."""
        shown = self.shown(str(value) if isinstance(value, Path) else value, path)
        if isinstance(value, Path) and re.search(r"\$(\w|\{)", str(value)):
            return self.fail(path, f"{shown}: $NAME is not replaced in paths; write ${{oc.env:NAME}}")
        for note in notes:
            if isinstance(note, Range) and isinstance(value, int | float) and note.problem(value):
                return self.fail(path, f"{note.problem(value)}, got {shown}")
            if isinstance(note, Folder) and isinstance(value, Path) and note.problem(value):
                return self.fail(path, f"{shown}: {note.problem(value)}")
            if isinstance(note, Kind) and isinstance(value, str) and not self.is_kind(value, note.name, path):
                return NO_FIT
        return value

    def misfit(self, kind: Any, value: Any, path: str) -> Any:
        choices = [choice for member, _ in members(kind) for choice in get_args(member) if isinstance(choice, str)]
        hint = nearest(value, choices) if isinstance(value, str) else ""
        if value in ("None", "none") and any(member is types.NoneType for member, _ in members(kind)):
            hint = "; write null"
        return self.fail(path, f"expected {words(kind)}, got {self.shown(value, path)}{hint}")

    def shown(self, value: Any, path: str) -> str:
        """The value for a message: its ``${...}`` if it came from one, never a secret."""
        text = repr(nearest_above(self.document.expressions, path) or redact_tree(value, path.rpartition(".")[2]))
        return text if len(text) <= 100 else f"{text[:97]}..."


def _is_open(kind: Any) -> bool:
    """Whether no type that YAML could miss is declared: Any, or only types like Callable."""
    kinds = [member for member, _ in members(kind)]
    return Any in kinds or not any(is_known(member) for member in kinds if member is not types.NoneType)


def _kind(notes: Sequence[Any]) -> Kind:
    return next((note for note in notes if isinstance(note, Kind)), Kind(""))


def _known(kind: str) -> str:
    return f"; of kind {kind} there are {', '.join(registry.names(kind))}" if registry.names(kind) else ""


def _over_defaults(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    defaults = {f.name: f.default for f in fields(cls) if f.default is not MISSING}
    defaults |= {f.name: f.default_factory() for f in fields(cls) if f.default_factory is not MISSING}
    return _over(defaults, given)


def _over(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    tree = plain(defaults)
    for key, value in given.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, Component) and "_component_" not in value:
            value = tree[key] | value
        elif isinstance(value, dict) and is_dataclass(default) and not isinstance(default, Component):
            value = _over({f.name: getattr(default, f.name) for f in fields(default)}, value)
        tree[key] = value
    return tree


def _better_recipe(recipe: str, written: list[str], cls: type) -> list[str]:
    """A hint, if another shipped recipe knows more of the keys in a file that does not say which recipe it is for."""
    own = len(set(written) & {f.name for f in fields(cls)})
    for name, path in shipped.recipes().items():
        fitting = len(set(written) & shipped.keys(path))
        if name != recipe and fitting >= own + 2:
            return [f"{fitting} of the {len(written)} keys are keys of the recipe {name!r}, {own} of {recipe!r}"]
    return []
