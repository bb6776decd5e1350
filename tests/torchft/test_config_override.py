"""Overrides change exactly the value they name."""

import pytest

from torchft import shipped
from torchft.config_override import interpolate, override
from torchft.config_yaml import Document
from torchft.errors import UserError


def tree() -> dict:
    return {
        "lr": 1,
        "data": [{"_component_": "a.b", "source": "x"}, {"_component_": "a.c"}],
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1, "fused": True},
        "bare": "torch.optim.SGD",
        "lora": None,
        "same": "${optimizer}",
    }


def after(*arguments: str) -> dict:
    document = Document(tree=tree())
    override(document, arguments)
    assert not document.problems
    return document.tree


@pytest.mark.parametrize(
    ("text", "value"),
    [("2", 2), ("1e-4", 1e-4), ("null", None), ("true", True), ("", ""), ("a=b=c", "a=b=c"), ("a: b", "a: b"),
     ("#5", "#5"), ("@x", "@x"), ("a #b", "a #b"), ("~/out", "~/out"), ("'2'", "2"), ('"a b"', "a b"),
     ("[q,v]", ["q", "v"]), ("{a: 1}", {"a": 1}), ("[]", []), ("no", "no"), ("${lr}", "${lr}"), ("-1", -1)],
)  # fmt: skip
def test_values(text, value):
    assert after(f"lr={text}")["lr"] == value


def test_paths():
    assert after("new.a.b=1")["new"] == {"a": {"b": 1}}
    assert after("lora.rank=4")["lora"] == {"rank": 4}
    assert after("data.0.source=y")["data"][0] == {"_component_": "a.b", "source": "y"}
    assert after("bare.lr=2")["bare"] == {"_component_": "torch.optim.SGD", "lr": 2}
    assert after("lr=2", "lr=3")["lr"] == 3


def test_a_bare_name_replaces_the_component_only():
    optimizer = {"_component_": "torch.optim.SGD", "lr": 1, "fused": True}
    assert after("optimizer=torch.optim.SGD")["optimizer"] == optimizer
    assert after("data.1=a.d")["data"][1] == {"_component_": "a.d"}
    assert after("optimizer=null")["optimizer"] is None


def test_removal():
    assert after("~optimizer.fused")["optimizer"] == {"_component_": "torch.optim.AdamW", "lr": 1}
    assert "lr" not in after("~lr")
    assert after("~data.0")["data"] == [{"_component_": "a.c"}]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("lr", "expected key=value to set or ~key to remove"),
        ("=3", "expected key=value"),
        ("~lr=3", "expected key=value"),
        ("~", "expected key=value"),
        ("~lrr", "there is no 'lrr' to remove (did you mean 'lr'?)"),
        ("~optimizer.fuse", "there is no 'fuse' to remove (did you mean 'fused'?)"),
        ("~none.x", "there is no 'none' to remove"),
        ("data.2=x", "'2' is not an index into a list of 2 (0 to 1)"),
        ("data.first.source=x", "'first' is not an index into a list of 2 (0 to 1)"),
        ("lr.x=1", "there is nothing below 1 to set"),
        ("same.lr=1", "'same' is '${optimizer}': set the key that it refers to"),
        ("lr=[1", "value:1:3: not valid YAML"),
    ],
)
def test_c1_bad_arguments_are_problems(argument, message):
    document = Document(tree=tree())
    override(document, [argument])
    (problem,) = document.problems
    assert problem.startswith(f"command line: {argument}: ")
    assert message in problem


def test_interpolation_sees_the_overrides():
    document = Document(tree=tree())
    override(document, ["optimizer.lr=7", "lr=${optimizer.lr}"])
    interpolate(document)
    assert document.tree["lr"] == 7
    assert document.tree["same"] == document.tree["optimizer"]
    assert document.expressions == {"lr": "${optimizer.lr}", "same": "${optimizer}"}


def test_shipped_configs_by_name(tmp_path, monkeypatch):
    (tmp_path / "demo" / "base").mkdir(parents=True)
    monkeypatch.setattr(shipped, "folder", lambda name: tmp_path)
    document = Document(tree={"checkpoint_dir": "${configs:demo/base}"})
    interpolate(document)
    assert document.tree == {"checkpoint_dir": str(tmp_path / "demo" / "base")}
    for name in ("demo/none", "../etc/passwd", "/etc/passwd", ""):
        with pytest.raises(UserError, match="torchft ships no configs/"):
            shipped.config_path(name)
