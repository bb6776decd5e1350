"""What benchmarks/compare.py runs: the rows of its table, each with our settings and the peers' best ones."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Run:
    """One timed process. ``cost_s``: what it takes on an H200, start included; ``rank``: 0 runs first, 2 last."""

    who: str  # torchft or one of benchmarks/peers.py
    arguments: str
    cost_s: int
    rank: int = 0

    @property
    def command(self) -> str:
        script = "train_step.py" if self.who == "torchft" else f"peers.py {self.who}"
        return f"benchmarks/{script} {self.arguments}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. Of each side the best run within ``limit_gib`` of peak memory counts."""

    work: str
    goal: str
    runs: tuple[Run, ...]
    limit_gib: float | None = None
    measure: str = "tokens_per_second"  # or a field in seconds, where less is better


def ours(arguments: str, *, cost_s: int = 40, rank: int = 0, model: str = "llama3/Llama-3.1-8B") -> Run:
    return Run(who="torchft", arguments=f"{model} {arguments}", cost_s=cost_s, rank=rank)


def peer(who: str, arguments: str, *, cost_s: int, rank: int = 0) -> Run:
    return Run(who=who, arguments=arguments, cost_s=cost_s, rank=rank)


# Where memory is limited, peers get two ways to stay within it: recompute with all rows at once, and small
# micro-batches, accumulated, that recompute only what does not fit.
LORA = (
    peer("torchtune", "lora --batch-size 8 --recompute none", cost_s=45),
    peer("unsloth", "lora --batch-size 8 --recompute none", cost_s=110),  # the first one writes the checkpoint: 40 s
    peer("hf_liger", "lora --batch-size 8 --recompute none", cost_s=40, rank=2),
)
LORA_IN_24_GIB = (
    peer("unsloth", "lora --batch-size 1 --accumulate 8 --recompute none", cost_s=60),
    peer("torchtune", "lora --batch-size 1 --accumulate 8 --recompute full --keep-layers 18", cost_s=45, rank=1),
    peer("unsloth", "lora --batch-size 1 --accumulate 8 --recompute full --keep-layers 26", cost_s=60, rank=1),
    peer("torchtune", "lora --batch-size 8 --recompute full", cost_s=40, rank=1),
    peer("unsloth", "lora --batch-size 8 --recompute full", cost_s=60, rank=2),
)

ROWS = (
    Row(
        work="LoRA bf16, 8 x 2048",
        goal="≥ 18,500",
        runs=(ours("--method lora --batch-size 8 --recompute 1.0", cost_s=30), *LORA),
    ),
    Row(
        work="LoRA bf16, 16,384 tokens",
        limit_gib=24,
        goal="≥ 13,500",
        runs=(
            ours("--method lora --batch-size 1 --accumulate 8 --recompute none", cost_s=35),
            *LORA_IN_24_GIB,
        ),
    ),
    Row(
        work="LoRA fp8 base, 8 x 2048",
        goal="≥ 25,000",
        runs=(
            ours("--method fp8-lora --batch-size 8 --recompute 1.0"),
            *LORA,
            peer("unsloth", "fp8-lora --batch-size 8 --recompute none", cost_s=90, rank=2),
        ),
    ),
    Row(
        work="LoRA fp8 base, 16,384 tokens",
        limit_gib=24,
        goal="≥ 18,000",
        runs=(
            ours("--method fp8-lora --batch-size 1 --accumulate 8 --recompute none"),
            ours("--method fp8-lora --batch-size 2 --accumulate 4 --recompute none", rank=1),
            *LORA_IN_24_GIB,
        ),
    ),
    Row(
        work="QLoRA, 16,384 tokens",
        limit_gib=13.5,
        goal="≥ 13,000",
        runs=(
            ours("--method qlora --batch-size 1 --accumulate 8 --recompute none"),
            peer("unsloth", "qlora --batch-size 1 --accumulate 8 --recompute full --keep-layers 26", cost_s=60),
            peer("unsloth", "qlora --batch-size 8 --recompute offload", cost_s=60, rank=1),
            peer("torchtune", "qlora --batch-size 4 --accumulate 2 --recompute full", cost_s=50, rank=1),
            peer("unsloth", "qlora --batch-size 8 --recompute full", cost_s=60, rank=2),
        ),
    ),
    Row(
        work="LoRA bf16, 1 x 32,768",
        limit_gib=31,
        goal="≥ 8,500",
        runs=(
            ours("--method lora --seq-len 32768 --batch-size 1 --recompute 0.4 --offload 0.85 --steps 3", cost_s=75),
            peer("unsloth", "lora --seq-len 32768 --batch-size 1 --recompute full --warm 1 --steps 3", cost_s=80),
            peer(
                "torchtune",
                "lora --seq-len 32768 --batch-size 1 --recompute offload --warm 1 --steps 3",
                cost_s=70,
                rank=1,
            ),
            peer(
                "unsloth",
                "lora --seq-len 32768 --batch-size 1 --recompute offload --warm 1 --steps 3",
                cost_s=80,
                rank=2,
            ),
        ),
    ),
    Row(
        work="full bf16 AdamW, 4 x 2048",
        limit_gib=60,
        goal="≥ 12,000",
        runs=(
            ours("--method full --batch-size 4 --recompute 0.4 --offload 0.3 --no-clip --in-backward", cost_s=45),
            ours("--method full --batch-size 4 --recompute 0.2 --no-clip --in-backward", rank=1),
            peer("hf_liger", "full --batch-size 4 --recompute full", cost_s=40),
            peer("torchtune", "full --batch-size 4 --recompute full", cost_s=45, rank=1),
            peer("unsloth", "full --batch-size 4 --recompute full", cost_s=60, rank=2),
        ),
    ),
    Row(
        work="full, Llama 3.2 1B, 8 x 2048",
        goal="≥ 85,000",
        runs=(
            ours("--method full --batch-size 8 --recompute 1.0", cost_s=30, model="llama3/Llama-3.2-1B"),
            peer("torchtune", "full --shape 1b --batch-size 8 --recompute none", cost_s=40),
            peer("hf_liger", "full --shape 1b --batch-size 8 --recompute none", cost_s=30, rank=1),
        ),
    ),
    Row(
        work="LoRA bf16, 8 x 2048, second start: seconds to the end of step 1",
        goal="≤ 10 s",
        measure="start_to_first_step_s",
        runs=(  # the settings of the first row, whose run has filled the compile caches
            ours("--method lora --batch-size 8 --recompute 1.0 --steps 5", cost_s=25, rank=1),
            peer("torchtune", "lora --batch-size 8 --recompute none --warm 1 --steps 1", cost_s=30, rank=1),
            peer("unsloth", "lora --batch-size 8 --recompute none --warm 1 --steps 1", cost_s=50, rank=1),
        ),
    ),
    Row(
        work="LoRA bf16, instruction lengths packed into 8 x 2048: real tokens",
        goal="≥ 90% of full rows",
        runs=(ours("--method lora --batch-size 8 --recompute 1.0 --lengths instruct"),),
    ),
)
