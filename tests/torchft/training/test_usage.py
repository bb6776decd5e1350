"""Commands of the last panel: Python that runs, whatever the paths and the question hold."""

import ast
import shlex
from pathlib import Path

from torchft.training.usage import commands

QUESTION = "Say \"hi\" in 'quotes', {braces}, a \\ and 😀\nplease"
FOLDER = Path("/tmp/my run's/export 你好")


def texts(code):
    return {node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)}


def test_code_holds_the_very_question_and_path():
    for arguments in commands(model=FOLDER, adapter=FOLDER / "adapter", base=Path("base"), question=QUESTION).values():
        assert shlex.split(shlex.join(arguments)) == arguments
        if arguments[0] == "python":
            assert QUESTION in texts(arguments[2])
            assert texts(arguments[2]) & {str(FOLDER), str(FOLDER / "adapter")}


def test_only_what_was_exported():
    assert not any("PEFT" in purpose for purpose in commands(model=FOLDER, question="x"))
    found = commands(model=None, adapter=FOLDER, base=Path("base"), question="x")
    assert all(str(FOLDER) in " ".join(arguments) or "PEFT" in purpose for purpose, arguments in found.items())
    assert found["ask base and adapter"] == ["tune", "generate", "base", "--adapter", str(FOLDER), "x"]


def test_what_needs_nothing_else_comes_first():
    purpose, arguments = next(iter(commands(model=FOLDER, question="x").items()))
    assert (purpose, arguments) == ("ask the model", ["tune", "generate", str(FOLDER), "x"])
    assert commands(model=FOLDER, question="-3 + 5?")["ask the model"][3:] == ["--", "-3 + 5?"]  # no option
