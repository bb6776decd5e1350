"""A step of GRPO by the recipe itself, or by TRL with transformers' generation; prints one JSON line.

    python benchmarks/grpo_step.py                                  # 64 prompts x 8 answers x 512 tokens, 1.5B, LoRA
    python benchmarks/grpo_step.py compile=true                       # any key of the recipe's config
    python benchmarks/grpo_step.py rollout.compile=false              # which else is on, on a GPU
    python benchmarks/grpo_step.py --trl                              # the same for TRL
    python benchmarks/grpo_step.py --trl --prompts 16                 # a quarter of the step, compared by tokens/s
    python benchmarks/grpo_step.py --shape tiny --prompts 2 --prompt 24 --new 16      # on a CPU, and with --trl

Qwen2.5 1.5B's shape with random weights in bf16, LoRA of rank 16 on all projections, AdamW, no KL, one update a step;
prompts of 512 letters, which are tokens here, and answers of 512: no text ends before, as one token in 151,936 does
that. The reward asks for a pattern that about half of the answers hold. Both sides load the same folder and get the
same prompts. Times are of whole steps, the first left out: rollout, rewards (a part of it), and the rest, the update.
``*_roofline``: the time that reading weights and cache once per token, or multiplying at the GPU's bf16 peak, would
take, over the time taken. Memory is what tensors hold after each phase, and at most in it.
"""

import argparse
import importlib.util
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from generate import BANDWIDTH
from peer_grpo import PATTERN, trl_steps
from peer_models import byte_tokenizer

from torchft import hub, models
from torchft.adapters.lora import LoRAConfig, apply_lora
from torchft.config_load import load
from torchft.modules.decoder import init_weights
from torchft.rl.scoring import Scorer
from torchft.training.environment import device_name, pick_device
from torchft.training.meter import training_flops
from torchft.training.metrics import MetricsFile, Row, peak_flops, read_rows

RECIPE = Path(__file__).parent.parent / "recipes" / "grpo.py"
SPECIAL = {"<|endoftext|>": 151643, "<|im_end|>": 151645}  # of Qwen 2.5
SHAPES: dict[str, dict[str, Any]] = {
    "1.5b": {},
    "tiny": {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"head_dim": 16, "intermediate_size": 128, "layer_types": ["full_attention"] * 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="key=value of the recipe's config")
    parser.add_argument("--trl", action="store_true", help="TRL in the recipe's place")
    parser.add_argument("--shape", choices=list(SHAPES), default="1.5b")
    parser.add_argument("--prompts", type=int, default=64, help="of a step")
    parser.add_argument("--group", type=int, default=8, help="answers to each")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new", type=int, default=512, help="tokens of each answer")
    parser.add_argument("--batch-size", type=int, default=16, help="answers of a micro-step")
    parser.add_argument("--trl-checkpointing", action="store_true", help="its gradient checkpointing")
    parser.add_argument("--steps", type=int, help="beside the first; default: 2, of TRL 1")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    given.steps = given.steps or (1 if given.trl else 2)
    given.device = pick_device(given.device)
    with tempfile.TemporaryDirectory() as folder:
        given.folder = Path(folder)
        write_checkpoint(given)
        write_prompts(given)
        watch = Watch(given.device)
        (trl_steps if given.trl else own_steps)(given, watch)
    print(json.dumps(summary(given, watch.steps), default=str))


def write_checkpoint(given: argparse.Namespace) -> None:
    sizes = models.build("qwen2/Qwen2.5-1.5B").hub_format.config_json | SHAPES[given.shape]
    torch.manual_seed(0)
    model = models.build(sizes).to(torch.bfloat16).to_empty(device=given.device)
    init_weights(model)
    given.checkpoint_dir = given.folder / "model"
    hub.save(model, given.checkpoint_dir)
    byte_tokenizer(sizes["vocab_size"], SPECIAL, eos="<|im_end|>", pad="<|endoftext|>").save_pretrained(
        given.checkpoint_dir
    )


def write_prompts(given: argparse.Namespace) -> None:
    letters, choose = "abcdefghijklmnopqrstuvwxyz ", random.Random(0)
    count = given.prompts * (1 + given.steps)
    rows = [{"prompt": "".join(choose.choices(letters, k=given.prompt))} for _ in range(count)]
    given.prompts_file = given.folder / "prompts.jsonl"
    given.prompts_file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def own_steps(given: argparse.Namespace, watch: "Watch") -> None:
    """The recipe, with a watch on its rollouts, its rewards and the ends of its steps."""
    spec = importlib.util.spec_from_file_location("grpo_recipe", RECIPE)
    assert spec is not None and spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    config, plain = given.folder / "config.yaml", given.folder / "plain.jinja"
    plain.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    config.write_text(
        json.dumps(
            {
                "checkpoint_dir": str(given.checkpoint_dir),
                "output_dir": str(given.folder / "run"),
                "export": ["adapter"],
                "chat_format": str(plain),
                "prompts": {"source": str(given.prompts_file)},
                "rollout": {
                    "prompts_per_step": given.prompts,
                    "group_size": given.group,
                    "num_slots": given.prompts * given.group,
                    "sampling": {"temperature": 1.0, "max_new_tokens": given.new},
                    "rewards": [
                        {"reward": {"_component_": "torchft.rl.rewards.regex", "pattern": PATTERN, "whole": False}}
                    ],
                },
                "seq_len": given.prompt + given.new,
                "batch_size": given.batch_size,
                "max_steps": 1 + given.steps,
                "lora": {},
                "recompute": "none",
                "device": str(given.device),
            }
        )
    )
    watch.around(recipe.Rollouts, "next", "rollout")
    watch.around(Scorer, "score", "reward")
    write = MetricsFile.write

    def ended(file: MetricsFile, row: Row) -> None:
        watch.end_step()
        write(file, row)

    MetricsFile.write = ended  # type: ignore[method-assign]
    recipe.main(load(recipe.Config, recipe="grpo", file=config, overrides=given.overrides))
    for row in read_rows(given.folder / "run" / "metrics.jsonl"):
        assert row["response_tokens"] > 0.98 * given.new, "answers ended early"


class Watch:
    """Seconds and GiB of each step's phases."""

    def __init__(self, device: torch.device) -> None:
        self.steps: list[dict[str, float]] = []
        self._device, self._own, self._began = device, dict[str, float](), 0.0

    def around(self, owner: Any, name: str, phase: str) -> None:
        """``owner.name`` is a phase, the outermost of which begin a step."""
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._settle()
            began = time.perf_counter()
            if phase == "rollout":
                self._own, self._began = {}, began
            found = inner(*args, **kwargs)
            self._settle()
            self._own[f"{phase}_s"] = self._own.get(f"{phase}_s", 0.0) + time.perf_counter() - began
            if phase == "rollout":
                self._own |= self._memory("rollout")
            return found

        setattr(owner, name, timed)

    def end_step(self) -> None:
        self._settle()
        self._own["step_s"] = time.perf_counter() - self._began
        self._own["update_s"] = self._own["step_s"] - self._own["rollout_s"]
        self.steps.append(self._own | self._memory("update"))

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def _memory(self, phase: str) -> dict[str, float]:
        """GiB after a phase, and the most that was held in it."""
        if self._device.type != "cuda":
            return {}
        held, most = torch.cuda.memory_allocated() / 2**30, torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return {f"{phase}_gib": held, f"{phase}_peak_gib": most}


def summary(given: argparse.Namespace, steps: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of the steps but the first."""
    own = {name: round(statistics.median(s[name] for s in steps[1:]), 2) for name in steps[-1]}
    answers = given.prompts * given.group
    name = device_name(given.device)
    found: dict[str, Any] = {"who": "trl" if given.trl else "torchft", "first_step_s": round(steps[0]["step_s"], 1)}
    found |= {key: getattr(given, key) for key in ("shape", "prompts", "group", "prompt", "new", "batch_size")}
    found |= own | {"answer_tokens_per_second": round(answers * given.new / own["step_s"])}
    bandwidth = next((b for card, b in BANDWIDTH.items() if card in name), None)
    flops = peak_flops(name)
    if bandwidth and flops:
        reading, multiplying = least_work(given)
        found |= {"rollout_roofline": round(reading / bandwidth / own["rollout_s"], 3)}
        found |= {"update_roofline": round(multiplying / flops / own["update_s"], 3)}
    found |= {"overrides": given.overrides, "device": name, "torch": torch.__version__}
    return found


def least_work(given: argparse.Namespace) -> tuple[float, float]:
    """Of a step: bytes that decoding reads, all answers at once; FLOPs of an update that computes each prompt once."""
    model = models.build(models.build("qwen2/Qwen2.5-1.5B").hub_format.config_json | SHAPES[given.shape])
    config, answers = model.config, given.prompts * given.group
    weights = 2 * sum(p.numel() for p in model.parameters())
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2
    reading = given.new * (weights + answers * (given.prompt + given.new / 2) * per_token)
    apply_lora(model, LoRAConfig())
    tokens = given.prompts * given.prompt + answers * given.new
    return reading, tokens * training_flops(model, seq_len=given.prompt + given.new)


if __name__ == "__main__":
    main()
