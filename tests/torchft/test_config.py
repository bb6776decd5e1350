"""Building components, and a config back to YAML that loads equal and holds no secret."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch

from torchft import config_override
from torchft.config import Component, Folder, Kind, Range, dump
from torchft.config_load import load

ADAMW = Component("torch.optim.AdamW", {"betas": (0.9, 0.95)})


@dataclass(frozen=True, kw_only=True)
class Section:
    path: Path = Path("p")
    items: list[Any] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str = "no"
    lr: float = 1e-5
    note: str | None = "1e-5"
    optimizer: Annotated[Component, Kind("optimizer", supplied=("params",))] = ADAMW
    section: Section | None = Section()
    hook: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(config_override, "environment_read", config_override.environment_read)
    config_override.environment_read.clear()


def test_build_calls_the_component_with_both_arguments():
    optimizer = ADAMW.build([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert optimizer.defaults["lr"] == 0.5


def test_build_builds_nested_components_first():
    inner = Component("torch.optim.SGD", {"params": [torch.nn.Parameter(torch.zeros(1))]})
    built = Component(
        "torch.optim.AdamW", {"params": [{"params": [torch.nn.Parameter(torch.zeros(1))], "x": [inner]}]}
    ).build()
    assert isinstance(built.param_groups[0]["x"][0], torch.optim.SGD)


def test_range():
    assert Range(min=1).problem(1) == "" == Range(above=0, below=1).problem(0.5) == Range(max=2).problem(2)
    assert Range(min=1).problem(0) == "must be at least 1"
    assert Range(max=1).problem(2) == "must be at most 1"
    assert Range(above=0).problem(0) == "must be above 0"
    assert Range(below=1).problem(1) == "must be below 1"


def test_c14_folder(tmp_path):
    (tmp_path / "Llama-3.2-1B").mkdir()
    (tmp_path / "file").touch()
    assert Folder(exists=True).problem(tmp_path / "Llama-3.2-1B") == ""
    assert "does not exist (did you mean 'Llama-3.2-1B'?)" in Folder(exists=True).problem(tmp_path / "Llama-3.2-1b")
    assert "does not exist" in Folder(exists=True).problem(tmp_path / "file")
    assert Folder(writable=True).problem(tmp_path / "new" / "deep") == ""
    assert "cannot be written" in Folder(writable=True).problem(tmp_path / "file" / "out")
    assert "cannot be written" in Folder(writable=True).problem(tmp_path / "file")


def test_dump_loads_back_equal(tmp_path):
    config = Config(name="on: #1", section=Section(path=Path("a b"), items=[{"x": None}, "010", 3]), hook={"k": [True]})
    file = tmp_path / "config.yaml"
    for written in (config, Config(), replace(config, section=None)):
        file.write_text(dump(written))
        assert load(Config, recipe="x", file=file, overrides=[]) == written


def test_s9_c12_what_came_from_the_environment_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_DATA", "/data/canary")
    file = tmp_path / "c.yaml"
    file.write_text("name: ${oc.env:MY_DATA}/x\nsection: {items: ['${oc.env:MY_DATA}']}")
    config = load(Config, recipe="x", file=file, overrides=[])
    assert config.name == "/data/canary/x"
    text = dump(replace(config, lr=1.0))
    assert "canary" not in text
    assert "name: ${oc.env:MY_DATA}/x" in text
    file.write_text(text)
    assert load(Config, recipe="x", file=file, overrides=[]) == replace(config, lr=1.0)


def test_s9_dump_redacts(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef0123canary")
    secrets = {
        "api_key": "canary-a", "hf_token": "canary-b", "nested": [{"password": "canary-c"}],
        "url": "https://user:canary-d@host/x", "free": "hf_canarycanarycanarycanary",
        "env": "0123456789abcdef0123456789abcdef0123canary", "wandb": "c0ffee" * 6 + "cafe",
    }  # fmt: skip
    kept = {"num_tokens": "100", "pad_token": "<pad>", "revision": "c0ffee" * 6 + "cafe", "key": "text"}
    text = dump(Config(hook=secrets | kept))
    assert "canary" not in text
    assert text.count("<redacted>") == len(secrets)
    assert "user" not in text
    for line in (
        'num_tokens: "100"',
        "pad_token: <pad>",
        f"revision: {kept['revision']}",
        "url: https://<redacted>@host/x",
    ):
        assert line in text
