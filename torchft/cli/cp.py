"""``tune cp``: copy a shipped recipe or config, to edit it. Overwrites nothing unless told to."""

import os
from pathlib import Path

from torchft import shipped
from torchft.cli.arguments import Parser
from torchft.cli.run import find, is_recipe
from torchft.errors import UserError
from torchft.files import atomic_write


def main(arguments: list[str]) -> None:
    """``tune cp NAME FILE [--force] [--make-parents]``"""
    parser = Parser("cp", "Copy a recipe or a config, to edit it.")
    parser.add_argument("name", metavar="NAME", help="of a recipe or config; `tune ls` lists them")
    parser.add_argument("file", metavar="FILE", type=Path, help="where to; .py or .yaml is added if it is missing")
    parser.add_argument("--force", action="store_true", help="overwrite FILE if it exists")
    parser.add_argument("--make-parents", action="store_true", help="create the folders above FILE")
    given = parser.parse(arguments)
    source = find(given.name)[0] if is_recipe(given.name) else shipped.find(given.name)
    file = given.file.expanduser()
    if file.is_dir():
        raise UserError(f"{file} is a folder; name the file: {file / source.name}")
    file = file if file.suffix else file.with_suffix(source.suffix)
    if file.suffix != source.suffix and not (file.suffix == ".yml" and source.suffix == ".yaml"):
        raise UserError(
            f"{given.name} is a {source.suffix} file, {file} is not; name it {file.with_suffix(source.suffix)}"
        )
    if os.path.lexists(file) and not given.force:
        raise UserError(f"{file} exists; name another file or add --force to overwrite it")
    try:
        if given.make_parents:
            file.parent.mkdir(parents=True, exist_ok=True)
        if not file.parent.is_dir():
            raise UserError(f"there is no folder {file.parent}; create it or add --make-parents")
        atomic_write(file, source.read_bytes())
    except OSError as e:
        raise UserError(f"cannot write {file}: {e.strerror}") from None
    use = f"{file} --config CONFIG" if file.suffix == ".py" else f"{shipped.recipe_of(source)} --config {file}"
    print(f"copied to {file}; run it with: tune run {use}")
