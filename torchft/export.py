"""What training leaves: a Hub folder of the model, and of its adapters alone."""

from functools import partial
from pathlib import Path

import torch

from torchft import hub
from torchft.adapters.lora import merged_tensor
from torchft.adapters.peft import save_peft
from torchft.modules.decoder import Decoder
from torchft.ranks import new_folder
from torchft.tokenizers.export import save_tokenizer
from torchft.tokenizers.tokenizer import Tokenizer


def save_trained(
    model: Decoder,
    folder: Path,
    *,
    checkpoint_dir: Path,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    whole: bool = True,
    adapter: bool = False,
) -> Path:
    """A Hub folder with adapters merged in (``whole``), in ``dtype``; in its ``adapter/`` the adapters alone, for PEFT.

    ``checkpoint_dir``: where the model came from, whose side files go along. All ranks call it.
    """
    with new_folder(folder) as new:
        if whole:
            hub.save(model, new, dtype=dtype, read=partial(merged_tensor, model, dtype=dtype))  # merged in fp32
            hub.save_side_files(checkpoint_dir, new, stop_ids=tokenizer.stop_ids)
            save_tokenizer(tokenizer, new)
        if adapter:
            base, names = str(checkpoint_dir.resolve()), hub.hub_format(model).names
            save_peft(
                model, new / "adapter", hub_name=names.peft_name, base_model_name_or_path=base, fused=names.fused,
                swaps=names.peft_swaps,
            )  # fmt: skip
            save_tokenizer(tokenizer, new / "adapter")
    return folder
