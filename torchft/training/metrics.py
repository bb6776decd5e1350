"""metrics.jsonl (each step once, whatever was killed or resumed), loss.png, and what a step's speed amounts to."""

import io
import json
import logging
import math
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from torchft.files import atomic_write
from torchft.ranks import is_main
from torchft.training.graphs import held_bytes

log = logging.getLogger(__name__)

Row = dict[str, float | int | str | None]

# Dense bf16 matrix FLOP/s by the name that torch.cuda.get_device_name gives, from the vendors' data sheets; of several
# names that fit, the longest counts.
PEAK_FLOPS = {
    "A100": 312e12,
    "A10": 125e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165.2e12,
    "RTX 5090": 209.5e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "MI250X": 383e12,
    "MI300X": 1307e12,
}


class MetricsFile:
    """Appends one JSON object per step; ``resume_step`` finished steps are kept, later and torn lines dropped. 0: none.

    If the disk is full, training goes on: one warning, and the rows that failed are lost. Of several ranks the main one
    writes.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        self.path = path
        if is_main():
            rows = [row for row in read_rows(path) if resume_step and _step(row) <= resume_step]
            atomic_write(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = open(path if is_main() else os.devnull, "a", encoding="utf-8")  # noqa: SIM115 closed by close()
        self._warned = False

    def write(self, row: Mapping[str, float | int | str | None]) -> None:
        """One line, at once in the file. A value that is not finite is written as null, as JSON has no other word."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        try:
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
        except OSError as e:
            if not self._warned:
                log.warning("%s can't be written (%s): training goes on without it", self.path, e.strerror)
            self._warned = True

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as e:  # what the disk had no room for
            log.warning("%s is incomplete: %s", self.path, e.strerror)


def read_rows(path: Path) -> list[Row]:
    """The whole rows of a metrics.jsonl, up to a torn line; none if there is no file."""
    rows: list[Row] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break  # a kill tore it, and nothing follows
    return rows


def results(metrics: Path, **where: str) -> dict[str, str]:
    """For the last panel: the files of a run, those of ``where`` too, and what was held out, before and after."""
    found = {"checkpoints": f"{metrics.parent}/step_*", "metrics": f"{metrics}", **where}
    rows = [row for row in read_rows(metrics) if measures(row)]
    if rows:
        before = f"{measures(rows[0])}; after: " if rows[0]["step"] == 0 and len(rows) > 1 else ""
        found["held out"] = f"{before}{measures(rows[-1])}"
    return found


def measures(row: Mapping[str, float | int | str | None]) -> str:
    """What ``row`` says of held-out data, for people."""
    parts = ((name, value) for name, value in row.items() if name.startswith("eval_"))
    return ", ".join(f"{name[5:].replace('_', ' ')} {value:.4g}" for name, value in parts if isinstance(value, float))


def draw_loss(rows: Sequence[Mapping[str, float | int | str | None]], path: Path, *, title: str) -> None:
    """Loss over steps as a picture: each step, their mean over 5% of the run, and ``eval_loss`` where there is one.

    Of several ranks the main one draws.
    """
    if not is_main():
        return
    from matplotlib.figure import Figure  # 0.5 s, so only when a picture is due

    steps, losses = _points(rows, "loss")
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    marker = "." if len(losses) < 20 else None
    axes.plot(steps, losses, marker=marker, color="#9ecae1", linewidth=1, label="each step")
    if len(losses) >= 20:
        half = max(1, len(losses) // 40)
        around = [losses[max(0, i - half) : i + half + 1] for i in range(len(losses))]
        axes.plot(steps, [sum(w) / len(w) for w in around], color="#08519c", linewidth=2, label="smoothed")
    eval_steps, eval_losses = _points(rows, "eval_loss")
    if eval_steps:
        axes.plot(eval_steps, eval_losses, "o-", color="#d94801", linewidth=1.5, markersize=4, label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per supervised token")
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if losses or eval_losses:
        axes.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    atomic_write(path, png.getvalue())


def flops_per_token(
    *, num_matrix_params: int, num_trainable: int, num_layers: int, attention_dim: int, seq_len: int
) -> float:
    """FLOPs that training needs for one token, forward and backward, nothing counted twice for recompute.

    Forward 2 per matrix parameter, the same for the gradient of its input, and 2 per *trainable* one for its own
    gradient; plus causal attention, 6 * layers * attention_dim * seq_len. https://arxiv.org/abs/2204.02311, appendix B,
    which counts attention without the causal mask: twice as much.

    Args:
        num_matrix_params: all that multiply a token; not an embedding table that is only looked up.
        attention_dim: heads times head size.
        seq_len: mean length of a document, if rows are packed.
    """
    return 4 * num_matrix_params + 2 * num_trainable + 6 * num_layers * attention_dim * seq_len


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a known GPU; None for others and for CPUs."""
    fits = [name for name in PEAK_FLOPS if f" {name} " in f" {device_name.replace('-', ' ')} "]
    return PEAK_FLOPS[max(fits, key=len)] if fits else None


def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation, 0 to 1, of one device; None if its peak is unknown."""
    return tokens_per_second * flops_per_token / peak if peak else None


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that tensors held on an accelerator, or on the CPU the process's largest resident size."""
    if device.type == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return (torch.accelerator.max_memory_allocated(device) + held_bytes()) / 2**30


def _points(rows: Sequence[Mapping[str, float | int | str | None]], key: str) -> tuple[list[int], list[float]]:
    found = [(_step(row), float(value)) for row in rows if (value := row.get(key)) is not None]
    return [step for step, _ in found], [value for _, value in found]


def _step(row: Mapping[str, float | int | str | None]) -> int:
    return int(row["step"] or 0)
