"""A DPO step with LoRA, ours and TRL's with Liger's kernels, on the same pairs; prints one JSON line.

    python benchmarks/dpo_step.py ours
    python benchmarks/dpo_step.py ours --share-prompts false      # each answer with a prompt of its own, as TRL has it
    python benchmarks/dpo_step.py trl --recompute                 # with gradient checkpointing

Random bf16 weights, LoRA of rank 16 on all seven projections, gradients clipped at norm 1, fused AdamW; the reference
are the weights without the adapter, computed in each step. Pairs have lengths as in UltraFeedback-like sets: lognormal,
prompts of some 200 tokens, answers of some 250. A step has the pairs that fill ``--tokens``, prompts counted for both
answers; TRL pads them to the longest, as it packs no pairs. Ours packs them into rows of ``--seq-len``.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from functools import partial
from typing import Any

import torch

from torchft import models
from torchft.adapters.fused import fuse_lora
from torchft.adapters.lora import LoRAConfig, apply_lora, init_adapters
from torchft.config import Component
from torchft.data.collect import collect
from torchft.data.loader import Loader
from torchft.data.samples import Encoded, Limits
from torchft.data.sources import Row
from torchft.losses.answers import answer_logps, judge_pairs
from torchft.losses.likelihood import token_logps
from torchft.training.environment import device_name, pick_device
from torchft.training.metrics import peak_memory_gib
from torchft.training.optim import clip_grad_norm, param_groups
from torchft.training.recompute import plans
from torchft.training.reference import Reference
from torchft.training.routing import RoutingConfig
from torchft.training.sharing import share_pairs
from torchft.training.trial import by_head, settle

SIZES = {"8b": "llama3/Llama-3.1-8B", "1b": "llama3/Llama-3.2-1B", "tiny": ""}
WARM = 2  # steps that are not counted
LETTERS = range(97, 123)  # bytes, which are tokens of a byte tokenizer
EOS = 128001

Pair = tuple[list[int], list[int], list[int]]  # prompt, chosen, rejected


def pairs(count: int, seq_len: int) -> list[Pair]:
    """Made of letters, so that they are text, too."""
    rng = random.Random(0)

    def some(mu: float, most: int) -> list[int]:
        return rng.choices(LETTERS, k=min(most, max(8, round(rng.lognormvariate(mu, 0.8)))))

    most = seq_len // 4 - 1
    return [(some(5.0, most), [*some(5.2, most), EOS], [*some(5.2, most), EOS]) for _ in range(count)]


def length(pair: Pair) -> int:
    prompt, chosen, rejected = map(len, pair)
    return 2 * prompt + chosen + rejected


def encode(values: dict[str, Any]) -> Encoded:
    prompt, *answers = values["pair"]
    documents = [(prompt + answer, [False] * len(prompt) + [True] * len(answer)) for answer in answers]
    (first, trains), (second, trains_too) = documents
    return Encoded(first + second, trains + trains_too, border=len(first))


def ours(given: argparse.Namespace, made: list[Pair], device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    model = models.build(SIZES[given.shape] or tiny()).to(torch.bfloat16)
    apply_lora(model, LoRAConfig(rank=16, alpha=32))
    fuse_lora(model)
    samples = collect(
        (Row("made", i, {"pair": pair}) for i, pair in enumerate(made)),
        encode,
        Limits(seq_len=given.seq_len, too_long="error"),
        pad_id=0,
    )
    setting = {"auto": "auto", "true": True, "false": False}[given.share_prompts]
    shares, prompts = share_pairs(setting, model, RoutingConfig(), samples, packed=True)  # type: ignore[arg-type]
    shape = {"seq_len": given.seq_len, "packed": True, "device": device}
    rows = given.tokens // given.seq_len
    found = plans(
        model,
        recompute=given.recompute or "auto",
        offload=0.0,
        compiled=device.type == "cuda",
        branches=shares,
        rows=rows,
        **shape,
    )
    model.to_empty(device=device)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.02 if p.ndim > 1 else torch.ones_like(p))
    init_adapters(model)
    plan = settle(model.train(), found, by_head(model, token_logps), **shape)
    loader = Loader(samples, batch_size=plan.rows, seed=0, packed=True, one_shape=True, shares_prompts=shares)
    optimizer = torch.optim.AdamW(param_groups(model), lr=1e-5, fused=True)
    params = [p for p in model.parameters() if p.requires_grad]
    reference, loss = Reference(model), Component("torchft.losses.preference.dpo", {"beta": 0.1})
    seconds, counts = [], []
    batches = iter(loader)
    for step in range(WARM + given.steps):
        window = [next(batches).to(device) for _ in range(rows // plan.rows)]
        num_pairs = sum(len(batch.samples) for batch in window)
        if step == WARM and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for batch in window:
            known = reference.logps(batch)
            head = partial(answer_logps, **batch.answers, ld_alpha=None, collisions=False)
            policy = model(batch.tokens, batch.positions, documents=batch.documents, head=head)
            judged = judge_pairs(loss.call, policy, known, **batch.answers)
            (judged.losses.sum() / num_pairs).backward()
        clip_grad_norm(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        last = judged.losses.mean().item()  # waits for the device
        seconds.append(time.perf_counter() - began)
        counts.append(sum(length(made[i]) for batch in window for i in batch.samples))
    return {"plan": plan.reason, "prompts": prompts, "loss": last} | timing(seconds, counts, device)


def trl(given: argparse.Namespace, made: list[Pair], device: torch.device) -> dict[str, Any]:
    from datasets import Dataset
    from peer_models import PROJECTIONS, hf_config
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters(), eos_token="</s>", pad_token="<pad>")
    with device:
        model = AutoModelForCausalLM.from_config(hf_config(given.shape), dtype=torch.bfloat16)
    per_step = max(1, round(given.tokens * len(made) / sum(map(length, made))))
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize() if device.type == "cuda" else None
            if len(seconds) == WARM and device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self.began = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            torch.cuda.synchronize() if device.type == "cuda" else None
            seconds.append(time.perf_counter() - self.began)

    micro = given.micro or per_step
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=max(1, per_step // micro),
        max_steps=WARM + given.steps,
        max_length=None,
        gradient_checkpointing=bool(given.recompute),
        use_liger_kernel=not given.no_liger,
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        learning_rate=1e-5,
        logging_steps=1000,
        save_strategy="no",
        report_to="none",
        beta=0.1,
    )
    columns = {
        name: [bytes(t for t in pair[i] if t != EOS).decode() for pair in made]
        for i, name in enumerate(("prompt", "chosen", "rejected"))
    }
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[Clock()],
    )
    row = trainer.train_dataset[0]
    assert len(row["prompt_ids"]) == len(made[0][0]) and len(row["chosen_ids"]) == len(made[0][1]), "not the same pairs"
    trainer.train()
    mean = sum(map(length, made)) / len(made)  # of all pairs: which are in a step, the trainer does not say
    counts = [round(mean * micro * max(1, per_step // micro))] * len(seconds)
    return {"pairs_per_step": per_step, "micro": micro} | timing(seconds, counts, device)


def timing(seconds: list[float], counts: list[int], device: torch.device) -> dict[str, Any]:
    timed = seconds[WARM:]
    return {
        "tokens_per_second": round(sum(counts[WARM:]) / sum(timed)),
        "seconds_per_step": round(statistics.median(timed), 3),
        "spread": round((max(timed) - min(timed)) / statistics.median(timed), 3),
        "tokens_per_step": round(statistics.mean(counts[WARM:])),
        "peak_memory_gib": round(peak_memory_gib(device), 2),
    }


def letters() -> Any:
    """A tokenizer whose tokens are single letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocab = {chr(c): c for c in LETTERS} | {"<pad>": 128004, "</s>": EOS}
    made = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z]"), "isolated")
    return made


def tiny() -> dict[str, Any]:
    from peer_models import hf_config

    return hf_config("tiny").to_dict() | {"architectures": ["LlamaForCausalLM"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=("ours", "trl"))
    parser.add_argument("--shape", choices=SIZES, default="8b")
    parser.add_argument("--tokens", type=int, default=16384, help="of a step")
    parser.add_argument("--seq-len", type=int, default=4096, help="ours: tokens of a row")
    parser.add_argument("--share-prompts", choices=("auto", "true", "false"), default="auto")
    parser.add_argument("--recompute", nargs="?", const="full", help="ours: default auto; TRL: default none")
    parser.add_argument("--micro", type=int, help="TRL: pairs per backward pass; default: all of a step")
    parser.add_argument("--no-liger", action="store_true")
    parser.add_argument("--steps", type=int, default=6, help="timed")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    device = pick_device(given.device)
    many = 2 + (WARM + given.steps) * given.tokens // 700
    result = {"ours": ours, "trl": trl}[given.library](given, pairs(many, given.seq_len), device)
    about = {"device": device_name(device), "torch": torch.__version__}
    print(json.dumps(vars(given) | result | about))


if __name__ == "__main__":
    main()
