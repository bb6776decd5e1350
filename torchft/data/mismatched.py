"""Prompts with the answer of another sample, by which KTO estimates how far the policy is from its reference."""

from collections.abc import Sequence

from torchft.data.batch import Batch
from torchft.data.loader import Loader
from torchft.data.samples import Sample, Samples
from torchft.losses.likelihood import IGNORE
from torchft.token_shards import TokenShards


def mismatched(samples: Samples, indices: Sequence[int]) -> Samples:
    """The prompt of each sample of ``indices`` with the answer of the next one in the data, at most seq_len tokens.

    Which these are depends on the data alone, not on how batches are made.
    """
    found = Samples(seq_len=samples.seq_len, pad_id=samples.pad_id)
    for i in indices:
        own, other = samples[i], samples[(i + 1) % len(samples)]
        prompt = own.tokens[: _answer_start(own)]
        answer = other.tokens[_answer_start(other) :]
        kept = max(1, min(len(prompt), samples.seq_len - 1))
        tokens = [*prompt[:kept], *answer][: samples.seq_len]
        labels = [IGNORE] * (kept - 1) + other.labels[_answer_start(other) - 1 :]
        labels = [*labels[: len(tokens) - 1], IGNORE]
        found.append(Sample(tokens=tokens, labels=labels), origin=samples.where(i), number=0)
    return found


def as_batch(samples: Samples, *, packed: bool, shards: TokenShards) -> Batch:
    """All of ``samples`` as one batch, of which these tokens are this rank's."""
    (batch,) = Loader(samples, batch_size=len(samples), seed=0, shuffle=False, packed=packed, shards=shards)
    return batch


def _answer_start(sample: Sample) -> int:
    """Where the first trained token stands."""
    return next(i for i, label in enumerate(sample.labels) if label != IGNORE) + 1
