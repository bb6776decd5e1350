"""Seconds from the command to the first step of a LoRA run, cold and warm; prints one JSON line per start.

    python benchmarks/start.py /dev/shm/start              # 16 GB in Llama 3.1 8B's shape, made there once
    python benchmarks/start.py /scratch/start fp8={} --starts 2
    python benchmarks/start.py out/start --model llama3/Llama-3.2-1B --layers 2 device=cpu compile=false seq_len=128

The command is `tune run lora_finetune`, as a user starts it: three steps of 8 rows of 2048 tokens, packed, compiled.
The first start has an empty cache folder, the others what it left there; each has a run folder of its own. Weights are
random, and so is the tokenizer, but of Llama 3's size and kind. Seconds count from the making of the process.
"""

import argparse
import json
import os
import random
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="on a local disk: 17 GB for 8B")
    parser.add_argument("--model", default="llama3/Llama-3.1-8B", help="a released size")
    parser.add_argument("--layers", type=int, help="instead of the model's own")
    parser.add_argument("--rows", type=int, default=8000, help="conversations of about 300 tokens")
    parser.add_argument("--starts", type=int, default=2, help="the first is cold")
    parser.add_argument("values", nargs="*", metavar="key=value", help="of the config")
    given = parser.parse_intermixed_args()
    base = given.folder / "base"
    if not (base / "model.safetensors.index.json").exists() and not (base / "model.safetensors").exists():
        began = time.perf_counter()
        make_checkpoint(base, given.model, given.layers)
        print(f"made {base} in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    data = given.folder / "train.jsonl"
    make_data(data, given.rows)
    config = given.folder / "config.yaml"
    settings = {
        "recipe": "lora_finetune",
        "checkpoint_dir": str(base),
        "dataset": {"_component_": "torchft.data.datasets.chat", "source": str(data)},
        "seq_len": 2048, "packed": True, "batch_size": 8, "max_steps": 3, "compile": True, "export": ["adapter"],
    }  # fmt: skip
    config.write_text(json.dumps(settings, indent=1))
    cache = given.folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    for i in range(given.starts):
        out = given.folder / f"out_{i}"
        shutil.rmtree(out, ignore_errors=True)
        words = ["--config", str(config), f"output_dir={out}", *given.values]
        log = given.folder / f"start_{i}.log"
        with open(log, "w") as f:
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            env = os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": path, "START_MARKS": f"{out}.json"}
            done = subprocess.run([sys.executable, __file__, *words], env=env, stdout=f, stderr=subprocess.STDOUT)
        if done.returncode:
            sys.exit(f"start {i} failed:\n{log.read_text()[-4000:]}")
        marks = json.loads(Path(f"{out}.json").read_text())
        first = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
        marks["first_step_done"] = round(first["start_to_first_step_s"], 2)
        panel = [
            line.strip("│ \n") for line in log.read_text().splitlines() if "compiled " in line or "tokenised" in line
        ]
        print(json.dumps({"start": "warm" if i else "cold", "model": given.model, **marks, "panel": panel}), flush=True)


def start() -> None:
    """In the timed process: run the recipe, noting when its parts are done."""
    from torchft.training.environment import seconds_since_start

    marks: dict[str, float] = {}

    def mark(name: str) -> None:
        marks.setdefault(name, round(seconds_since_start() or 0.0, 2))  # the first call of each counts

    def marked(module: Any, function: str, name: str) -> None:
        inner: Callable[..., Any] = getattr(module, function)

        def outer(*args: Any, **kwargs: Any) -> Any:
            mark(f"{name}_begins")
            result = inner(*args, **kwargs)
            mark(f"{name}_done")
            return result

        setattr(module, function, outer)

    mark("torch_imported")
    import torch

    from torchft import hub, tokenizers
    from torchft.cli import run
    from torchft.data import summary
    from torchft.training import console, state, trial

    load_weights = hub.load_weights

    def loaded(*args: Any, **kwargs: Any) -> None:
        load_weights(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    hub.load_weights = loaded
    for module, function, name in (
        (run, "start", "main"), (tokenizers, "load", "tokenizer"), (summary, "summarise", "data"),
        (hub, "load_weights", "weights"), (state, "base_fingerprint", "fingerprint"), (trial, "settle", "plan"),
        (console, "first_panel", "panel"),
    ):  # fmt: skip
        marked(module, function, name)
    sys.argv[0] = str(ROOT / "recipes" / "lora_finetune.py")
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        marks["imports_done"] = marks["main_begins"]
        for other in (
            "main_begins",
            "main_done",
            "tokenizer_begins",
            "data_begins",
            "fingerprint_begins",
            "panel_begins",
        ):
            marks.pop(other, None)
        Path(os.environ["START_MARKS"]).write_text(json.dumps(dict(sorted(marks.items(), key=lambda mark: mark[1]))))


def make_checkpoint(folder: Path, name: str, layers: int | None) -> None:
    """Random weights in bf16 with a tokenizer of Llama 3's size."""
    import torch

    from torchft import hub, models

    config = models.build(name).hub_format.config_json
    if layers:
        config = config | {"num_hidden_layers": layers}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = models.build(config).to(torch.bfloat16).to_empty(device=device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0, std=0.0) if parameter.ndim == 1 else torch.nn.init.normal_(
            parameter, std=0.02
        )
    hub.save(model, folder)
    make_tokenizer(folder, model.config.vocab_size)


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """Byte-level BPE with random merges: as many tokens as the model has, about two merges for each as in Llama 3."""
    rng = random.Random(0)
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in prints]
    alphabet = [chr(b) for b in prints] + [chr(0x100 + i) for i in range(len(others))]
    vocab = {char: i for i, char in enumerate(alphabet)}
    letters = [c for c in alphabet if c.isascii() and c.isalpha()] + ["\u0120"]
    tokens, merges = list(letters), []
    while len(vocab) < vocab_size - 256:
        left, right = rng.choice(tokens), rng.choice(tokens)
        token = left + right
        if token in vocab or len(token) > 12 or "\u0120" in token[1:]:
            continue
        ways = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        merges += [list(way) for way in ways]
        vocab[token] = len(vocab)
        tokens.append(token)
    special = [*SPECIAL, *(f"<|reserved_special_token_{i}|>" for i in range(256 - len(SPECIAL)))]
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    byte = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = [{"id": len(vocab) + i, "content": content, "special": True} for i, content in enumerate(special)]
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "added_tokens": added,
                "normalizer": None,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte]},
                "post_processor": None,
                "model": {"type": "BPE", "ignore_merges": True, "vocab": vocab, "merges": merges},
            }
        )
    )
    named = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[-1], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def make_data(path: Path, rows: int) -> None:
    """Conversations with lognormal lengths, as instruction data has them."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]

    def text() -> str:
        return " ".join(rng.choices(words, k=min(500, max(2, round(rng.lognormvariate(3.3, 0.9))))))

    lines = ([{"role": "user", "content": text()}, {"role": "assistant", "content": text()}] for _ in range(rows))
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in lines))


if __name__ == "__main__":
    start() if "START_MARKS" in os.environ else main()
