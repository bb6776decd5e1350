"""The parser of every verb: argparse whose errors are UserErrors with the nearest name."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from torchft.errors import UserError
from torchft.names import nearest


class Parser(argparse.ArgumentParser):
    """Options and positional words in any order; an unknown option is an error, never ignored or guessed."""

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(
            prog=f"tune {verb}" if verb else None,
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument("--debug", action="store_true", help="show the traceback of an error, too")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """UserError for what does not fit."""
        for word in arguments:
            name, _, value = word.partition("=")
            if name.startswith("-") and name not in self._option_string_actions:
                near = nearest(name, self._option_string_actions)
                near += "" if near and "_" not in name else _as_config(name, value)  # keys of configs have underscores
                raise UserError(f"unknown option {word!r}{near}; see `{self.prog} --help`")
        return self.parse_intermixed_args(arguments)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def _as_config(name: str, value: str) -> str:
    return f" (a config value is given without dashes: {name.lstrip('-')}={value or '...'})"
