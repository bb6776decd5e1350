"""Samples as people read them: token texts with their mask."""

from torchft.data.samples import Sample
from torchft.losses.likelihood import IGNORE
from torchft.tokenizers.tokenizer import Tokenizer


def masked_tokens(sample: Sample, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """(text, is it trained on) of each token."""
    trained = [False, *(label != IGNORE for label in sample.labels[:-1])]  # labels are those of the next token
    return [(tokenizer.decode([token]), is_trained) for token, is_trained in zip(sample.tokens, trained)]
