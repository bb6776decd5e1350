"""Speed of generation with random weights; prints one JSON line.

    python benchmarks/generate.py llama3/Llama-3.1-8B --batch-size 1 --new 256 --compile
    python benchmarks/generate.py llama3/Llama-3.1-8B --batch-size 1 --new 256
    python benchmarks/generate.py llama3/Llama-3.1-8B --batch-size 256 --compile
    python benchmarks/generate.py qwen2/Qwen2.5-1.5B --batch-size 256 --compile --peers      # and transformers, twice
    python benchmarks/generate.py llama3/Llama-3.1-8B --batch-size 64 --new 64 --compile --peers
    python benchmarks/generate.py qwen2/Qwen2.5-1.5B --batch-size 256 --compile --profile 20  # where a step's time goes

Decoding is measured apart from prefill: a run of ``--new`` tokens less one of a single token. ``roofline``: the time in
which the GPU could read the weights and the cache once, over that of a step. Prompts differ, or are one per ``--group``
of answers, as in GRPO, and then prefilled once. ``--peers``: transformers' generate and its continuous batching answer
the same prompts with as many tokens, on random weights of the same shape, after the engine has given its memory back.
"""

import argparse
import gc
import json
import time

import peer_generation
import torch

from torchft import models
from torchft.generation.engine import Engine
from torchft.generation.requests import Request
from torchft.generation.sampling import Sampling
from torchft.modules.decoder import init_weights
from torchft.training.environment import device_name, pick_device
from torchft.training.metrics import peak_memory_gib

BANDWIDTH = {"H100": 3.35e12, "H200": 4.8e12, "A100": 2.0e12}  # bytes/s of the device's memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a released size, such as llama3/Llama-3.1-8B")
    parser.add_argument("--batch-size", type=int, default=64, help="sequences decoded together")
    parser.add_argument("--requests", type=int, help="in all; None: one per slot")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--group", type=int, default=1, help="answers of one prompt")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--compile", action="store_true", help="a block's step of one token")
    parser.add_argument("--peers", action="store_true", help="transformers, on the same prompts")
    parser.add_argument("--profile", type=int, default=0, help="print so many of a step's kernels, the longest first")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()

    if given.device == "auto" and pick_device("auto").type == "cpu":  # whose memory such a model fills
        parser.error("there is no GPU here; --device cpu measures this host")
    device = pick_device(given.device)
    model = models.build(given.model).to(torch.bfloat16).to_empty(device=device).eval()
    init_weights(model)
    engine = Engine(
        model,
        num_slots=given.batch_size,
        max_len=given.prompt + given.new,
        stop_ids=(),
        compile="inductor" if given.compile else None,
    )
    number = given.requests or given.batch_size
    began = time.perf_counter()
    run(engine, given, number, new=given.new)  # compiles, captures graphs, makes the cache
    start = time.perf_counter() - began
    run(engine, given, number, new=1)  # captures small prefills, which happens at the second of a shape
    first = run(engine, given, number, new=1)
    seconds = run(engine, given, number, new=given.new)
    decoding = (seconds - first) / (given.new - 1) / (number / given.batch_size)  # of one step

    weights = sum(p.nbytes for name, p in model.named_parameters() if model.lm_head is None or "embed" not in name)
    config = model.config
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2  # bytes of the cache
    read = weights + given.batch_size * (given.prompt + given.new / 2) * per_token
    bandwidth = next((b for name, b in BANDWIDTH.items() if name in device_name(device)), None)
    result = vars(given) | {
        "tokens_per_second": round(number * given.new / seconds),
        "decode_tokens_per_second": round(given.batch_size / decoding),
        "prefill_tokens_per_second": round(number * given.prompt / given.group / first),
        "step_ms": round(1e3 * decoding, 2),
        "roofline": None if bandwidth is None else round(read / bandwidth / decoding, 3),
        "first_run_s": round(start, 1),
        "peak_memory_gib": round(peak_memory_gib(device), 2),
        "device": device_name(device),
        "torch": torch.__version__,
    }
    if given.profile:
        profile(engine, given)
    if given.peers:
        asked, json_of = prompts_of(given, config.vocab_size, number), model.hub_format.config_json
        del engine, model
        gc.collect()
        how = {"new": given.new, "temperature": given.temperature, "device": device}
        for name, speed in peer_generation.tokens_per_second(json_of, asked, **how).items():
            result |= {f"transformers_{name}": round(speed)}
            ours = result["decode_tokens_per_second" if name.endswith("decode") else "tokens_per_second"]
            result |= {f"times_{name}": round(ours / speed, 1)}
    print(json.dumps(result, default=str))


def prompts_of(given: argparse.Namespace, vocab_size: int, number: int) -> list[list[int]]:
    """Of each of ``number`` requests."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(5, vocab_size - 5, (number // given.group, given.prompt), generator=generator).tolist()
    return [rows[i // given.group] for i in range(number)]


def run(engine: Engine, given: argparse.Namespace, number: int, *, new: int) -> float:
    """Seconds of ``number`` requests for ``new`` tokens each."""
    sampling = Sampling(temperature=given.temperature, max_new_tokens=new)
    prompts = prompts_of(given, engine.model.config.vocab_size, number)
    requests = [Request(prompt=prompt, sampling=sampling, seed=i) for i, prompt in enumerate(prompts)]
    began = time.perf_counter()
    completions = engine.complete(requests)
    seconds = time.perf_counter() - began
    assert all(len(c.tokens) == new for c in completions)
    return seconds


def profile(engine: Engine, given: argparse.Namespace) -> None:
    """Where the time of steps goes, by kernel; with prefills of one token's answers beside them, so look at shares."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    with torch.profiler.profile(activities=kinds) as found:
        run(engine, given, given.batch_size, new=min(given.new, 16))
    key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=key, row_limit=given.profile, max_name_column_width=80))


if __name__ == "__main__":
    main()
