"""The types of a recipe's Config fields, and a config back to YAML. ``torchft.config_load.load`` fills them from YAML.

@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoint_dir: Path  # a field without a default must be given
    batch_size: Annotated[int, Range(min=1)] = 1
    optimizer: Annotated[Component, Kind("optimizer", supplied=("params",))] = Component("torch.optim.AdamW")
    lora: LoRAConfig | None = None  # a section: another such dataclass

    def conflicts(self) -> Iterator[str]:  # optional: what is wrong between fields, as "key: message"
"""

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from torchft import registry
from torchft.config_override import environment_read
from torchft.config_yaml import write
from torchft.names import nearest
from torchft.redact import redact_tree


@dataclass(frozen=True)
class Component:
    """A pluggable part: a name of the registry and its keyword arguments. In YAML a mapping with ``_component_``."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Call the component with its own arguments (components among them are built first) and the given ones."""
        return registry.resolve(self.name)(*args, **_built(self.args), **kwargs)

    def takes(self, name: str) -> bool:
        """Whether the component has a parameter of that name."""
        return name in inspect.signature(registry.resolve(self.name)).parameters

    def with_defaults(self, offered: Mapping[str, Any]) -> "Component":
        """The component with those of ``offered`` that it takes and has no value of its own for."""
        return replace(self, args={name: value for name, value in offered.items() if self.takes(name)} | self.args)

    def call(self, **offered: Any) -> Any:
        """Call the component with its own arguments and, of ``offered``, those that it takes."""
        return self.build(**{name: value for name, value in offered.items() if self.takes(name)})


@dataclass(frozen=True)
class Kind:
    """Note of a Component: which kind of the registry fits, which parameters the recipe passes itself, which ones it
    passes to those that take them, and which name is meant where a mapping has no ``_component_``.
    """

    name: str
    supplied: tuple[str, ...] = ()
    offered: tuple[str, ...] = ()
    default: str = ""


@dataclass(frozen=True, kw_only=True)
class Range:
    """Note of a number: its bounds. ``above`` and ``below`` exclude the bound itself."""

    min: float | None = None
    max: float | None = None
    above: float | None = None
    below: float | None = None

    def problem(self, value: float) -> str:
        """What is wrong with ``value``, or ''."""
        if self.min is not None and value < self.min:
            return f"must be at least {self.min}"
        if self.above is not None and value <= self.above:
            return f"must be above {self.above}"
        if self.max is not None and value > self.max:
            return f"must be at most {self.max}"
        return f"must be below {self.below}" if self.below is not None and value >= self.below else ""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Note of a path: a folder that must exist, or one that must be writable (it may have to be created)."""

    exists: bool = False
    writable: bool = False

    def problem(self, path: Path) -> str:
        """What is wrong with ``path``, or ''."""
        path = path.absolute()
        above = next(p for p in (path, *path.parents) if p.exists())
        if self.exists and not path.is_dir():
            near = nearest(path.name, os.listdir(path.parent)) if above == path.parent and above.is_dir() else ""
            return f"this folder does not exist{near}; {above} does. `tune download` fetches a checkpoint"
        if self.writable and not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
            return f"cannot be written: {above} is read-only or not a folder"
        return ""


def plain(value: Any) -> Any:
    """A Config, or a value in it, as the tree of dicts, lists and scalars that its YAML would hold."""
    if isinstance(value, Component):
        return {"_component_": value.name, **plain(value.args)}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def dump(config: Any) -> str:
    """The whole config as YAML that loads back equal. Secrets are redacted; what came from ${oc.env:NAME} says so."""
    return write(redact_tree(_as_environment(plain(config))))


def _built(value: Any) -> Any:
    if isinstance(value, Component):
        return value.build()
    if isinstance(value, dict):
        return {key: _built(item) for key, item in value.items()}
    return [_built(item) for item in value] if isinstance(value, list) else value


def _as_environment(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _as_environment(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_as_environment(value) for value in tree]
    if not isinstance(tree, str):
        return tree
    for name, value in environment_read.items():
        if tree == value or len(value) >= 6:  # a short value would be found in every word
            tree = tree.replace(value, f"${{oc.env:{name}}}")
    return tree
