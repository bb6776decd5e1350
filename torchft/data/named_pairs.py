"""Well-known data sets of preferred answers by name, as named.py has those of conversations.

dataset: {_component_: torchft.data.named_pairs.ultrafeedback, split: "train_prefs[:95%]"}
"""

from collections.abc import Callable
from typing import Any

from torchft.data import judged
from torchft.data.builder import Dataset, builder
from torchft.data.encoders import Encoder
from torchft.data.messages import Values, text
from torchft.data.named import transcript
from torchft.data.samples import Encoded
from torchft.tokenizers.tokenizer import Tokenizer


def named(**defaults: Any) -> Callable[[Callable[[Values], Values]], Callable[..., Dataset]]:
    """A data set of pairs whose rows the decorated function turns into prompt, chosen and rejected."""

    def decorate(pair_of: Callable[[Values], Values]) -> Callable[..., Dataset]:
        def make(tokenizer: Tokenizer, example: Values) -> Encoder:
            def encode(row: Values) -> Encoded:
                return judged.pair(pair_of(row), tokenizer=tokenizer, margin_column=None)

            return encode

        for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(make, attribute, getattr(pair_of, attribute))
        built: Callable[..., Dataset] = builder(make, whole=True, too_long="drop", **defaults)
        return built

    return decorate


@named(source="Anthropic/hh-rlhf")
def hh_rlhf(row: Values) -> Values:
    """{"chosen", "rejected"}: dialogues as one text each, which differ in the last answer."""
    return {side: transcript(text(row, side)) for side in ("chosen", "rejected")}


@named(source="HuggingFaceH4/ultrafeedback_binarized", split="train_prefs")
def ultrafeedback(row: Values) -> Values:
    """{"prompt", "chosen": [messages], "rejected": [messages], "score_chosen", "score_rejected"}."""
    return {side: row.get(side) for side in ("chosen", "rejected")}


@named(source="lvwerra/stack-exchange-paired", subset="data/rl")
def stack_exchange(row: Values) -> Values:
    """{"question", "response_j" (the better one), "response_k"}."""
    return {"prompt": text(row, "question"), "chosen": text(row, "response_j"), "rejected": text(row, "response_k")}
