"""Every fault of a config is found before anything is loaded, all of them at once, each with place and way out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchft import registry, shipped
from torchft.config import Component, Folder, Kind, Range
from torchft.config_load import load
from torchft.errors import UserError

ADAMW = Component("torch.optim.AdamW", {"lr": 2e-5, "fused": True})
Optimizer = Annotated[Component, Kind("optimizer", supplied=("params",))]


@dataclass(frozen=True, kw_only=True)
class LoRA:
    rank: Annotated[int, Range(min=1, max=1024)] = 8
    alpha: float = 16.0
    targets: str | list[str] = "all-linear"
    ranks: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoint_dir: Path
    seed: int | None = None
    batch_size: Annotated[int, Range(min=1)] = 1
    packed: bool = False
    seq_len: Annotated[int, Range(min=1)] | None = None
    lr: Annotated[float, Range(above=0, below=1)] = 1e-4
    name: str = "run"
    optimizer: Optimizer = ADAMW
    others: Optimizer | list[Optimizer] | None = None
    recompute: Literal["none", "full"] | float = "none"
    lora: LoRA | None = None
    nested: LoRA = LoRA(rank=16)
    hook: dict[str, Any] = field(default_factory=dict)
    output_dir: Annotated[Path, Folder(writable=True)] = Path("out")

    def conflicts(self) -> Iterator[str]:
        if self.packed and self.seq_len is None:
            yield "packed: needs seq_len, the length of a packed row"


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_trusted", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)


def read(yaml: str = "", *overrides: str) -> Config:
    file = Path("c.yaml")
    file.write_text("checkpoint_dir: /models/x\n" + yaml)
    return load(Config, recipe="stub", file=file, overrides=overrides)


def problems(yaml: str = "", *overrides: str) -> list[str]:
    with pytest.raises(UserError) as e:
        read(yaml, *overrides)
    return list(e.value.problems)


def test_precedence_is_dataclass_then_yaml_then_command_line():
    config = read(
        "batch_size: 2\nseed: 3\noptimizer: {lr: 1e-3}\nlora: {alpha: 4}\nnested: {alpha: 4}", "seed=5", "nested.rank=2"
    )
    assert (config.batch_size, config.seed, config.lr) == (2, 5, 1e-4)
    assert config.optimizer == Component("torch.optim.AdamW", {"lr": 1e-3, "fused": True})
    assert config.lora == LoRA(rank=8, alpha=4)
    assert config.nested == LoRA(rank=2, alpha=4)
    assert read("nested: {alpha: 4}").nested == LoRA(rank=16, alpha=4)


def test_a_component_in_yaml_replaces_the_default_whole():
    assert read("optimizer: {_component_: torch.optim.SGD}").optimizer == Component("torch.optim.SGD", {})
    assert read("optimizer: torch.optim.SGD").optimizer == Component("torch.optim.SGD", {})


def test_a_bare_name_on_the_command_line_keeps_the_arguments():
    assert read("", "optimizer=torch.optim.SGD").optimizer == Component("torch.optim.SGD", {"lr": 2e-5, "fused": True})
    (problem,) = problems("", "optimizer=torch.optim.Muon")  # has no fused
    assert problem.startswith("command line: optimizer.fused: torch.optim.Muon has no such parameter")


def test_types_of_all_fields():
    config = read(
        "seed: 1\nrecompute: 0.5\nothers: [torch.optim.SGD, {_component_: torch.optim.AdamW, betas: [0.9, 0.95]}]\n"
        "lora: {targets: [q_proj, v_proj], alpha: 8, ranks: {q_proj: 4}}\nname: 2024\nhook: {a: [1, x]}"
    )
    assert config.others == [Component("torch.optim.SGD", {}), Component("torch.optim.AdamW", {"betas": (0.9, 0.95)})]
    assert config.lora == LoRA(targets=["q_proj", "v_proj"], alpha=8.0, ranks={"q_proj": 4})
    assert (config.recompute, config.name, config.hook) == (0.5, "2024", {"a": [1, "x"]})
    assert read("recompute: full").recompute == "full"
    assert read("others: torch.optim.SGD").others == Component("torch.optim.SGD", {})
    assert type(config.lora.alpha) is float


def test_all_problems_come_out_at_once():
    yaml = """\
batchsize: 4
seed: no
lora: {rank: 0, targetz: 1}
optimizer: {lrr: 1, lr: high}
recompute: ful
nested: 3
hook: {a: [{_component_: os.system, command: id}]}
"""
    assert problems(yaml, "lr=-1", "sed=3") == [
        "c.yaml:2: batchsize: unknown key (did you mean 'batch_size'?)",
        "command line: sed: unknown key (did you mean 'seed'?)",
        "c.yaml:3: seed: expected an integer or null, got 'no'",
        "command line: lr: must be above 0, got -1.0",
        "c.yaml:5: optimizer.lr: expected a number, got 'high'",
        "c.yaml:5: optimizer.lrr: torch.optim.AdamW has no such parameter (did you mean 'lr'?)",
        "c.yaml:6: recompute: expected 'none', 'full' or a number, got 'ful' (did you mean 'full'?)",
        "c.yaml:4: lora.targetz: unknown key (did you mean 'targets'?)",
        "c.yaml:4: lora.rank: must be at least 1, got 0",
        "c.yaml:7: nested: expected a mapping, got 3",
        "c.yaml:8: hook.a.0._component_: 'os.system' is not a known component",
    ]


def test_c1_unknown_key_without_a_near_one_lists_the_keys():
    (problem,) = problems("zzz: 1")
    assert problem.startswith("c.yaml:2: zzz: unknown key; there are checkpoint_dir, seed, batch_size")


def test_c2_unknown_or_missing_or_supplied_argument_of_a_component():
    assert problems("optimizer: {weight_decai: 1}") == [
        "c.yaml:2: optimizer.weight_decai: torch.optim.AdamW has no such parameter (did you mean 'weight_decay'?)"
    ]
    assert problems("optimizer: {params: [1]}") == [
        "c.yaml:2: optimizer.params: the recipe sets this itself; remove it"
    ]
    assert "optimizer.betas: expected 2 values, got 1" in problems("optimizer: {betas: [0.9]}")[0]
    assert "needs _component_: the name of what to use; of kind optimizer there are" in problems("others: {lr: 1}")[0]


def test_c2_a_wrong_argument_is_found_even_where_the_component_declares_no_types():
    (problem,) = problems("optimizer: {_component_: torchao.optim.AdamW8bit, lr: high}")
    assert problem == "c.yaml:2: optimizer.lr: expected a number, got 'high'"


def test_c3_c16_unknown_component_names_its_path_and_the_nearest():
    assert problems("optimizer: torch.optim.AdamWW") == [
        "c.yaml:2: optimizer._component_: 'torch.optim.AdamWW' is not a known component (did you mean "
        f"'torch.optim.AdamW'?); of kind optimizer there are {', '.join(registry.names('optimizer'))}"
    ]
    (problem,) = problems("optimizer: torchft.data.datasets.chat")
    assert "is of kind dataset, not optimizer; of kind optimizer there are torch.optim.Adafactor" in problem


@pytest.mark.parametrize(
    "at", ["hook: {a: {b: NODE}}", "hook: {a: [1, [NODE]]}", "others: [NODE]", "optimizer: {lr: NODE}"]
)
def test_c4_nested_components_are_checked(at):
    (problem,) = problems(at.replace("NODE", "{_component_: torch.hub.load, repo: x}"))
    assert "torch.hub.load" in problem or "expected a number" in problem


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ('"1e-5"', 1e-5), ("1.5E-05", 1.5e-5), (".5", 0.5), ("'0.25'", 0.25)]
)
def test_c5_numbers_in_any_spelling(text, value):
    assert read(f"lr: {text}").lr == value
    assert read("", f"lr={text}").lr == value


@pytest.mark.parametrize("text", ["1e-5x", "abc", "true", "[1]", "{a: 1}", "null", "'' "])
def test_c5_not_a_number(text):
    assert problems(f"lr: {text}")[0].startswith("c.yaml:2: lr: expected a number, got ")


@pytest.mark.parametrize("text", ["no", "on", "yes", "off", "1", "None", "'x'"])
def test_c6_only_true_and_false_are_booleans(text):
    assert "packed: expected true or false, got" in problems(f"packed: {text}")[0]


def test_c6_an_octal_is_not_a_number_and_none_is_text():
    assert problems("batch_size: 010") == ["c.yaml:2: batch_size: expected an integer, got '010'"]
    assert problems("seed: None") == ["c.yaml:2: seed: expected an integer or null, got 'None'; write null"]
    assert read("seed: 1e3").seed == 1000
    for text in ("1.5", "true", "1e400", "''"):
        assert "batch_size: expected an integer, got" in problems(f"batch_size: {text}")[0]


def test_c9_all_missing_fields_at_once():
    Path("m.yaml").write_text("seed: ???\n")
    with pytest.raises(UserError) as e:
        load(Config, recipe="stub", file=Path("m.yaml"), overrides=[])
    assert e.value.problems == (
        "m.yaml: checkpoint_dir: must be given: a path",
        "m.yaml:1: seed: must be given: an integer or null",
    )


def test_c10_conflicts_come_with_the_other_problems():
    assert problems("packed: true\nbatchsize: 1") == [
        "c.yaml:3: batchsize: unknown key (did you mean 'batch_size'?)",
        "c.yaml:2: packed: needs seq_len, the length of a packed row",
    ]


@given(st.integers(max_value=0))
@settings(max_examples=30, deadline=None)
def test_c11_values_out_of_range(value):
    for key in ("batch_size", "seq_len", "lr", "lora.rank"):
        with pytest.raises(UserError, match=f"{key}: must be (at least 1|above 0)"):
            load(Config, recipe="stub", file=None, overrides=["checkpoint_dir=x", f"{key}={value}"])


@pytest.mark.parametrize("value", [".nan", ".inf", "1", "-.inf", "1e400"])
def test_c11_not_finite_or_too_large(value):
    assert "lr: " in problems(f"lr: {value}")[0]


def test_c12_interpolation(monkeypatch):
    monkeypatch.setenv("MY_SEED", "7")
    assert read("seed: ${oc.env:MY_SEED}\nname: s${seed}-${batch_size}\n").name == "s7-1"  # a default is a key, too
    assert read("name: ${oc.env:NOT_SET_ANYWHERE,none}").name == "none"
    yaml = """\
seed: ${batch_siz}
name: ${oc.env:NOT_SET}
lr: ${packed}
packed: ${lr}
hook: {a: '${', b: '${os:x}'}
"""
    assert problems(yaml) == [
        "c.yaml:6: hook.a: '${' is not a valid ${...} expression",
        "c.yaml:2: seed: '${batch_siz}' names the key 'batch_siz', which does not exist (did you mean 'batch_size'?)",
        "c.yaml:5: packed: '${lr}' leads back to itself",
        "c.yaml:4: lr: '${packed}' leads back to itself",
        "c.yaml:3: name: '${oc.env:NOT_SET}' cannot be resolved: the environment variable NOT_SET is not set; "
        "set it or write ${oc.env:NOT_SET,default}",
        "c.yaml:6: hook.b: '${os:x}' uses an unknown resolver; there are ${key}, ${oc.env:NAME} and ${configs:NAME}",
    ]


def test_c12_s9_the_value_behind_an_interpolation_is_never_shown(monkeypatch):
    monkeypatch.setenv("MY_SEED", "canary-4711")
    text = "\n".join(problems("seed: ${oc.env:MY_SEED}\nrecompute: ${seed}\nhook: ${seed}\noutput_dir: /proc/${seed}"))
    assert "canary" not in text
    assert "seed: expected an integer or null, got '${oc.env:MY_SEED}'" in text


def test_s9_a_config_cannot_carry_a_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_canarycanarycanarycanary")
    (problem,) = problems("name: ${oc.env:HF_TOKEN}")
    assert "HF_TOKEN is a secret; remove it" in problem
    assert "canary" not in problem


def test_s9_a_token_typed_into_a_config_is_not_shown():
    assert "canary" not in problems("seed: hf_canarycanarycanarycanary")[0]


def test_c13_a_config_for_another_recipe(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="is a config for the recipe 'dpo', not 'stub': tune run dpo --config "):
        read("recipe: dpo\nbeta: 1")
    other = tmp_path / "dpo.py"
    other.write_text("class Config:\n    beta: float = 1\n    gamma: float = 1\n    delta: float = 1\n")
    monkeypatch.setattr(shipped, "recipes", lambda: {"dpo": other})
    assert problems("beta: 1\ngamma: 1\ndelta: 1")[-1] == "3 of the 4 keys are keys of the recipe 'dpo', 1 of 'stub'"


def test_c14_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert read("", "checkpoint_dir=~/models").checkpoint_dir == Path("/home/ada/models")
    assert read("", "output_dir=a folder/mit Ümlaut/#1: x").output_dir == Path("a folder/mit Ümlaut/#1: x")
    assert "$NAME is not replaced in paths" in problems("", "checkpoint_dir=$HOME/x")[0]
    assert "expected a path, got ''" in problems("", "checkpoint_dir=")[0]
    Path("a_file").touch()
    assert "cannot be written: " in problems("", "output_dir=a_file/out")[0]


def test_k24_no_meaning_is_read_into_a_path():
    for path in ("/x/stephan/epoch_3", "/step_000100/recipe", "a.pt/model"):
        assert read("", f"checkpoint_dir={path}").checkpoint_dir == Path(path)


def test_c16_s2_nothing_that_a_yaml_names_is_imported(tmp_path):
    (tmp_path / "evil.py").write_text("open('imported', 'w')\ndef f(): pass\n")
    (problem,) = problems("optimizer: evil.f")
    assert "if you wrote it, add --trust evil to the command line" in problem
    registry.trust("evil")
    file = Path("c.yaml")
    config = load(Config, recipe="stub", file=file, overrides=[], import_trusted=False)
    assert config.optimizer == Component("evil.f", {})
    assert not Path("imported").exists()
    with pytest.raises(UserError, match=r"evil\.f must accept 'params', which the recipe passes to it"):
        load(Config, recipe="stub", file=file, overrides=[])
    assert Path("imported").exists()


def test_a_component_of_the_user_is_checked_by_its_annotations(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from collections.abc import Callable, Sequence\nfrom typing import Literal\n"
        "def opt(params, mode: Literal['a', 'b'], *, steps: int = 1, names: Sequence[str] = (), key: Callable = None,"
        " **more): pass\n"
    )
    registry.trust("mine")
    assert problems("optimizer: {_component_: mine.opt, steps: x, names: [1.5], other: 1}") == [
        "c.yaml:2: optimizer.steps: expected an integer, got 'x'",
        "c.yaml:2: optimizer.names.0: expected text, got 1.5",
        "c.yaml:2: optimizer.mode: mine.opt needs it: 'a' or 'b'",
    ]
    assert read("optimizer: {_component_: mine.opt, mode: a, key: {_component_: mine.opt, params: 1, mode: b}}")
