"""The exceptions that are shown without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A user's mistake, shown without a traceback; the command line exits with code 2.

    Each problem says what is wrong, where (path, YAML key or file:line), why, and the way out. All problems at once.
    ``is_shared``: every rank raises the same, so that one need say it.
    """

    def __init__(self, *problems: str, is_shared: bool = False) -> None:
        super().__init__(*problems)
        self.problems, self.is_shared = problems, is_shared

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return f"{len(self.problems)} problems\n" + "\n".join(f"  - {p}" for p in self.problems)


@contextmanager
def collecting(problems: list[str]) -> Iterator[None]:
    """A UserError of the block adds its problems to ``problems``, and what follows the block is checked too."""
    try:
        yield
    except UserError as e:
        problems += e.problems


class LostContact(RuntimeError):
    """Another rank died or hangs: no traceback of this one would tell more. Exit code 3, which the launcher knows."""
