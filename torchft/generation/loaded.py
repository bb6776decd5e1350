"""A checkpoint and its tokenizer, ready to generate."""

from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from torchft import hub, models, tokenizers
from torchft.adapters.fp8 import FP8Config, apply_fp8
from torchft.adapters.fused import fuse_lora
from torchft.adapters.lora import apply_lora
from torchft.adapters.nf4 import NF4Config, apply_nf4
from torchft.adapters.peft import load_peft, peft_config
from torchft.adapters.qat import round_inputs
from torchft.adapters.tensor_parallel import split_blocks
from torchft.dequantise import TorchaoFiles, open_weights
from torchft.errors import UserError
from torchft.generation.compiled import Compile, backend_of
from torchft.generation.engine import Engine
from torchft.generation.prefill import Prompt, compiled_passes
from torchft.generation.requests import Request
from torchft.generation.sampling import Sampling
from torchft.hub_names import pieces
from torchft.modules.decoder import Decoder
from torchft.token_shards import WHOLE_ROWS, TokenShards
from torchft.tokenizers.tokenizer import Tokenizer


def load(
    checkpoint_dir: Path,
    *,
    adapter: Path | None = None,
    chat_format: str | None = None,
    nf4: NF4Config | None = None,
    fp8: FP8Config | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device,
    tp_mesh: DeviceMesh | None = None,
    tokens: TokenShards = WHOLE_ROWS,
) -> tuple[Decoder, Tokenizer]:
    """The model of a Hub folder in eval mode, with the adapter of a PEFT folder if one is named, and its tokenizer.

    ``nf4``, ``fp8``: the weights are kept in that format. Of a quantised folder the model has the values of its weights
    in ``dtype``, and rounds its inputs where the folder is for that. ``tp_mesh``, ``tokens``: of ranks that split the
    blocks (tensor parallel), which then must be asked the same.
    """
    model = models.build(models.config_json(checkpoint_dir)).to(dtype)
    if nf4:
        apply_nf4(model, nf4)
    if fp8:
        apply_fp8(model, fp8, device=device)
    names = hub.hub_format(model).names
    if adapter is not None:
        apply_lora(model, peft_config(model, adapter, hub_name=names.peft_name, fused=names.fused))
        fuse_lora(model)
    if tp_mesh is not None:
        split_blocks(model, tp_mesh, tokens)
    model.to_empty(device=device)
    hub.load_weights(model, checkpoint_dir)
    if inputs := _rounded_inputs(model, checkpoint_dir):
        if nf4 or fp8 or adapter or tokens.tp > 1:
            raise UserError(
                f"{checkpoint_dir} is quantised with its inputs: it takes no adapter, nf4, fp8 or parallel.tp; use the "
                "checkpoint that it was made of"
            )
        round_inputs(model, inputs)
    if adapter is not None:
        load_peft(model, adapter, hub_name=names.peft_name, fused=names.fused, swaps=names.peft_swaps)
    return model.eval(), tokenizers.load(checkpoint_dir, chat_format=chat_format)


def context_of(checkpoint_dir: Path) -> int:
    """Tokens that the model of a Hub folder was made for. UserError for a folder that is none; no weights are read."""
    return models.build(models.config_json(checkpoint_dir)).config.max_seq_len


def engine(model: Decoder, tokenizer: Tokenizer, *, num_slots: int, max_len: int, compile: Compile = False) -> Engine:
    """An engine that speaks ``tokenizer``'s language: its stop tokens, its ids, its text."""
    return Engine(
        model,
        num_slots=num_slots,
        max_len=max_len,
        stop_ids=tokenizer.stop_ids,
        vocab_size=min(tokenizer.vocab_size, model.config.vocab_size),
        decode=tokenizer.decode,
        compile=backend_of(compile, model.embed_tokens.weight.device),
    )


def warm_up(engine: Engine) -> None:
    """Compile what requests would wait for: a step, and prefills of as many prompts as there are slots."""
    shapes: list[list[Prompt]] = [[(0,)], *compiled_passes(num_slots=engine.num_slots, max_len=engine.max_len)]
    for prompts in shapes:
        engine.complete([Request(prompt=prompt, sampling=Sampling(max_new_tokens=2)) for prompt in prompts])


def _rounded_inputs(model: Decoder, folder: Path) -> dict[str, str]:
    """The linear layers whose inputs are rounded too in a quantised folder, and to what: "int8" or "fp8"."""
    files = open_weights(folder)
    inputs = files.inputs() if isinstance(files, TorchaoFiles) else {}
    if not inputs:
        return {}
    own = pieces(hub.base_parameters(model), hub.hub_format(model).names)
    return {piece.name.removesuffix(".weight"): inputs[piece.hub] for piece in own if piece.hub in inputs}
