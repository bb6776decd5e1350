"""What the first panel of a run says of its model and its plan."""

from pathlib import Path

from torchft.adapters.lora import num_parameters
from torchft.modules.decoder import Decoder
from torchft.training.compile import compiled
from torchft.training.console import count
from torchft.training.recompute import Plan


def run_facts(
    model: Decoder, plan: Plan, *, device: str, steps: int, rows: int, seq_len: int, step: int, output: Path
) -> dict[str, str]:
    """``steps`` of ``rows`` rows of all ranks, of which ``step`` are done."""
    trained, total = num_parameters(model)
    goes_on = f", going on after step {step}" if step else ""
    if step >= steps:
        goes_on = f", where all {step} steps are done: nothing is left to train; max_steps or epochs would add to them"
    return {
        "model": f"{count(total)} parameters, {model.config.num_layers} layers of {model.config.dim}",
        "trained": f"{count(trained)} of them ({trained / total:.2%})",
        "device": device,
        "steps": f"{steps} of {rows} rows, at most {rows * seq_len:,} tokens each",
        "activations": plan.reason,
        "compiled": str(compiled()) if plan.budget is not None else "no",
        "memory": ", ".join(f"{name} {size}" for name, size in plan.memory.lines().items()) + " (estimate)",
        "output": f"{output}{goes_on}",
    }
