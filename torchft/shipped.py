"""The recipes and configs that come with torchft, by name, found without importing anything.

In a checkout they lie beside the package, in a wheel inside it. A recipe's name is its path without ``.py``, a
config's its path without ``.yaml``.
"""

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from torchft.errors import UserError
from torchft.names import nearest


def folder(name: str) -> Path:
    """The folder "recipes" or "configs"."""
    package = Path(__file__).resolve().parent
    return package / name if (package / name).is_dir() else package.parent / name


def recipes() -> dict[str, Path]:
    """name -> script"""
    return _files(folder("recipes"), ".py")


def configs() -> dict[str, Path]:
    """name -> YAML"""
    return _files(folder("configs"), ".yaml")


def config_path(name: str) -> Path:
    """What ``${configs:name}`` stands for: a config or anything else in the folder of configs. UserError if absent."""
    root = folder("configs")
    inside = name and ".." not in Path(name).parts and not Path(name).is_absolute()
    for path in (root / name, root / f"{name}.yaml"):
        if inside and path.exists():
            return path
    raise UserError(f"torchft ships no configs/{name}{nearest(name, configs())}")


def find_recipe(name_or_path: str) -> Path:
    """The script of a shipped recipe's name, or a ``.py`` file of the user. UserError if there is neither."""
    return _find(name_or_path, recipes(), (".py",), "recipe")


def find_config(name_or_path: str) -> Path:
    """The file of a shipped config's name, or a YAML file of the user. UserError if there is neither."""
    return _find(name_or_path, configs(), (".yaml", ".yml"), "config")


def find(name: str) -> Path:
    """The shipped config or recipe of that name. UserError if there is neither."""
    known = recipes() | configs()
    if name not in known:
        raise UserError(f"torchft ships no recipe or config {name!r}{nearest(name, known)}; `tune ls` lists them")
    return known[name]


def recipe_of(config: Path) -> str | None:
    """The ``recipe:`` that a config is for."""
    found = re.search(
        r"^recipe:[ \t]*[\"']?([\w/.-]+)", config.read_text(encoding="utf-8", errors="replace"), re.MULTILINE
    )
    return found[1] if found else None


def summary(recipe: Path) -> str:
    """First line of a recipe's docstring."""
    return (ast.get_docstring(ast.parse(recipe.read_text(encoding="utf-8"))) or "").partition("\n")[0]


def keys(recipe: Path) -> set[str]:
    """The names of the fields of a recipe's Config."""
    tree = ast.parse(recipe.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config"]
    lines = [line for node in classes for line in node.body if isinstance(line, ast.AnnAssign)]
    return {line.target.id for line in lines if isinstance(line.target, ast.Name)}


def load_recipe(name: str) -> ModuleType:
    """Import a shipped recipe, for its Config."""
    spec = importlib.util.spec_from_file_location(f"torchft_recipe_{name.replace('/', '_')}", recipes()[name])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their types there
    spec.loader.exec_module(module)
    return module


def _files(root: Path, suffix: str) -> dict[str, Path]:
    found = {path.relative_to(root).with_suffix("").as_posix(): path for path in root.rglob(f"*{suffix}")}
    return {name: found[name] for name in sorted(found) if not name.endswith("__init__")}


def _find(name_or_path: str, known: dict[str, Path], suffixes: tuple[str, ...], what: str) -> Path:
    path = Path(name_or_path).expanduser()
    if name_or_path in known:
        return known[name_or_path]
    if path.is_file() and path.suffix in suffixes:
        return path
    if path.suffix in suffixes:
        near = nearest(path.with_suffix("").as_posix(), known)
        raise UserError(f"the {what} {name_or_path} does not exist{near}; `tune ls` shows what torchft ships")
    raise UserError(f"there is no {what} {name_or_path!r}{nearest(name_or_path, known)}; `tune ls` shows all")
