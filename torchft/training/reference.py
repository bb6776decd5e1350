"""The frozen model that preference training compares with: log-probabilities of answers, computed or looked up."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from torchft.adapters.lora import adapters_off
from torchft.data.batch import Batch
from torchft.data.loader import Loader
from torchft.data.mismatched import as_batch, mismatched
from torchft.data.samples import Samples
from torchft.files import cache_folder, keep_in_cache
from torchft.losses.answers import answer_logps
from torchft.modules.decoder import Decoder
from torchft.ranks import from_main, is_main
from torchft.training.distributed import World

log = logging.getLogger(__name__)


class Reference:
    """Gives log p of each answer of a batch, [samples, 1 or 2] fp32 in nats, without gradient.

    Args:
        model: whose adapters are switched off. None: there is no reference, every value is 0.
        ld_alpha: as in `answer_logps`.
        table: what `precompute` gave, to look values up by the samples' numbers instead.
    """

    def __init__(self, model: Decoder | None, *, ld_alpha: float | None = None, table: Tensor | None = None) -> None:
        self.model, self.ld_alpha, self.table = model, ld_alpha, table

    @torch.no_grad()
    def logps(self, batch: Batch) -> Tensor:
        if self.table is not None:
            return self.table[list(batch.samples)].to(batch.tokens.device)
        if self.model is None:
            return torch.zeros(batch.documents_of.shape, device=batch.tokens.device)
        head = partial(answer_logps, **batch.answers, shards=batch.shards, ld_alpha=self.ld_alpha)
        with adapters_off(self.model):
            return self.model(batch.tokens, batch.positions, documents=batch.documents, head=head)

    def precompute(self, loader: Loader, world: World, *, key: Mapping[str, Any]) -> "Reference":
        """One that looks all samples of ``loader`` up, which are computed now, or were by an earlier run.

        They are kept in the user's cache folder. ``key``: JSON values that decide them besides: which weights, in which
        arithmetic. All ranks call it.
        """
        samples = loader.samples

        def compute() -> Tensor:
            table = torch.zeros(len(samples), 1 + samples.are_pairs, device=world.device)
            for batch in loader:
                table[list(batch.samples)] = self.logps(batch.to(world.device))
            return world.sum(table) / world.tokens.count  # ranks that share rows all have their values

        table = kept_tensor({**key, "samples": samples.fingerprint(), "ld_alpha": self.ld_alpha}, compute)
        return Reference(None, table=table)


@torch.no_grad()
def kl_estimate(
    model: Decoder, reference: Reference, window: Sequence[Batch], *, samples: Samples, packed: bool, world: World
) -> Tensor:
    """KTO's estimate of KL(model || reference), nats, at least 0: the mean log-ratio of mismatched answers.

    Over ``window``, batches of ``samples`` of all ranks, so that it does not depend on how they are divided. All ranks
    call it.
    """
    total = torch.zeros((), device=world.device)
    for batch in window:
        chosen = mismatched(samples, batch.samples or (0,))
        others = as_batch(chosen, packed=packed, shards=world.tokens).to(world.device)
        head = partial(answer_logps, **others.answers, shards=others.shards)
        policy = model(others.tokens, others.positions, documents=others.documents, head=head)
        total += (policy - reference.logps(others)).sum() * bool(batch.samples)  # a rank without any keeps step
    return (world.sum(total) / sum(batch.all_samples for batch in window)).clamp(min=0)


def kept_tensor(key: Mapping[str, Any], compute: Callable[[], Tensor]) -> Tensor:
    """What ``compute`` gives, or what an earlier run kept of it in the user's cache folder; on the CPU.

    ``key``: JSON values that decide it; torch's version and the text of this package are added. All ranks call it, and
    so they call ``compute``.
    """
    text = json.dumps([dict(key), _version()], sort_keys=True)
    file = cache_folder() / "references" / hashlib.sha256(text.encode()).hexdigest()
    known = from_main(partial(_read, file))
    if known is not None:
        return known
    values = compute().cpu()
    if is_main():
        data = save({"values": values.contiguous()})
        keep_in_cache(file, hashlib.sha256(data).hexdigest().encode() + data)
    return values


def _read(file: Path) -> Tensor | None:
    """What was kept; None if there is nothing, or if it is damaged."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    digest, data = content[:64], content[64:]
    if hashlib.sha256(data).hexdigest().encode() != digest:
        log.warning("%s is damaged: computing it again", file)
        return None
    return load(data)["values"]


@cache
def _version() -> str:
    texts = [file.read_bytes() for file in sorted(Path(__file__).parent.parent.rglob("*.py"))]
    return f"{version('torch')} {hashlib.sha256(b''.join(texts)).hexdigest()}"
