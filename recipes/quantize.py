"""A checkpoint in fewer bits, without training: int4, int8, fp8 or NF4 weights, as transformers and vLLM load them.

    tune run quantize --config demo/quantize                       # the demo: a few seconds on a CPU
    tune run quantize --config llama3/8B_int4 dataset_eval.source=held_out.jsonl
    tune run quantize checkpoint_dir=Qwen3-8B format=nf4 output_dir=out/nf4 adapter=out/my_run/export/adapter
    python recipes/quantize.py --config my.yaml format=fp8

One tensor at a time is read, rounded on the device and written; a model is loaded only to be measured, calibrated or
merged with an adapter. To change it: `tune cp quantize my_recipe.py`, then `tune run my_recipe.py --config ...`.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from torchft import models, tokenizers
from torchft.adapters.targets import ALL_LINEAR
from torchft.cli.run import start
from torchft.config import Component, Folder, Kind, Range, dump
from torchft.data.loader import Loader
from torchft.data.mixture import mix
from torchft.data.prefetch import one_epoch
from torchft.data.samples import Samples
from torchft.data.summary import summarise
from torchft.dequantise import open_weights
from torchft.errors import UserError, collecting
from torchft.export import save_trained
from torchft.files import atomic_write, remove_folder
from torchft.generation.loaded import load
from torchft.losses.likelihood import nll_sum
from torchft.modules.decoder import Decoder
from torchft.quantise import Quantisation, calibrated, hub_layers, save_quantised
from torchft.tokenizers.tokenizer import Tokenizer
from torchft.training import distributed
from torchft.training.console import Console, count, last_panel
from torchft.training.disk import check_space
from torchft.training.distributed import ParallelConfig, World
from torchft.training.run_folder import open_run

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Dataset = Annotated[Component, Kind("dataset", supplied=("tokenizer", "seq_len"), default="torchft.data.datasets.auto")]
Report = dict[str, Any]  # what report.json holds: numbers, and two words about where they come from


@dataclass(frozen=True, kw_only=True)
class Config:
    checkpoint_dir: Annotated[Path, Folder(exists=True)]  # a Hub folder: family, sizes, tokenizer and chat format
    adapter: Annotated[Path, Folder(exists=True)] | None = None  # a PEFT folder, merged in before weights are rounded
    output_dir: Annotated[Path, Folder(writable=True)]  # report.json, export/
    chat_format: str | None = None  # instead of the checkpoint's own template: llama2, llama3, or a .jinja file
    resume: Literal["auto", "accept_changes", "never"] = "auto"  # accept_changes: overwrite what another config made

    # What is rounded, and to what
    format: Literal["int4", "int8_int4", "int8", "nf4", "fp8", "fp8_weight", "fp8_int4"] = "int4"  # docs/quantize.md
    group_size: Literal[32, 64, 128, 256] = 32  # int4: weights of a row that share a scale
    search_scales: bool = False  # int4: scales that make the error small (HQQ); slower
    packed: bool = True  # int4: two codes in a byte; one loads in transformers on any device, but takes an int8's space
    targets: str | list[str] = ALL_LINEAR  # pattern(s) of linear layers; all-linear = every one but lm_head
    ignore: list[str] = field(default_factory=list)  # pattern(s) of those that are left as they are all the same
    calibration: Dataset | None = None  # packed int4: texts by whose inputs weights are rounded (AWQ), cut to seq_len

    # What is measured
    dataset_eval: Dataset | None = None  # held out: perplexity before and after, of what training would learn
    seq_len: Annotated[int, Range(min=2)] = 2048  # tokens
    batch_size: Annotated[int, Range(min=1)] = 8  # rows computed together

    dtype: Literal["bf16", "fp32"] = "bf16"  # of what is not rounded, and of the arithmetic
    device: str = "auto"  # auto takes the accelerator if there is one

    def conflicts(self) -> Iterator[str]:
        if self.calibration and not (self.format == "int4" and self.packed):
            yield "calibration: AWQ is for int4 with packed: true; leave it out, or change these"


@torch.no_grad()
def evaluate(model: Decoder, loader: Loader, world: World) -> float:
    """Mean negative log-likelihood, nats per supervised token, over all of ``loader``, of all ranks."""
    model.eval()
    total, supervised = torch.zeros((), device=world.device, dtype=torch.float64), 0
    for batch in one_epoch(loader, world.device):
        head = partial(nll_sum, labels=batch.labels, num_supervised=batch.num_supervised)
        total += model(batch.tokens, batch.positions, documents=batch.documents, head=head)
        supervised += batch.all_supervised
    model.train()
    return world.sum(total).item() / supervised


def checked_data(config: Config, how: Quantisation, tokenizer: Tokenizer, world: World) -> list[Samples | None]:
    """What is held out, and the texts to calibrate with. UserError with all that keeps the run from its end."""
    problems: list[str] = []
    found: list[Samples | None] = []
    with collecting(problems):
        hub_layers(config.checkpoint_dir, how, device=world.device, dtype=DTYPES[config.dtype])
    vocab_size = models.sizes(config.checkpoint_dir).vocab_size
    for node in (config.dataset_eval, config.calibration):
        with collecting(problems):
            samples = mix([node.build(tokenizer=tokenizer, seq_len=config.seq_len)]) if node else None
            if samples:
                summarise(samples).check(vocab_size=vocab_size, batch_size=1)
            found.append(samples)
    if problems:
        raise UserError(*problems)
    return found


def measured(config: Config, model: Decoder, samples: Samples, world: World, *, when: str) -> dict[str, float]:
    """The model's perplexity on what is held out, as fields of the report."""
    nll = evaluate(model, Loader(samples, batch_size=config.batch_size, seed=0, shuffle=False), world)
    return {f"nll_{when}": nll, f"perplexity_{when}": math.exp(min(nll, 700.0))}


def main(config: Config) -> None:
    with distributed.init(ParallelConfig(), device=config.device) as world:
        if world.size > 1:
            raise UserError("quantize runs in one process: start it without torchrun", is_shared=True)
        about = {"recipe": "quantize", "checkpoint_dir": config.checkpoint_dir, "device": str(world)}
        with open_run(config.output_dir, dump(config), resume=config.resume, **about) as run:
            quantize(config, run.path, world)


def quantize(config: Config, folder: Path, world: World) -> None:
    tokenizer = tokenizers.load(config.checkpoint_dir, chat_format=config.chat_format)
    dtype = DTYPES[config.dtype]
    how = Quantisation(
        format=config.format,
        group_size=config.group_size,
        search_scales=config.search_scales,
        packed=config.packed and config.format == "int4",
        targets=config.targets,
        ignore=config.ignore,
    )
    samples, texts = checked_data(config, how, tokenizer, world)
    source, merged, export = config.checkpoint_dir, folder / "merged", folder / "export"
    check_space(folder, open_weights(source).num_bytes, copies=2 if config.adapter else 1)
    report: Report = {"checkpoint_dir": str(source), "format": config.format}

    # Before: the model as it is, with its adapter
    if samples or config.adapter:
        given = {"adapter": config.adapter, "chat_format": config.chat_format}
        model, _ = load(source, **given, dtype=dtype, device=world.device)
        if samples:
            report |= {"tokens": sum(samples.lengths()), **measured(config, model, samples, world, when="before")}
        if config.adapter:
            source = save_trained(model, merged, checkpoint_dir=source, tokenizer=tokenizer, dtype=dtype)
        del model

    # Its weights, one after the other
    scales = None
    if texts:
        model, _ = load(source, dtype=dtype, device=world.device)
        scales = calibrated(model, [texts[i].tokens for i in range(len(texts))], source, how, dtype=dtype)
        report["calibration_tokens"] = sum(texts.lengths())
        del model
    names = save_quantised(source, export, how, tokenizer, device=world.device, dtype=dtype, scales=scales)

    # After: what was written, read again
    if samples:
        model, _ = load(export, chat_format=config.chat_format, dtype=dtype, device=world.device)
        report |= measured(config, model, samples, world, when="after")
    before, after = open_weights(source), open_weights(export)
    sizes = {name: math.prod(after.shape(name)) for name in after.names()}
    share = sum(sizes[name] for name in names) / sum(sizes.values())
    report |= {"bytes_before": before.num_bytes, "bytes_after": after.num_bytes, "share_of_parameters": share}
    if config.adapter:
        remove_folder(merged)
    atomic_write(folder / "report.json", json.dumps(report, indent=1) + "\n")
    show(report, folder)


def show(report: Report, folder: Path) -> None:
    """The report, and what to do with the export, for people."""
    facts = {"format": f"{report['format']}, of {report['share_of_parameters']:.1%} of the parameters"}
    facts["on the disk"] = f"{count(report['bytes_before'])}B -> {count(report['bytes_after'])}B"
    if "tokens" in report:
        facts["perplexity"] = f"{report['perplexity_before']:.4f} -> {report['perplexity_after']:.4f}"
        facts["measured on"] = f"{count(report['tokens'])} tokens"
    export = folder / "export"
    where = {"report": f"{folder / 'report.json'}", "model": f"{export}"}
    ask = {"ask it": ["tune", "generate", str(export), "Hello!"]}
    last_panel(Console(), "Quantised", facts | where, ask)


if __name__ == "__main__":
    start(main, Config, recipe="quantize")
