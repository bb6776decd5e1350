"""``key=value`` from the command line and ``${...}`` inside values, applied to a config's tree."""

import os
import re
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import (
    GrammarParseError,
    InterpolationKeyError,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)

from torchft import shipped
from torchft.config_yaml import BROKEN, Document, join, parse, scalar
from torchft.errors import UserError
from torchft.names import nearest
from torchft.redact import is_secret

environment_read: dict[str, str] = {}  # variable -> value, of every ${oc.env:...} in a config of this process


def override(document: Document, arguments: Sequence[str]) -> None:
    """Apply ``key=value``, ``key.sub=value``, ``key.0.sub=value`` and ``~key`` to the tree, in order.

    A bare name given to a component (``optimizer=torch.optim.SGD``) replaces its ``_component_`` and keeps the rest.
    """
    for argument in arguments:
        try:
            _apply(document, argument)
        except UserError as e:
            document.problems.append(f"command line: {argument}: {e}")


def interpolate(document: Document) -> None:
    """Resolve every ``${...}`` of the tree in place. Problems name keys and variables, never a value."""
    OmegaConf.register_resolver("oc.env", _environment, replace=True)  # ours refuses secrets and remembers the rest
    OmegaConf.register_resolver("configs", lambda name: str(shipped.config_path(name)), replace=True)
    _check_grammar(document.tree, "", document)
    source = OmegaConf.create(document.tree, flags={"allow_objects": True})
    _resolve(document.tree, source, "", document)


def _apply(document: Document, argument: str) -> None:
    path, equals, text = argument.removeprefix("~").partition("=")
    removes = argument.startswith("~")
    if removes == bool(equals) or not path:
        hint = f"; a config is named by --config {argument}" if "/" in argument or argument.endswith(".yaml") else ""
        raise UserError(f"expected key=value to set or ~key to remove{hint}")
    *above, last = path.split(".")
    node: Any = document.tree
    for part in above:
        node = _child(node, part, create=not removes)
    key = _key(node, last, must_exist=removes)
    if removes:
        del node[key]
        return
    value = parse(text, "value") if text[:1] in "[{\"'" and text else scalar(text) if text else ""
    old = node[key] if isinstance(node, list) or key in node else None
    if isinstance(value, str) and isinstance(old, dict) and "_component_" in old:
        old["_component_"] = value
        document.places[f"{path}._component_"] = "command line"
    else:
        node[key] = value
        for below in [p for p in document.places if p.startswith(f"{path}.")]:
            del document.places[below]
    document.places[path] = "command line"


def _child(node: Any, part: str, *, create: bool) -> Any:
    key = _key(node, part, must_exist=not create)
    child = node[key] if isinstance(node, list) or key in node else None
    if isinstance(child, str) and "${" in child:
        raise UserError(f"{part!r} is {child!r}: set the key that it refers to")
    if isinstance(child, str):  # a component given by its bare name
        child = {"_component_": child}
    node[key] = {} if child is None else child
    return node[key]


def _key(node: Any, part: str, *, must_exist: bool) -> Any:
    if isinstance(node, list):
        if part.isdecimal() and int(part) < len(node):
            return int(part)
        raise UserError(f"{part!r} is not an index into a list of {len(node)} (0 to {len(node) - 1})")
    if not isinstance(node, dict):
        raise UserError(f"there is nothing below {node!r} to set")
    if must_exist and part not in node:
        raise UserError(f"there is no {part!r} to remove{nearest(part, node)}")
    return part


def _environment(name: str, *default: Any) -> Any:
    if is_secret(name):
        raise UserError(f"{name} is a secret; remove it: libraries read their tokens from the environment themselves")
    if name not in os.environ and not default:
        raise UserError(f"the environment variable {name} is not set; set it or write ${{oc.env:{name},default}}")
    if name not in os.environ:
        return default[0]
    environment_read[name] = os.environ[name]
    return os.environ[name]


def _check_grammar(node: Any, path: str, document: Document) -> None:
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        if isinstance(value, dict | list):
            _check_grammar(value, join(path, key), document)
        elif isinstance(value, str) and "${" in value:
            try:
                OmegaConf.create([value])
            except GrammarParseError:
                document.fail(join(path, key), f"{value!r} is not a valid ${{...}} expression")
                node[key] = BROKEN


def _resolve(node: Any, source: Any, path: str, document: Document) -> None:
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        at = join(path, key)
        if isinstance(value, dict | list):
            _resolve(value, source[key], at, document)
        elif isinstance(value, str) and "${" in value:
            document.expressions[at] = value
            try:
                found = source[key]
                node[key] = OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
            except OmegaConfBaseException as e:
                document.fail(at, f"{value!r} {_reason(e, document.tree)}")
                node[key] = BROKEN


def _reason(error: OmegaConfBaseException, tree: dict[str, Any]) -> str:
    text = str(error).splitlines()[0]  # of the library's messages only those without values are shown
    own = re.search(r"UserError raised while resolving interpolation: (.*)", text)
    if own:
        return f"cannot be resolved: {own[1]}"
    missing = re.search(r"Interpolation key '(.*)' not found", text)
    if isinstance(error, InterpolationKeyError) and missing:
        return f"names the key {missing[1]!r}, which does not exist{nearest(missing[1], tree)}"
    if isinstance(error, UnsupportedInterpolationType):
        return "uses an unknown resolver; there are ${key}, ${oc.env:NAME} and ${configs:NAME}"
    return "leads back to itself" if text.startswith("Recursive") else "cannot be resolved"
