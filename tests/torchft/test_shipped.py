"""Names to files, for shipped and for the user's own."""

from dataclasses import fields

import pytest

from torchft import shipped
from torchft.config_load import load
from torchft.errors import UserError


@pytest.fixture
def library(tmp_path, monkeypatch):
    for path, text in {
        "recipes/stub.py": '"""Do it. All.\n\nMore.\n"""\nclass Config:\n    lr: float = 1e-4\n    steps: int\n',
        "recipes/dpo.py": "",
        "configs/demo/stub.yaml": "a: 1\nrecipe: stub\n",
        "configs/tiny/dpo.yaml": "",
        "configs/demo/make_data.py": "",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(shipped, "folder", lambda name: tmp_path / name)
    return tmp_path


def test_names(library):
    assert list(shipped.recipes()) == ["dpo", "stub"]
    assert list(shipped.configs()) == ["demo/stub", "tiny/dpo"]
    assert shipped.find_recipe("stub") == library / "recipes" / "stub.py"
    assert shipped.find_config("demo/stub") == library / "configs" / "demo" / "stub.yaml"
    assert shipped.recipe_of(shipped.find_config("demo/stub")) == "stub"
    assert shipped.summary(shipped.find_recipe("stub")) == "Do it. All."
    assert shipped.recipe_of(shipped.find_config("tiny/dpo")) is None
    assert shipped.keys(shipped.find_recipe("stub")) == {"lr", "steps"}


def test_own_files(library, tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("lr: 1")
    assert shipped.find_config(str(mine)) == mine


@pytest.mark.parametrize(
    "name", ["demo/stubb", "../configs/demo/stub", "demo/../demo/stub", "demo/stub.yaml", "/etc/passwd", "demo"]
)
def test_s7_only_exact_names(library, name):
    with pytest.raises(UserError, match="config"):
        shipped.find_config(name)


def test_the_nearest_name(library):
    with pytest.raises(UserError, match=r"there is no recipe 'stbu'.*did you mean 'stub'"):
        shipped.find_recipe("stbu")


@pytest.mark.parametrize("name", shipped.configs())
def test_every_shipped_config_is_valid_for_its_recipe(name, tmp_path):
    file = shipped.configs()[name]
    recipe = shipped.recipe_of(file)
    config = vars(shipped.load_recipe(recipe))["Config"]
    writes = [f"output_dir={tmp_path}"] if "output_dir" in {field.name for field in fields(config)} else []
    load(config, recipe=recipe, file=file, overrides=[f"checkpoint_dir={tmp_path}", *writes])


@pytest.mark.parametrize("name", shipped.recipes())
def test_every_shipped_recipe_has_a_config_and_a_summary(name):
    assert shipped.summary(shipped.recipes()[name])
    assert name in {shipped.recipe_of(path) for path in shipped.configs().values()}
