"""``tune cat``: print a shipped config or recipe."""

import sys

from torchft import shipped
from torchft.cli.arguments import Parser


def main(arguments: list[str]) -> None:
    """``tune cat NAME``"""
    parser = Parser("cat", "Print a config or a recipe that torchft ships.")
    parser.add_argument("name", metavar="NAME", help="of a config or recipe; `tune ls` lists them")
    sys.stdout.write(shipped.find(parser.parse(arguments).name).read_text(encoding="utf-8"))
