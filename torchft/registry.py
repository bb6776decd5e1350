"""The exact names that a YAML may use as ``_component_``, and nothing else.

A name resolves only by exact match in COMPONENTS: no prefix, no wildcard, and no module is imported because a file
names it. The user's own code comes in by the command line (``--trust my_package``) or by the recipe that the user runs
(``registry.add(my_dataset, kind="dataset")``), never by a YAML. Trust is authorisation, not a sandbox.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from torchft.errors import UserError
from torchft.names import nearest

# public name -> kind. The object is a class or a function, defined in that module (or, for a third party's package,
# below it) under that very name. A parameter that the recipe supplies is declared where the recipe declares the field.
COMPONENTS: dict[str, str] = {
    "torchft.data.datasets.auto": "dataset",
    "torchft.data.datasets.chat": "dataset",
    "torchft.data.datasets.completion": "dataset",
    "torchft.data.datasets.instruct": "dataset",
    "torchft.data.datasets.tokenized": "dataset",
    "torchft.data.labelled.candidates": "preferences",
    "torchft.data.labelled.classes": "preferences",
    "torchft.data.labelled.graded": "preferences",
    "torchft.data.named_pairs.hh_rlhf": "preferences",
    "torchft.data.named_pairs.stack_exchange": "preferences",
    "torchft.data.named_pairs.ultrafeedback": "preferences",
    "torchft.data.named.alpaca": "dataset",
    "torchft.data.named.cnn_dailymail": "dataset",
    "torchft.data.named.grammar": "dataset",
    "torchft.data.named.gsm8k": "dataset",
    "torchft.data.named.hh_rlhf": "dataset",
    "torchft.data.named.llava_instruct": "dataset",
    "torchft.data.named.openhermes": "dataset",
    "torchft.data.named.samsum": "dataset",
    "torchft.data.named.slimorca": "dataset",
    "torchft.data.named.stack_exchange": "dataset",
    "torchft.data.named.the_cauldron": "dataset",
    "torchft.data.named.tulu3": "dataset",
    "torchft.data.named.ultrachat": "dataset",
    "torchft.data.named.ultrafeedback": "dataset",
    "torchft.data.named.wikitext": "dataset",
    "torchft.data.preferences.auto": "preferences",
    "torchft.data.preferences.pairs": "preferences",
    "torchft.data.preferences.scored": "preferences",
    "torchft.data.preferences.stepwise": "preferences",
    "torchft.data.preferences.unpaired": "preferences",
    "torchft.losses.distill.forward_kl": "divergence",
    "torchft.losses.distill.jensen_shannon": "divergence",
    "torchft.losses.distill.reverse_kl": "divergence",
    "torchft.losses.distill.symmetric_kl": "divergence",
    "torchft.losses.preference.bco": "preference_loss",
    "torchft.losses.preference.cpo": "preference_loss",
    "torchft.losses.preference.dpo": "preference_loss",
    "torchft.losses.preference.dpo_normalised": "preference_loss",
    "torchft.losses.preference.hinge": "preference_loss",
    "torchft.losses.preference.ipo": "preference_loss",
    "torchft.losses.preference.kto": "preference_loss",
    "torchft.losses.preference.nca": "preference_loss",
    "torchft.losses.preference.orpo": "preference_loss",
    "torchft.losses.preference.robust": "preference_loss",
    "torchft.losses.preference.simpo": "preference_loss",
    "torchft.data.prompts.prompts": "prompts",
    "torchft.data.texts.texts": "texts",
    "torchft.rl.environments.calculator": "environment",
    "torchft.rl.reward_model.reward_model": "reward",
    "torchft.rl.rewards.exact_match": "reward",
    "torchft.rl.rewards.length": "reward",
    "torchft.rl.rewards.math_answer": "reward",
    "torchft.rl.rewards.regex": "reward",
    "torchft.rl.rewards.shared_start": "reward",
    "torchft.losses.reward.binary_cross_entropy": "reward_loss",
    "torchft.losses.reward.bradley_terry": "reward_loss",
    "torchft.losses.reward.cross_entropy": "reward_loss",
    "torchft.losses.reward.listwise": "reward_loss",
    "torchft.losses.reward.margin": "reward_loss",
    "torchft.losses.reward.regression": "reward_loss",
    "torchft.losses.reward.steps": "reward_loss",
    "torch.optim.Adafactor": "optimizer",
    "torch.optim.AdamW": "optimizer",
    "torch.optim.Muon": "optimizer",
    "torch.optim.SGD": "optimizer",
    "torchao.optim.AdamW4bit": "optimizer",
    "torchao.optim.AdamW8bit": "optimizer",
    "torchao.optim.AdamWFp8": "optimizer",
    "torchft.training.cpu_offload.AdamWOffloaded": "optimizer",
    "torchft.training.optim.MuonWithAdamW": "optimizer",
    "torchft.training.stochastic.AdamWStochastic": "optimizer",
    "torchft.training.schedules.constant": "lr_schedule",
    "torchft.training.schedules.cosine": "lr_schedule",
    "torchft.training.schedules.linear": "lr_schedule",
    "torchft.training.schedules.rex": "lr_schedule",
    "torchft.training.schedules.wsd": "lr_schedule",
    "torchft.training.loggers.MLflow": "metric_logger",
    "torchft.training.loggers.TensorBoard": "metric_logger",
    "torchft.training.loggers.WandB": "metric_logger",
    "torchft.models.deepseek_v3.chat": "chat_format",
    "torchft.models.glm4_moe.chat": "chat_format",
    "torchft.models.gpt_oss.harmony": "chat_format",
    "torchft.models.kimi_k2.chat": "chat_format",
    "torchft.models.llama2.chat": "chat_format",
    "torchft.models.llama3.chat": "chat_format",
    "torchft.models.llama3.chat_3_1": "chat_format",
    "torchft.models.llama3.chat_3_2": "chat_format",
    "torchft.models.llama4.chat": "chat_format",
    "torchft.models.qwen3.chat": "chat_format",
    "torchft.models.qwen3_5.chat": "chat_format",
}

_added: dict[str, tuple[Callable[..., Any], str]] = {}  # by the running recipe
_trusted: list[str] = []  # by the command line


def names(kind: str) -> list[str]:
    """The names of one kind that a YAML may use."""
    known = [*COMPONENTS.items(), *((name, kind) for name, (_, kind) in _added.items())]
    return sorted(name for name, k in known if k == kind)


def kind(name: str) -> str | None:
    """What ``name`` is; None for a name of a trusted package, whose kind nobody declares. UserError if unknown."""
    if name in _added:
        return _added[name][1]
    if name in COMPONENTS:
        return COMPONENTS[name]
    if is_trusted(name):
        return None
    raise UserError(f"{name!r} is not a known component{_nearest(name)}{_way_in(name)}")


def resolve(name: str) -> Callable[..., Any]:
    """The class or function behind ``name``, imported now. UserError if the name is unknown or not what it says."""
    kind(name)  # refuses an unknown name before anything is imported
    if name in _added:
        return _added[name][0]
    module, _, attribute = name.rpartition(".")
    is_ours = name in COMPONENTS
    home = module if is_ours else _package_of(name)
    found = vars(importlib.import_module(module))[attribute] if is_ours else _user_object(name, module, attribute)
    if not (inspect.isclass(found) or inspect.isfunction(found)) or (is_ours and found.__qualname__ != attribute):
        raise UserError(f"{name!r} is not a class or a function of that name, so it cannot be a component")
    if not f"{found.__module__}.".startswith(f"{home}."):
        raise UserError(
            f"{name!r} is defined in {found.__module__!r}, not in {home!r}; only what is your own is trusted"
        )
    return found


def add(component: Callable[..., Any], *, kind: str) -> None:
    """Let YAMLs name ``component``, a class or function of the running recipe. Its name there is the bare one if it is
    defined in the recipe file itself, else with its module."""
    if not (inspect.isclass(component) or inspect.isfunction(component)):
        raise UserError(f"registry.add takes a class or a function, got {component!r}")
    module = "" if component.__module__ == "__main__" else f"{component.__module__}."
    _added[module + component.__qualname__] = (component, kind)


def trust(package: str) -> None:
    """Let YAMLs name what is defined in the user's own ``package``. Only ever called for the command line."""
    if not all(part.isidentifier() for part in package.split(".")):
        raise UserError(f"--trust {package}: expected the name of a Python package, for example my_package")
    if package.split(".")[0] in _NOT_YOURS:
        raise UserError(f"--trust {package}: this is not your own package; only code that you wrote can be trusted")
    if package not in _trusted:
        _trusted.append(package)


def is_trusted(name: str) -> bool:
    """Whether ``name`` is the user's own code, by the command line."""
    return any(name.startswith(f"{package}.") for package in _trusted)


_NOT_YOURS = {*sys.stdlib_module_names, *(name.split(".")[0] for name in COMPONENTS)}


def _package_of(name: str) -> str:
    return next(package for package in _trusted if name.startswith(f"{package}."))


def _user_object(name: str, module: str, attribute: str) -> object:
    if any(part.startswith("_") for part in name.split(".")):
        raise UserError(f"{name!r}: a private name cannot be a component")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that no file there hides a library
    try:
        found = vars(importlib.import_module(module))
    except ModuleNotFoundError as e:
        if e.name is None or not f"{module}.".startswith(f"{e.name}."):
            raise  # the user's module imports something that is missing: theirs to see in full
        raise UserError(f"{name!r}: there is no module {e.name!r} in {os.getcwd()} or among the packages") from None
    if attribute not in found:
        raise UserError(f"{name!r}: {module!r} has no {attribute!r}{nearest(attribute, found)}")
    return found[attribute]


def _nearest(name: str) -> str:
    known = [*_added, *COMPONENTS]
    same_end = [k for k in known if k.rpartition(".")[2] == name.rpartition(".")[2]]
    return f" (did you mean {same_end[0]!r}?)" if same_end else nearest(name, known)


def _way_in(name: str) -> str:
    package = name.split(".")[0]
    if "." not in name or package in _NOT_YOURS or not package.isidentifier():
        return ""
    return f"; if you wrote it, add --trust {package} to the command line"
