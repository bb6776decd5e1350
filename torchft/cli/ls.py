"""``tune ls``: the recipes that torchft ships, with their configs. Reads files, imports none of them."""

from torchft import shipped
from torchft.cli.arguments import Parser

OTHER = "(any recipe)"


def main(arguments: list[str]) -> None:
    """``tune ls``"""
    Parser("ls", "List the recipes that torchft ships, with their configs.").parse(arguments)
    print(table())


def table() -> str:
    """RECIPE, CONFIG and what the recipe does, aligned."""
    configs: dict[str, list[str]] = {name: [] for name in shipped.recipes()}
    for name, path in shipped.configs().items():
        configs.setdefault(shipped.recipe_of(path) or OTHER, []).append(name)
    rows = [("RECIPE", "CONFIG")]
    for recipe, names in configs.items():
        rows += [(recipe if i == 0 else "", name) for i, name in enumerate(names or ["-"])]
    width = max(len(recipe) for recipe, _ in rows) + 3
    about = [f"  {name:{width}}{shipped.summary(path)}" for name, path in shipped.recipes().items()]
    return "\n".join(
        [*(f"{recipe:{width}}{config}" for recipe, config in rows), "", *about, "",
         "Run one: tune run RECIPE --config CONFIG. Copy one to edit it: tune cp NAME FILE."]
    )  # fmt: skip
