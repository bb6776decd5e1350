"""Steps of TRL's GRPOTrainer with transformers' generation, for benchmarks/grpo_step.py --trl."""

import argparse
import re
from typing import Any

PATTERN = "<unused7[01][0-9][0-9]>"  # 200 words of 151,936: about half of the answers of 512 random ones hold one
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def trl_steps(given: argparse.Namespace, watch: Any) -> None:
    """As its documentation sets it up, with bf16 weights, its defaults otherwise, and no checkpoints."""
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class EndOfStep(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            watch.end_step()

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(re.search(PATTERN, text) is not None) for text in completions]

    answers = given.prompts * given.group
    config = GRPOConfig(
        output_dir=str(given.folder / "trl"),
        num_generations=given.group,
        max_completion_length=given.new,
        temperature=1.0,
        beta=0.0,
        per_device_train_batch_size=given.batch_size,
        gradient_accumulation_steps=answers // given.batch_size,
        max_steps=1 + given.steps,
        learning_rate=1e-6,
        optim="adamw_torch_fused",
        bf16=given.device.type == "cuda",
        use_cpu=given.device.type == "cpu",
        gradient_checkpointing=given.trl_checkpointing,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        shuffle_dataset=False,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(given.checkpoint_dir, dtype=torch.bfloat16),
        reward_funcs=reward,
        args=config,
        train_dataset=load_dataset("json", data_files=str(given.prompts_file), split="train"),
        processing_class=AutoTokenizer.from_pretrained(given.checkpoint_dir, padding_side="left"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS, task_type="CAUSAL_LM"),
    )
    watch.around(GRPOTrainer, "_generate_and_score_completions", "rollout")
    watch.around(GRPOTrainer, "_calculate_rewards", "reward")
    trainer.add_callback(EndOfStep())
    trainer.train()
    for row in trainer.state.log_history[: 1 + given.steps]:
        assert row["completions/mean_length"] > 0.98 * given.new, "answers ended early"
