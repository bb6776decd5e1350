"""Makes of demo/base a model that computes the same, to the bit, with channels of unequal size, as large models have
(https://arxiv.org/abs/2211.10438): weights of one group then share a scale that fits few of them.

    python configs/demo/uneven.py out/demo_uneven

A power of two goes into each channel of a norm and each row of an up projection, and out of the columns that read it.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

BASE = Path(__file__).parent / "base"
READERS = {  # what makes channels -> what reads them
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}


def make_uneven(folder: Path) -> None:
    """Write it to ``folder``, which does not exist."""
    shutil.copytree(BASE, folder)
    file = folder / "model.safetensors"
    tensors, generator = load_file(file), torch.Generator().manual_seed(0)
    for layer in range(4):
        for made, readers in READERS.items():
            name = f"model.layers.{layer}.{made}.weight"
            weight = tensors[name]
            factor = torch.exp2((1.5 * torch.randn(len(weight), generator=generator)).round()).to(weight.dtype)
            tensors[name] = (weight.t() * factor).t().contiguous()
            for reader in readers:
                tensors[f"model.layers.{layer}.{reader}.weight"] /= factor
    save_file(tensors, file, metadata={"format": "pt"})


if __name__ == "__main__":
    make_uneven(Path(sys.argv[1]))
