"""``tune validate``: check a config fully, and that its local files are there. Loads no weights and imports none of the
user's code."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torchft import registry, shipped
from torchft.cli.arguments import Parser
from torchft.cli.run import find
from torchft.config import Component
from torchft.config_load import load
from torchft.data.sources import Source, capped, files_of
from torchft.errors import UserError, collecting


def main(arguments: list[str]) -> None:
    """``tune validate [RECIPE] --config CONFIG [key=value ...]``"""
    parser = Parser("validate", "Check a config: names, types, ranges, conflicts, the arguments of its components.")
    parser.add_argument("--config", metavar="CONFIG", required=True, help="name (`tune ls`) or YAML file")
    trust = "accept the names of this package of yours; it is not imported, so they stay unchecked"
    parser.add_argument("--trust", metavar="PACKAGE", action="append", default=[], help=trust)
    parser.add_argument("words", nargs="*", metavar="RECIPE key=value", help="recipe, if the config does not say it")
    given = parser.parse(arguments)
    file = shipped.find_config(given.config)
    has_name = bool(given.words) and "=" not in given.words[0] and not given.words[0].startswith("~")
    name = given.words[0] if has_name else shipped.recipe_of(file)
    if name is None:
        raise UserError(f"{file} has no 'recipe: NAME' line; name the recipe: tune validate RECIPE --config ...")
    recipe = next((known for known, path in shipped.recipes().items() if path == find(name)[0]), None)
    if recipe is None:
        raise UserError(
            f"{name} is your own code, and validate imports none; `tune run` checks its config first of all"
        )
    for package in given.trust:
        registry.trust(package)
    module = shipped.load_recipe(recipe)
    config = load(
        vars(module)["Config"], recipe=recipe, file=file, overrides=given.words[has_name:], import_trusted=False
    )
    components = sorted({node.name for node in _nodes(config) if isinstance(node, Component)})
    foreign = [component for component in components if registry.is_trusted(component)]
    checked = [component for component in components if component not in foreign]
    problems: list[str] = []
    for source in dict.fromkeys(_sources(config)):
        with collecting(problems):
            files_of(source)
    if problems:
        raise UserError(*problems)
    what = f"components {', '.join(checked)}" if checked else "no components"
    unchecked = f"; not checked (user code): {', '.join(foreign)}" if foreign else ""
    print(f"{given.config} is valid for {recipe}; {len(fields(config))} keys; {what}{unchecked}")


def _sources(config: Any) -> Iterator[Source]:
    """What the config says to read: local files should be there before anything is loaded."""
    for node in _nodes(config, foreign=False):
        found = node if isinstance(node, dict) else {}
        path, split = found.get("source"), found.get("split", "train")
        for one in path if isinstance(path, list) else [path]:
            if isinstance(one, str | Path) and isinstance(split, str):
                yield Source(path=capped(str(one), None)[0], split=split)


def _nodes(value: Any, *, foreign: bool = True) -> Iterator[Component | dict[str, Any]]:
    """The components of a config and all that has named parts. ``foreign``: in what the user's own code is given, too,
    whose words may mean anything."""
    if isinstance(value, Component):
        yield value
        value = value.args if foreign or not registry.is_trusted(value.name) else {}
    elif is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in fields(value)}
    if isinstance(value, dict):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from _nodes(item, foreign=foreign)
