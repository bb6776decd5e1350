"""Writes docs/models.md from the code, and measures parity: ``PYTHONPATH=. python tests/models_page.py``."""

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
import yaml  # noqa: E402
from families import CASES  # noqa: E402
from oracles import against_transformers, distance  # noqa: E402
from released import RELEASED  # noqa: E402
from tiny import tokens, transformers_model  # noqa: E402
from vocabularies import template  # noqa: E402

from torchft import models, registry, shipped  # noqa: E402
from torchft.errors import UserError  # noqa: E402
from torchft.tokenizers.added import AddedTokens  # noqa: E402
from torchft.tokenizers.templates import TemplateChat  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
HEAD = """\
# Models

Written by `PYTHONPATH=. python tests/models_page.py`, from the families' tables, the parity suite and the shipped
configs; a test holds it current. Any other size of a family loads too: its numbers come from its own `config.json`.
[Adding a family](adding_a_family.md) takes one file.

**Parity** is measured in fp32 against transformers with tiny random models of the family's every variant, on documents
that are longer than windows and old contexts: the largest difference of a logit, and the largest relative L2 distance
of a parameter's gradient. The suite's bars are 1e-4 and 1e-5. **Chat** says what the released template renders, which
is what is trained on; "exact" where a format of our own renders just that, and its name where `chat_format:` takes it.
Recipes are the same for all: full fine-tuning, LoRA, QLoRA and what else `tune ls` lists; **configs** are those that
ship for the sizes that people tune.
"""
TEMPLATES = {  # of families whose released template trl ships
    "command_r7b": "cohere2", "deepseek_v3": "deepseekv3", "gemma": "gemma", "gemma2": "gemma", "gemma3": "gemma3",
    "gemma4": "gemma4", "glm4_moe": "glm4moe", "gpt_oss": "gptoss", "llama3": "llama3_1", "phi3": "phi3_5",
    "qwen2": "qwen2_5", "qwen3": "qwen3", "qwen3_moe": "qwen3", "qwen3_5": "qwen3_5_think",
}  # fmt: skip


def case_family(case: str) -> str:
    """The family that a case of the parity suite is of; what shares Llama's architecture is Llama 3's."""
    module = models.ARCHITECTURES[CASES[case]["architectures"][0]]
    return next(name for name, family in models.FAMILIES.items() if family is module and name == module_name(family))


def module_name(family: object) -> str:
    return family.__name__.rpartition(".")[2]  # type: ignore[attr-defined]


def parity() -> dict[str, tuple[float, float]]:
    """family -> (largest difference of a logit, largest relative L2 of a gradient) over its cases."""
    found: dict[str, tuple[float, float]] = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            theirs = transformers_model(**({"rms_norm_eps": 1e-3} | case))
            theirs.save_pretrained(folder)
            ours = models.load(folder, dtype=torch.float32)
            batch = tokens(vocab_size=ours.config.vocab_size)
            pairs = against_transformers(ours, theirs, batch, Path(folder) / "gradients")
        logits = distance(*pairs["logits"])[0]
        worst = max(distance(*pair)[1] for kind, pair in pairs.items() if kind not in ("logits", "loss"))
        old = found.get(case_family(name), (0.0, 0.0))
        found[case_family(name)] = (max(logits, old[0]), max(worst, old[1]))
    return found


def sizes(family: str) -> Iterator[str]:
    for name in models.FAMILIES[family].CONFIGS:
        numel = next(numel for repo, (_, numel) in RELEASED.items() if repo.split("/")[1] == name)
        short = f"{numel / 1e9:.1f}B" if numel >= 9.95e8 else f"{numel / 1e6:.0f}M"
        yield f"{name} ({short})"


def context(family: str) -> str:
    lengths = sorted({row.max_seq_len for row in models.FAMILIES[family].CONFIGS.values()})
    names = [f"{n // 1024}k" if n % 1000 else f"{n // 1000}k" for n in lengths]
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def chat(family: str) -> str:
    """What the released template takes, seen by rendering; and the native format's name."""
    native = [n for n in registry.names("chat_format") if n.startswith(f"torchft.models.{family}.")]
    words = [f"`{family}`" if any(n.endswith(".chat") for n in native) else "exact"] if native else []
    source = (
        template(TEMPLATES[family]) if family in TEMPLATES else getattr(models.FAMILIES[family], "CHAT_TEMPLATE", None)
    )
    if source is None:
        return ", ".join(words or ["the checkpoint's template"])
    chat = TemplateChat({"default": source}, family, {"bos_token": "", "eos_token": ""}, AddedTokens([]))
    answer = {"role": "assistant", "content": "B"}
    thought = answer | {"reasoning_content": "THOUGHT", "thinking": "THOUGHT"}
    tool = {"type": "function", "function": {"name": "NAME", "description": "D", "parameters": {"type": "object"}}}
    probes = {
        "system": ([{"role": "system", "content": "SYSTEM"}, {"role": "user", "content": "A"}, answer], {}, "SYSTEM"),
        "tools": ([{"role": "user", "content": "A"}, answer], {"tools": [tool]}, "NAME"),
        "thinking": ([{"role": "user", "content": "A"}, thought], {}, "THOUGHT"),
    }
    for word, (messages, options, wanted) in probes.items():
        try:
            words += [word] * (wanted in chat.text(messages, **options))
        except UserError:
            continue
    return ", ".join(words) or "user and model alone"


def configs(family: str) -> str:
    """Folders under configs/ whose checkpoints are of the family."""
    rows = {name.lower() for name in models.FAMILIES[family].CONFIGS}
    folders: dict[str, int] = {}
    for name, file in shipped.configs().items():
        folder = name.partition("/")[0]
        checkpoint = str(yaml.safe_load(file.read_text())["checkpoint_dir"]).lower()
        if folder != "demo" and any(is_tuned(checkpoint, row) for row in rows):
            folders[folder] = folders.get(folder, 0) + 1
    return ", ".join(f"`{folder}/` ({count})" for folder, count in folders.items()) or "-"


def is_tuned(checkpoint: str, row: str) -> bool:
    """Whether the names are of one size of one family: equal but for the words that name a stage of training."""
    stage = re.compile(r"-(instruct|chat|it|pt|base|hf|\d{4})\b|meta-")
    return stage.sub("", checkpoint) == stage.sub("", row)


def page(measured: dict[str, str]) -> str:
    """The page, with ``measured`` in the column of parity."""
    lines = [HEAD, "| family | parity: logits, gradients | context | chat | configs |", "|---|---|---|---|---|"]
    for family in sorted(models.FAMILIES):
        name = f"[{family}](../torchft/models/{family}.py)"
        cells = [name, measured.get(family, "?"), context(family), chat(family), configs(family)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Released sizes", ""]
    lines += [f"- **{family}**: {', '.join(sizes(family))}" for family in sorted(models.FAMILIES)]
    return "\n".join(lines) + "\n"


def measured_of(text: str) -> dict[str, str]:
    """The column of parity of a page."""
    return dict(re.findall(r"^\| \[(\w+)\]\(\S+\) \| ([^|]+?) \|", text, flags=re.M))


def main() -> None:
    found = parity()
    same = {n: f"as {family.build.__module__.rpartition('.')[2]}" for n, family in models.FAMILIES.items()}
    PAGE.write_text(page(same | {n: f"{logits:.0e}, {grads:.0e}" for n, (logits, grads) in found.items()}))


if __name__ == "__main__":
    main()
