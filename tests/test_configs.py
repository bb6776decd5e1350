"""Every shipped config is valid for the recipe that it names, and its surgery fits the released model."""

import importlib.util
from pathlib import Path

import pytest
import torch
import yaml

from torchft import models, shipped
from torchft.adapters.formats import unfit
from torchft.adapters.lora import apply_lora, num_parameters
from torchft.adapters.nf4 import apply_nf4
from torchft.adapters.qat import apply_qat
from torchft.adapters.targets import find_linears
from torchft.config_load import load
from torchft.errors import UserError

CONFIGS = shipped.configs()
SIZES = {
    name.lower(): f"{family}/{name}"
    for family, module in (models.FAMILIES | models.ENCODERS).items()
    for name in module.CONFIGS
}


def recipe_config(recipe: str) -> type:
    spec = importlib.util.spec_from_file_location(recipe, shipped.recipes()[recipe])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Config


ENDINGS = {"-instruct": "", "-chat": "", "-it": "", "b-it": "b-pt", "b-instruct": "b-base"}  # tuned -> base
OTHERS = {  # tuned releases of which no row has the name
    "mistral-7b-instruct-v0.3": "mistral-7b-v0.3",
    "mistral-nemo-instruct-2407": "mistral-nemo-base-2407",
    "mistral-small-24b-instruct-2501": "mistral-small-24b-base-2501",
    "olmo-3-7b-instruct": "olmo-3-1025-7b",
}


def released(folder: str) -> str:
    """'Llama-3.2-1B-Instruct' -> 'llama3/Llama-3.2-1B'"""
    name = folder.lower()
    names = [OTHERS.get(name, name), *(name.replace(tuned, base) for tuned, base in ENDINGS.items())]
    return SIZES[next(n for n in names if n in SIZES)]


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_valid_and_fits_its_model(name: str, tmp_path: Path) -> None:
    raw = yaml.safe_load(CONFIGS[name].read_text())
    demo = name.startswith("demo/")
    overrides = [] if demo else [f"checkpoint_dir={tmp_path}"]
    config = load(recipe_config(raw["recipe"]), recipe=raw["recipe"], file=CONFIGS[name], overrides=overrides)
    folder = config.checkpoint_dir if demo else raw["checkpoint_dir"]
    model = models.build(models.config_json(folder) if demo else released(folder))
    if raw["recipe"] == "lora_finetune":
        if config.nf4:
            apply_nf4(model, config.nf4)
        apply_lora(model, config.lora)
        trained, total = num_parameters(model)
        assert 0 < trained < 0.2 * total
    if raw["recipe"] == "quantize":
        layers = find_linears(model, config.targets, key="targets")
        how = {"device": torch.device("cpu"), "dtype": torch.bfloat16}
        problems = unfit(layers, config.format, group_size=config.group_size, **how)
        assert all(p.startswith("format: fp8 needs a GPU") for p in problems)
    if raw["recipe"] == "qat_finetune":
        if config.lora:
            apply_lora(model, config.lora)
        assert apply_qat(model, config.qat, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert config.seq_len <= model.config.max_seq_len


@pytest.mark.parametrize("recipe", shipped.recipes())
def test_n5_there_is_no_dtype_that_a_device_lacks(recipe: str) -> None:
    with pytest.raises(UserError, match=r"dtype: .*fp16"):
        load(recipe_config(recipe), recipe=recipe, file=None, overrides=["dtype=fp16"])


@pytest.mark.parametrize("name", [n for n in CONFIGS if not n.startswith("demo/")])
def test_first_lines_say_how_to_get_and_run_it(name: str) -> None:
    text = CONFIGS[name].read_text()
    raw = yaml.safe_load(text)
    assert f"/{raw['checkpoint_dir']}\n" in text.split("tune download", 1)[1].split("#", 1)[0]
    assert f"tune run {raw['recipe']} --config {name} " in text
