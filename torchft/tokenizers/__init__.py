"""``load(checkpoint_dir)``: a checkpoint's tokenizer, with its chat format."""

from torchft.tokenizers.folder import load

__all__ = ["load"]
