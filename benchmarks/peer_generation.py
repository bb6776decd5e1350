"""transformers' two ways to generate, on a random model of the same shape, for benchmarks/generate.py --peers."""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch


def random_model(config_json: dict[str, Any], device: torch.device) -> Any:
    """transformers' model of a config.json, in bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**config_json)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.generation_config.eos_token_id = model.config.eos_token_id = None  # nothing ends before its length
    return model.eval()


def generate(model: Any, prompts: list[list[int]], *, new: int, temperature: float) -> list[list[int]]:
    """Its ``generate``: one static batch."""
    rows = torch.tensor(prompts, device=model.device)
    mask = torch.ones_like(rows)
    out = model.generate(rows, attention_mask=mask, generation_config=_rules(new, temperature))
    return out[:, rows.shape[1] :].tolist()


def continuous(model: Any, prompts: list[list[int]], *, new: int, temperature: float) -> list[list[int]]:
    """Its continuous batching. What it sets up at a first call, a second one with as many requests finds."""
    how = {"generation_config": _rules(new, temperature), "persistent_manager": True, "progress_bar": False}
    found = model.generate_batch(inputs=prompts, **how)
    return [output.generated_tokens for output in found.values()]


def tokens_per_second(
    config_json: dict[str, Any], prompts: list[list[int]], *, new: int, temperature: float, device: torch.device
) -> dict[str, float]:
    """Of each peer: all new tokens over the time of a call, the second of two. Prefill is in it, as in ours.

    ``generate_decode``: of its decoding alone, the time of a call for one token taken off, as ours.
    """
    model = random_model(config_json, device)

    def seconds(model: Any, answer: Callable[..., list[list[int]]], new: int) -> float:
        began = time.perf_counter()
        answers = answer(model, prompts, new=new, temperature=temperature)
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken = time.perf_counter() - began
        assert len(answers) == len(prompts) and all(len(tokens) == new for tokens in answers)
        return taken

    seconds(model, generate, 2)
    first, whole = seconds(model, generate, 1), seconds(model, generate, new)
    found = {
        "generate": len(prompts) * new / whole,
        "generate_decode": len(prompts) * (new - 1) / (whole - first),
    }
    if device.type == "cuda":  # which the other wants
        seconds(model, continuous, new)
        found["continuous_batching"] = len(prompts) * new / seconds(model, continuous, new)
    del model
    gc.collect()
    return found


def _rules(new: int, temperature: float) -> Any:
    from transformers import GenerationConfig

    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    return GenerationConfig(max_new_tokens=new, min_new_tokens=None, eos_token_id=None, pad_token_id=0, **sampling)
