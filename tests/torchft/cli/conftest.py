"""A small library of recipes and configs that stands in for the shipped one, and ways to call ``tune``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchft import registry, shipped
from torchft.cli.main import main

STUB = '''\
"""Print the config. {about}

More.
"""
from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from torchft.cli.run import start
from torchft.config import Component, Kind, Range
from torchft.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    lr: Annotated[float, Range(above=0)] = 1e-4
    steps: int = 1
    dataset: Any = None
    fail: str = ""


def main(config: Config) -> None:
    if config.fail == "user":
        raise UserError("the data is empty", "the model is missing")
    if config.fail == "interrupt":
        raise KeyboardInterrupt
    if config.fail == "ours":
        logging.getLogger("torchft.x").info("reading hf_canarycanarycanarycanary")
        raise RuntimeError("broken with hf_canarycanarycanarycanary")
    if config.fail == "kill" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    world = os.environ.get("WORLD_SIZE", "none")
    sys.stdout.write(f"lr={{config.lr}} steps={{config.steps}} world={{world}} torch={{'torch' in sys.modules}}\\n")
    sys.stdout.flush()
    if config.fail == "never":
        time.sleep(60)


if __name__ == "__main__":
    start(main, Config, recipe="{name}")
'''


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Shipped recipes ``stub`` and ``dpo``, configs ``demo/stub`` and ``tiny/dpo``, in a folder of their own."""
    root = tmp_path / "library"
    for path, text in {
        "recipes/stub.py": STUB.format(about="For tests.", name="stub"),
        "recipes/dpo.py": STUB.format(about="Preferences.", name="dpo"),
        "configs/demo/stub.yaml": "# a config\nrecipe: stub\nlr: 1e-3\n",
        "configs/tiny/dpo.yaml": "recipe: dpo\n",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    monkeypatch.setattr(shipped, "folder", lambda name: root / name)
    monkeypatch.setattr(registry, "_trusted", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["tune"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return root


@pytest.fixture
def tune(capsys):
    """``tune(*words) -> (exit code, stdout, stderr)``, in this process."""

    def call(*words: str) -> tuple[int, str, str]:
        try:
            code = main(words)
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def python():
    """``python(*words, **environment)``: run Python as a process that finds this very package, from any folder."""

    def call(*words: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
        env = (
            os.environ | {"PYTHONPATH": str(Path(shipped.__file__).parent.parent), "OMP_NUM_THREADS": "1"} | environment
        )
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=timeout, env=env)

    return call
