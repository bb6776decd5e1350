"""Only exact names resolve, nothing else is imported, and a trusted name must really be the user's own."""

import sys

import pytest

from torchft import registry
from torchft.errors import UserError


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_trusted", [])
    monkeypatch.setattr(registry, "_added", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def my_pkg(tmp_path):
    """A user's package in the current folder; importing it leaves a file behind."""
    package = tmp_path / "my_pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text(
        "from pathlib import Path\nfrom os import system\nfrom functools import partial\nimport os\n"
        "Path('imported').touch()\n"
        "def rows(n: int = 1): return n\n"
        "class Kept: pass\n"
        "def _hidden(): pass\n"
        "bound = partial(rows, 3)\n"
    )
    yield package
    for name in [name for name in sys.modules if name.split(".")[0] == "my_pkg"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", registry.COMPONENTS)
def test_every_component_is_what_its_name_says(name):
    assert callable(registry.resolve(name))
    assert name in registry.names(registry.kind(name))


@pytest.mark.parametrize(
    "name",  # S1, S3, S4: what runs code, by its own name or by an alias inside torchft and torch
    [
        "os.system", "builtins.eval", "builtins.exec", "subprocess.run", "importlib.import_module", "runpy.run_path",
        "pydoc.locate", "functools.partial", "numpy.load", "logging.os.system", "torch.load", "torch.hub.load",
        "torch.utils.cpp_extension.load_inline", "torch.optim.AdamW.__init__", "torch.optim", "torch.optim.*",
        "torchft.registry.importlib.import_module", "torchft.registry.trust", "torchft.cli.run.runpy.run_path",
        "torchft.data.datasets.chat.__globals__", "torchft.data.datasets", "", ".", "AdamW", "torch.optim.adamw.AdamW",
    ],
)  # fmt: skip
def test_s1_s3_s4_a_name_outside_the_registry_is_refused(name):
    with pytest.raises(UserError, match="not a known component"):
        registry.resolve(name)


def test_s2_c16_an_untrusted_module_is_never_imported(my_pkg, tmp_path):
    with pytest.raises(UserError, match="if you wrote it, add --trust my_pkg to the command line"):
        registry.resolve("my_pkg.parts.rows")
    assert not (tmp_path / "imported").exists()
    assert str(tmp_path) not in sys.path


def test_no_advice_to_trust_the_standard_library_or_torch():
    for name in ("os.system", "torch.hub.load", "torchft.nothing"):
        with pytest.raises(UserError) as e:
            registry.kind(name)
        assert "--trust" not in str(e.value)


@pytest.mark.parametrize("package", ["os", "builtins", "torch", "torchft.data", "torchao.optim", "../x", "a b", ""])
def test_only_the_users_own_package_can_be_trusted(package):
    with pytest.raises(UserError, match="--trust"):
        registry.trust(package)


def test_a_trusted_package_resolves(my_pkg):
    registry.trust("my_pkg")
    assert registry.kind("my_pkg.parts.rows") is None
    assert registry.resolve("my_pkg.parts.rows")(n=4) == 4
    assert registry.resolve("my_pkg.parts.Kept").__name__ == "Kept"


@pytest.mark.parametrize(
    "name",
    ["my_pkg.parts.system", "my_pkg.parts.os", "my_pkg.parts.Path", "my_pkg.parts.bound", "my_pkg.parts._hidden",
     "my_pkg.parts.os.system", "my_pkg.parts", "my_pkg.nothing.x", "my_pkg.parts.row", "my_pkg.parts.__loader__"],
)  # fmt: skip
def test_s3_a_trusted_name_must_be_defined_in_the_package(my_pkg, name):
    registry.trust("my_pkg")
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        registry.resolve(name)


def test_trust_reaches_one_package_only(my_pkg):
    registry.trust("my_pkg")
    with pytest.raises(UserError, match="--trust my_pkg2"):
        registry.kind("my_pkg2.parts.rows")


def test_an_error_inside_the_users_module_is_shown_as_it_is(my_pkg):
    (my_pkg / "broken.py").write_text("import a_module_that_is_missing\n")
    registry.trust("my_pkg")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_missing"):
        registry.resolve("my_pkg.broken.x")


def test_a_recipe_adds_its_own():
    def my_dataset(source: str) -> str:
        return source

    registry.add(my_dataset, kind="dataset")
    name = registry.names("dataset")[0]
    assert name.endswith("my_dataset")
    assert registry.kind(name) == "dataset"
    assert registry.resolve(name)("x") == "x"
    with pytest.raises(UserError, match="takes a class or a function"):
        registry.add("os.system", kind="dataset")


def test_c3_the_nearest_name_is_offered():
    for wrong, right in {"torch.optim.AdamWW": "torch.optim.AdamW", "AdamW8bit": "torchao.optim.AdamW8bit"}.items():
        with pytest.raises(UserError, match=f"did you mean '{right}'"):
            registry.kind(wrong)
