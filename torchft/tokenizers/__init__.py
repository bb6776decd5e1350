"""``load(checkpoint_dir)``: a checkpoint's tokenizer, with its chat format."""

from torchft.tokenizers.folder import load, token_ids

__all__ = ["load", "token_ids"]
