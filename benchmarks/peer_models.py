"""Llama shapes with random weights as other libraries build them, each set up as its own training recipe would.

A builder returns the model and a micro-step: tokens [b, s] int64 to their mean loss, every token trained on.
"""

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

# By transformers' names: Llama 3.1 8B, Llama 3.2 3B and 1B, and one for CPU tests.
SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8},
}
NUM_KV_HEADS = 8
VOCAB = 128256
SPECIAL = {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|finetune_right_pad_id|>": 128004}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16

MicroStep = Callable[[Tensor], Tensor]


def hf_config(shape: str):
    """transformers' config of a shape."""
    from transformers import LlamaConfig

    sizes = SHAPES[shape]
    bos, eos, pad = SPECIAL.values()
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    rope |= {"factor": 8.0 if shape == "8b" else 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return LlamaConfig(
        **sizes,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=sizes["hidden_size"] // sizes["num_attention_heads"],
        vocab_size=VOCAB,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters=rope,
        tie_word_embeddings=shape != "8b",
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )


def byte_tokenizer(vocab_size: int, special: dict[str, int], *, eos: str, pad: str, bos: str | None = None):
    """transformers' tokenizer of as many words as a model has: bytes, words without use, and ``special``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    names += [f"<unused{i}>" for i in range(len(names), vocab_size)]
    for name, index in special.items():
        names[index] = name
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


def saved_checkpoint(shape: str, folder: Path, device: torch.device) -> str:
    """Random weights and a byte tokenizer on disk, for peers that only load; kept for the next call."""
    from transformers import AutoModelForCausalLM

    path = folder / shape
    complete = path / "complete"
    if not complete.exists():
        with device:
            model = AutoModelForCausalLM.from_config(hf_config(shape), dtype=torch.bfloat16)
        model.save_pretrained(path)
        bos, eos, pad = SPECIAL
        byte_tokenizer(VOCAB, SPECIAL, bos=bos, eos=eos, pad=pad).save_pretrained(path)
        complete.touch()
        del model
        torch.cuda.empty_cache()
    return str(path)


def hf_loss(model: nn.Module, device: torch.device) -> MicroStep:
    """transformers shifts the labels itself; autocast as its Trainer does with bf16=True."""

    def micro_step(tokens: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    return micro_step


def build_hf(given: argparse.Namespace, device: torch.device) -> tuple[nn.Module, MicroStep]:
    """transformers with PEFT; with Liger's kernels as hf_liger."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if given.peer == "hf_liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    if given.work == "qlora":
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        path = saved_checkpoint(given.shape, given.checkpoint_dir, device)
        model = AutoModelForCausalLM.from_pretrained(
            path, quantization_config=nf4, dtype=torch.bfloat16, attn_implementation="sdpa", device_map={"": 0}
        )
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    else:
        with device:
            model = AutoModelForCausalLM.from_config(
                hf_config(given.shape), dtype=torch.bfloat16, attn_implementation="sdpa"
            )
    if given.work != "full":
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    if given.recompute == "full":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        layers = model.get_decoder().layers if given.work == "full" else model.get_base_model().get_decoder().layers
        for layer in layers[len(layers) - given.keep_layers :]:
            layer.gradient_checkpointing = False
        if given.work != "full":
            model.enable_input_require_grads()
    return model, hf_loss(model, device)


def build_unsloth(given: argparse.Namespace, device: torch.device) -> tuple[nn.Module, MicroStep]:
    """Unsloth; its recompute with block inputs in host memory is --recompute offload."""
    from unsloth import FastLanguageModel

    recompute = {"none": False, "full": True, "offload": "unsloth"}[given.recompute]
    base = (
        {"load_in_fp8": True, "load_in_4bit": False}
        if given.work == "fp8-lora"
        else {"load_in_4bit": given.work == "qlora"}
    )
    model, _ = FastLanguageModel.from_pretrained(
        saved_checkpoint(given.shape, given.checkpoint_dir, device),
        max_seq_length=given.seq_len,
        dtype=torch.bfloat16,
        full_finetuning=given.work == "full",
        use_gradient_checkpointing=recompute,
        **base,
    )
    if given.work != "full":
        model = FastLanguageModel.get_peft_model(
            model,
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=PROJECTIONS,
            use_gradient_checkpointing=recompute,
            **({"checkpoint_skip_layers": given.keep_layers} if given.keep_layers else {}),
        )
    return model, hf_loss(model, device)


def build_torchtune(given: argparse.Namespace, device: torch.device) -> tuple[nn.Module, MicroStep]:
    """torchtune's last release, compiled, as its single-device recipes set it up."""
    import torchao.quantization

    for name in ("int4_weight_only", "int8_dynamic_activation_int4_weight"):
        if not hasattr(torchao.quantization, name):  # torchtune 0.6.1 imports both, which torchao has dropped since
            setattr(torchao.quantization, name, None)  # training has no use for them
    from torchtune import training
    from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params

    shape = SHAPES[given.shape]
    sizes = {
        "vocab_size": VOCAB,
        "num_layers": shape["num_hidden_layers"],
        "num_heads": shape["num_attention_heads"],
        "num_kv_heads": NUM_KV_HEADS,
        "embed_dim": shape["hidden_size"],
        "max_seq_len": 131072,
        "intermediate_dim": shape["intermediate_size"],
        "scale_factor": 8 if given.shape == "8b" else 32,
        "tie_word_embeddings": given.shape != "8b",
    }
    with training.set_default_dtype(torch.bfloat16), device:
        if given.work == "full":
            model = llama3_2(**sizes)
        else:
            model = lora_llama3_2(
                ["q_proj", "k_proj", "v_proj", "output_proj"],
                apply_lora_to_mlp=True,
                lora_rank=RANK,
                lora_alpha=2 * RANK,
                quantize_base=given.work == "qlora",
                **sizes,
            )
            set_trainable_params(model, get_adapter_params(model))
    nn.init.normal_(model.tok_embeddings.weight, std=0.02)  # torch's own 1.0 makes losses of hundreds with tied weights
    training.compile_model(model, verbose=False)
    if given.recompute != "none":
        recomputed = list(model.layers)[: len(model.layers) - given.keep_layers]
        training.set_activation_checkpointing(model, lambda module, recurse, **_: recurse or module in recomputed)
    offload = contextlib.nullcontext()
    if given.recompute == "offload":
        offload = training.get_act_offloading_ctx_manager(model, True)
    loss = training.compile_loss(CEWithChunkedOutputLoss(), verbose=False)
    model.set_num_output_chunks(loss.num_output_chunks)

    def micro_step(tokens: Tensor) -> Tensor:
        labels = nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
        with offload:
            logits = model(tokens)
        return loss(logits, labels)

    return model, micro_step


BUILDERS = {"hf": build_hf, "hf_liger": build_hf, "torchtune": build_torchtune, "unsloth": build_unsloth}
