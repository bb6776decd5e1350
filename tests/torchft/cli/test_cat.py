"""``tune cat``"""


def test_prints_a_config_or_a_recipe_as_it_is(library, tune):
    assert tune("cat", "demo/stub") == (0, "# a config\nrecipe: stub\nlr: 1e-3\n", "")
    assert tune("cat", "stub")[1] == (library / "recipes" / "stub.py").read_text()


def test_s7_prints_nothing_else(library, tune):
    for name in ("/etc/passwd", "../recipes/stub", "demo/stub.yaml"):
        code, out, err = tune("cat", name)
        assert (code, out) == (2, "")
        assert "torchft ships no recipe or config" in err
