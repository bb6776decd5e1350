"""``tune validate``: everything is checked, and nothing of the user's runs."""

from pathlib import Path

import pytest


def test_one_line_of_what_was_checked(library, tune):
    assert tune("validate", "--config", "demo/stub") == (0, "demo/stub is valid for stub; 4 keys; no components\n", "")
    sgd = "dataset={_component_: torch.optim.SGD, params: [1]}"
    code, out, _ = tune("validate", "stub_single_device", "--config", "demo/stub", sgd, "~lr")
    assert (code, out) == (0, "demo/stub is valid for stub; 4 keys; components torch.optim.SGD\n")


def test_all_problems(library, tune):
    code, out, err = tune("validate", "--config", "demo/stub", "lr=0", "stepz=1", "dataset={_component_: os.system}")
    assert (code, out) == (2, "")
    assert err.splitlines()[0] == "error: 3 problems"
    assert len(err.splitlines()) == 4


def test_s2_c16_user_code_is_not_imported_even_when_trusted(library, tune):
    Path("my_pkg.py").write_text("open('imported', 'w')\ndef rows(): pass\n")
    words = ["validate", "--config", "demo/stub", "dataset={_component_: my_pkg.rows, x: 1}"]
    code, _, err = tune(*words)
    assert (code, "add --trust my_pkg" in err) == (2, True)
    code, out, _ = tune(*words, "--trust", "my_pkg")
    assert code == 0
    assert out.endswith("; not checked (user code): my_pkg.rows\n")
    assert not Path("imported").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dpo", "--config", "demo/stub"], "is a config for the recipe 'stub', not 'dpo': tune run stub --config "),
        (["--config", "mine.yaml"], "mine.yaml has no 'recipe: NAME' line; name the recipe"),
        (["mine.py", "--config", "mine.yaml"], "mine.py is your own code, and validate imports none"),
        (["--config", "none.yaml"], "the config none.yaml does not exist"),
        (["--config", "latin.yaml"], "latin.yaml has no 'recipe: NAME' line"),
        (["stub", "--config", "latin.yaml"], "latin.yaml:1:8: byte 0xe9 is not UTF-8"),
        (["stub"], "the following arguments are required: --config"),
    ],
)
def test_errors(library, tune, words, message):
    Path("mine.yaml").write_text("lr: 1\n")
    Path("latin.yaml").write_bytes(b"lr: caf\xe9")
    Path("mine.py").write_text("raise SystemExit('imported')\n")
    code, _, err = tune("validate", *words)
    assert code == 2
    assert message in err


def test_files_that_are_not_there_are_named_all_at_once(tune):
    words = ["validate", "--config", "demo/lora", "dataset.source=nope.jsonl#20", "exact_match.source=gone.jsonl"]
    code, out, err = tune(*words)
    assert (code, out) == (2, "")
    assert "2 problems" in err and "nope.jsonl does not exist" in err and "gone.jsonl does not exist" in err
    assert tune("validate", "--config", "demo/lora", "dataset.source=some-org/on-the-hub")[0] == 0  # nobody is asked
    code, _, err = tune("validate", "--config", "demo/lora", "dataset.source=[gone.jsonl, lost.jsonl]")
    assert code == 2 and "gone.jsonl does not exist" in err and "lost.jsonl does not exist" in err
    foreign = "dataset={_component_: my_pkg.rows, source: a/word.of/theirs.jsonl}"
    assert tune("validate", "--config", "demo/lora", "--trust", "my_pkg", foreign)[0] == 0
