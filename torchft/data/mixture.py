"""Several data sets as one: concatenated, or mixed by weights, in stages.

Without weights an epoch has every sample once. With weights it has each part's share and ends where the first part is
used up; of the others it takes the next samples in the next epoch, so that none comes twice before all have come once.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import torch

from torchft.data.builder import Dataset
from torchft.data.samples import Part, Samples
from torchft.errors import UserError


def mix(datasets: Sequence[Dataset]) -> Samples:
    """All samples of ``datasets``, tokenised, each data set a part."""
    check_weights(datasets)
    made = [dataset.samples() for dataset in datasets]
    if len(made) == 1:
        made[0].parts = [replace(part_of(datasets[0], 0, len(made[0])), weight=None)]
        return made[0]
    joined = Samples(seq_len=made[0].seq_len, pad_id=made[0].pad_id)
    for dataset, samples in zip(datasets, made):
        joined.extend(samples, part_of(dataset, len(joined), len(joined) + len(samples)))
    return joined


def check_weights(datasets: Sequence[Dataset]) -> None:
    """UserError for weights that say no share."""
    problems = []
    for stage, members in by_stage(datasets):
        weights = [dataset.reading.weight for dataset in members]
        if None in weights and any(weight is not None for weight in weights):
            unweighted = ", ".join(d.name for d in members if d.reading.weight is None)
            problems.append(f"weight: give every data set of stage {stage} one, or none; {unweighted} has none")
        problems += [
            f"weight: {weight} of {dataset.name} must be above 0; leave the data set out instead"
            for dataset, weight in zip(members, weights)
            if weight is not None and not weight > 0
        ]
    if problems:
        raise UserError(*(f"datasets.{problem}" for problem in problems))


def by_stage(datasets: Sequence[Dataset]) -> Iterator[tuple[int, list[Dataset]]]:
    """Lower stages first; within one in the order of the config."""
    ordered = sorted(datasets, key=lambda dataset: dataset.reading.stage)
    return ((stage, list(members)) for stage, members in groupby(ordered, key=lambda dataset: dataset.reading.stage))


def epoch_samples(parts: Sequence[Part], *, epoch: int, seed: int) -> list[list[int]]:
    """The samples that an epoch has, stage by stage; in no order that means anything."""
    ordered = sorted(parts, key=lambda part: part.stage)
    stages = [list(members) for _, members in groupby(ordered, key=lambda part: part.stage)]
    return [[i for part, n in _shares(stage) for i in _taken(part, n, epoch=epoch, seed=seed)] for stage in stages]


def _shares(stage: list[Part]) -> Iterator[tuple[Part, int]]:
    """(part, samples of it in an epoch)."""
    sizes = [part.stop - part.start for part in stage]
    per_weight = min((n / part.weight for part, n in zip(stage, sizes) if part.weight and n), default=0.0)
    for part, size in zip(stage, sizes):
        yield part, size if part.weight is None else min(size, max(1, round(per_weight * part.weight)))


def _taken(part: Part, n: int, *, epoch: int, seed: int) -> Iterator[int]:
    """Samples [epoch * n, (epoch + 1) * n) of the part's endless order, which is one shuffle after another."""
    size = part.stop - part.start
    if n == size:
        yield from range(part.start, part.stop)
        return
    for cycle in range(epoch * n // size, ((epoch + 1) * n - 1) // size + 1):
        order = torch.randperm(size, generator=generator_of(seed, "mix", part.name, cycle))
        first, last = epoch * n - cycle * size, (epoch + 1) * n - cycle * size
        yield from (order[max(first, 0) : min(last, size)] + part.start).tolist()


def generator_of(*key: int | str) -> torch.Generator:
    """Random numbers that depend on ``key`` alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def part_of(dataset: Dataset, start: int, stop: int) -> Part:
    """The samples [start, stop) as those of ``dataset``."""
    read = dataset.reading
    return Part(name=dataset.name, start=start, stop=stop, weight=read.weight, stage=read.stage)
