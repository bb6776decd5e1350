"""``tune cp``: copies, and loses nothing."""

from pathlib import Path

import pytest


def test_copies_with_the_right_suffix_and_says_how_to_run(library, tune):
    assert tune("cp", "demo/stub", "mine.yaml") == (
        0,
        "copied to mine.yaml; run it with: tune run stub --config mine.yaml\n",
        "",
    )
    assert Path("mine.yaml").read_bytes() == (library / "configs/demo/stub.yaml").read_bytes()
    assert tune("cp", "stub", "my_recipe")[1].endswith("tune run my_recipe.py --config CONFIG\n")
    assert Path("my_recipe.py").exists()
    assert tune("run", "my_recipe.py", "--config", "mine.yaml")[0] == 0


@pytest.mark.parametrize("name", ["stub_single_device", "stub_distributed"])
def test_names_that_run_takes_are_taken(library, tune, name):
    assert tune("cp", name, "mine.py") == (0, "copied to mine.py; run it with: tune run mine.py --config CONFIG\n", "")


def test_s7_never_overwrites_silently(library, tune):
    Path("mine.yaml").write_text("precious")
    code, _, err = tune("cp", "demo/stub", "mine.yaml")
    assert (code, Path("mine.yaml").read_text()) == (2, "precious")
    assert err == "error: mine.yaml exists; name another file or add --force to overwrite it\n"
    assert tune("cp", "demo/stub", "mine.yaml", "--force")[0] == 0
    assert Path("mine.yaml").read_text() != "precious"


def test_s7_a_link_is_replaced_not_followed(library, tune):
    Path("target.yaml").write_text("precious")
    Path("link.yaml").symlink_to("target.yaml")
    Path("dangling.yaml").symlink_to("nowhere.yaml")
    assert tune("cp", "demo/stub", "link.yaml")[0] == 2
    assert tune("cp", "demo/stub", "dangling.yaml")[0] == 2
    assert tune("cp", "demo/stub", "link.yaml", "--force")[0] == 0
    assert Path("target.yaml").read_text() == "precious"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo/stub", "."], "is a folder; name the file"),
        (["demo/stub", "mine.py"], "demo/stub is a .yaml file, mine.py is not; name it mine.yaml"),
        (["demo/stub", "a/b/mine.yaml"], "there is no folder a/b; create it or add --make-parents"),
        (["demo/stubs", "x"], "torchft ships no recipe or config 'demo/stubs' (did you mean 'demo/stub'?)"),
        (["../../etc/passwd", "x"], "torchft ships no recipe or config"),
        (["demo/stub", "/proc/x.yaml"], "cannot write /proc/x.yaml: "),
    ],
)
def test_errors(library, tune, words, message):
    code, _, err = tune("cp", *words)
    assert code == 2
    assert message in err


def test_make_parents(library, tune):
    assert tune("cp", "demo/stub", "a/b/mine.yml", "--make-parents")[0] == 0
    assert Path("a/b/mine.yml").exists()
