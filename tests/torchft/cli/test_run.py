"""``tune run``, ``python recipe.py`` and ``torchrun recipe.py`` are one path: same words, errors and exit codes."""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from torchft import shipped
from torchft.cli import run
from torchft.errors import UserError

TUNE = ("-m", "torchft.cli.main")


def test_a_recipe_with_a_config_and_overrides(library, tune):
    code, out, err = tune("run", "stub", "--config", "demo/stub", "steps=3")
    assert (code, out.partition(" torch")[0], err) == (0, "lr=0.001 steps=3 world=none", "")


def test_words_in_any_order(library, tune):
    assert tune("run", "--config=demo/stub", "stub", "~lr", "--debug", "steps=2")[1].startswith("lr=0.0001 steps=2")


def test_a_copy_of_the_user_runs_and_imports_its_neighbours(library, tune):
    tune("cp", "stub", "mine.py")
    Path("neighbour.py").write_text("LR = 1\n")
    Path("mine.py").write_text(Path("mine.py").read_text().replace("import os\n", "import os\nimport neighbour\n"))
    code, out, _ = tune("run", "./mine.py", "--config", "demo/stub")
    assert (code, out[:8]) == (0, "lr=0.001")


def test_all_three_ways_say_the_same(library, python):
    script = str(library / "recipes" / "stub.py")
    for words in (["lr=0", "stepz=1"], ["lr=2"], ["fail=interrupt"]):
        direct = python(script, *words)
        through = python(*TUNE, "run", script, *words)
        assert (direct.returncode, direct.stdout, direct.stderr) == (through.returncode, through.stdout, through.stderr)
        assert "Traceback" not in direct.stderr
    assert "torch=False" in python(script).stdout  # nothing here needs torch


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["lr=0", "stepz=1"], 2, "error: 2 problems\n  - command line: stepz: unknown key (did you mean 'steps'?)\n"),
        (["fail=user"], 2, "error: 2 problems\n  - the data is empty\n  - the model is missing\n"),
        (["fail=interrupt"], 130, "\ninterrupted\n"),
        (["--config", "tiny/dpo"], 2, "is a config for the recipe 'dpo', not 'stub': tune run dpo --config "),  # C13
        (["lr", "1"], 2, "command line: lr: expected key=value to set or ~key to remove"),
        (["--trust", "os"], 2, "--trust os: this is not your own package"),
    ],
)
def test_exit_codes(library, tune, words, code, message):
    found, out, err = tune("run", "stub", *words)
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_s9_a_failure_of_ours_shows_a_traceback_without_secrets(library, python):
    done = python(str(library / "recipes" / "stub.py"), "fail=ours")
    assert done.returncode == 1
    assert done.stderr.startswith("reading <redacted>\n")
    assert "RuntimeError: broken with <redacted>" in done.stderr
    assert "canary" not in done.stderr


def test_s1_s2_run_imports_nothing_that_a_yaml_names(library, tune):
    Path("my_pkg.py").write_text("open('imported', 'w')\ndef rows(n: int = 1): pass\n")
    for component in ("my_pkg.rows", "os.system"):
        Path("c.yaml").write_text(f"dataset: {{_component_: {component}, x: 1}}\n")
        code, _, err = tune("run", "stub", "--config", "c.yaml")
        assert code == 2
        assert f"c.yaml:1: dataset._component_: '{component}' is not a known component" in err
    assert not Path("imported").exists()
    Path("c.yaml").write_text("dataset: {_component_: my_pkg.rows, x: 1}\n")
    code, _, err = tune("run", "stub", "--config", "c.yaml", "--trust", "my_pkg")
    assert (code, Path("imported").exists()) == (2, True)
    assert "dataset.x: my_pkg.rows has no such parameter" in err


@pytest.mark.parametrize(
    ("name", "recipe", "distributed"),
    [
        ("stub", "stub", False),
        ("stub_single_device", "stub", False),
        ("stub_distributed", "stub", True),
        ("full_dpo_distributed", "dpo", True),
        ("lora_dpo_single_device", "dpo", False),
        ("lora_dpo_distributed", "dpo", True),
    ],
)
def test_aliases(library, name, recipe, distributed):
    assert run.find(name) == (library / "recipes" / f"{recipe}.py", distributed)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("ppo_full_finetune_single_device", "ppo"),
        ("qat_distributed", "qat_finetune"),
        ("qat_single_device", "qat_finetune"),
        ("qat_lora_finetune_distributed", "qat_finetune"),
        ("knowledge_distillation_distributed", "knowledge_distillation"),
        ("eleuther_eval", "evaluate"),
        ("dev/grpo_full_finetune_distributed", "grpo"),
        ("dev/generate_v2_distributed", "generate"),
        ("dev/lora_finetune_distributed_multi_dataset", "lora_finetune"),
    ],
)
def test_an_alias_of_a_recipe_that_is_not_there_yet_says_so(library, name, recipe):
    with pytest.raises(
        UserError, match=f"is a name of the recipe '{recipe}', which is planned, but not in this version"
    ):
        run.find(name)
    with pytest.raises(UserError, match=f"'{recipe}' is planned, but not in this version; it has dpo, stub"):
        run.find(recipe)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "tune run needs the name or the .py file of a recipe"),
        (["lr=1"], "tune run needs the name or the .py file of a recipe"),
        (["stubb"], "there is no recipe 'stubb' (did you mean 'stub'?)"),
        (["none.py"], "the recipe none.py does not exist"),
        (["stub", "--config", "demo/stu"], "there is no config 'demo/stu' (did you mean 'demo/stub'?)"),
        (["stub_single_device", "--nproc-per-node", "2"], "stub_single_device runs on one device"),
        (["stub", "--nnodes", "a:b"], "torchrun: "),
    ],
)
def test_errors(library, tune, words, message):
    code, _, err = tune("run", *words)
    assert code == 2
    assert message in err


def test_our_table_of_torchrun_options_is_torchruns():
    from torch.distributed.run import get_args_parser

    theirs = [action for action in get_args_parser()._actions if action.option_strings]
    flags = {a.option_strings[0] for a in theirs if a.nargs == 0} - {"-h", "-m", "--no-python", "--run-path"}
    valued = {next(o for o in a.option_strings if o.startswith("--")) for a in theirs if a.nargs != 0}
    assert all(isinstance(a, argparse.Action) for a in theirs)
    assert flags <= {f"--{name}" for name in run.TORCHRUN_FLAGS}
    assert valued <= {f"--{name}" for name in run.TORCHRUN}


def test_torchrun_options_start_one_process_each(library, python):
    script = str(library / "recipes" / "stub.py")
    done = python(*TUNE, "run", "--nproc-per-node", "2", script, "steps=2")
    assert (done.returncode, done.stdout) == (0, "lr=0.0001 steps=2 world=2 torch=False\n" * 2)


def test_a_distributed_alias_takes_all_visible_devices(library, tune, monkeypatch):
    calls = []
    monkeypatch.setattr("torch.distributed.run.run", lambda given: calls.append(given))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 8)
    assert tune("run", "stub_distributed", "--config", "demo/stub", "lr=1")[0] == 0
    assert tune("run", "--nnodes", "2", "--rdzv_endpoint=h:1", "--standalone", "stub_distributed")[0] == 0
    assert [given.nproc_per_node for given in calls] == ["8", "8"]
    assert (calls[1].nnodes, calls[1].rdzv_endpoint, calls[1].standalone) == ("2", "h:1", True)
    assert calls[0].training_script == str(library / "recipes" / "stub.py")
    assert calls[0].training_script_args == ["--config", str(library / "configs/demo/stub.yaml"), "lr=1"]
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert tune("run", "stub_distributed")[0] == 0
    assert calls[2].nproc_per_node == "1"


GOES_ON = "if it has saved a checkpoint, the same command goes on from there"


@pytest.mark.parametrize(
    ("word", "code", "lines"),
    [
        ("lr=0", 2, ["error: command line: lr: must be above 0, got 0.0"]),  # once, not once per rank
        ("fail=kill", 1, [f"error: rank 1 was killed by SIGKILL (exit code -9); {GOES_ON}"]),
    ],
)
def test_x1_a_failed_rank_is_named_last_and_without_noise(library, python, word, code, lines):
    done = python(*TUNE, "run", "--nproc-per-node", "2", str(library / "recipes" / "stub.py"), word)
    assert done.returncode == code
    assert done.stderr.splitlines() == lines


@pytest.mark.parametrize("options", [[], ["--nproc-per-node", "2"]])
def test_ctrl_c_ends_all_processes_with_130(library, options):
    started = subprocess.Popen(
        [sys.executable, *TUNE, "run", *options, str(library / "recipes" / "stub.py"), "fail=never"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(Path(shipped.__file__).parent.parent)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    for _ in range(2 if options else 1):
        assert started.stdout.readline().startswith("lr=")
    began = time.monotonic()
    os.killpg(started.pid, signal.SIGINT)  # what a terminal sends: to the whole group
    _, err = started.communicate(timeout=30)
    assert started.returncode == 130
    assert "Traceback" not in err
    assert time.monotonic() - began < 10


def test_a_broken_pipe_in_a_recipe_is_a_failure(library, tune):
    (library / "recipes" / "stub.py").write_text("raise BrokenPipeError")
    with pytest.raises(BrokenPipeError):
        tune("run", "stub")
