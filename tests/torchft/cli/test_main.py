"""Exit codes, help, and that no verb imports more than it needs."""

import resource
import subprocess
import sys

import pytest

from torchft.cli.main import exit_on_user_error


def test_help_and_version(tune):
    for words in ([], ["--help"], ["-h"]):
        code, out, _ = tune(*words)
        assert code == 0
        assert "download" in out
        assert "tune run lora_finetune --config demo/lora" in out
    assert tune("--version")[1].startswith("torchft 0.")
    for verb in ("ls", "run", "cp", "cat", "validate", "download"):
        code, out, _ = tune(verb, "--help")
        assert (code, f"usage: tune {verb}" in out) == (0, True)


def test_an_unknown_verb_is_told_the_nearest(tune):
    assert tune("runn") == (
        2,
        "",
        "error: tune has no command 'runn' (did you mean 'run'?); `tune --help` lists them\n",
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ls", "--all"], "unknown option '--all'"),
        (["cp", "x"], "the following arguments are required: FILE"),
        (
            ["run", "stub", "--max_steps", "3"],
            "did you mean '--max_restarts'?) (a config value is given without dashes: max_st",
        ),
        (
            ["run", "stub", "demo/stub"],
            "demo/stub: expected key=value to set or ~key to remove; a config is named by --config",
        ),
        (["run", "stub", "--batch_size=4"], "unknown option '--batch_size=4' (a config value is given without dashes"),
        (["run", "stub", "--nprocpernode=4"], "unknown option '--nprocpernode=4' (did you mean '--nproc_per_node'?)"),
        (["run", "stub", "--hf-token", "x"], "unknown option '--hf-token'"),
        (["download", "a/b", "--token", "x"], "unknown option '--token'"),
    ],
)
def test_unknown_options_are_errors(library, tune, words, message):
    code, out, err = tune(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err


def test_debug_shows_the_traceback(tune):
    code, _, err = tune("cat", "nothing", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert "error: torchft ships no recipe or config 'nothing'" in err


@pytest.mark.parametrize("words", [["ls"], ["cat", "lora_finetune"], ["--help"], ["run", "--help"], ["cp", "--help"]])
def test_no_verb_that_only_reads_imports_torch(python, words):
    code = f"import sys; from torchft.cli.main import main\ntry: main({words})\nexcept SystemExit: pass\n"
    done = python("-c", code + "print('torch' in sys.modules)")
    assert done.stdout.endswith("False\n")


def test_a_closed_pipe_is_no_error():
    listing = subprocess.Popen(
        [sys.executable, "-m", "torchft.cli.main", "ls"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    listing.stdout.close()
    assert listing.stderr.read() == b""
    assert listing.wait() == 0


@exit_on_user_error(debug=False)
def open_files(files, path):
    for _ in range(65):
        files.append(open(path, "w"))  # noqa: SIM115 the point is to leave them open


def test_r3_too_many_open_files_says_what_to_raise(tmp_path, capsys):
    before, files = resource.getrlimit(resource.RLIMIT_NOFILE), []
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
    try:
        with pytest.raises(SystemExit) as end:
            open_files(files, tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for file in files:
            file.close()
    told = capsys.readouterr().err
    assert end.value.code == 2 and "Too many open files" in told and "have 64 open; run `ulimit -n 65536`" in told
