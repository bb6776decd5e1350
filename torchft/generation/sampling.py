"""How tokens are drawn from logits: all on the device, nothing waits for the host.

A draw is a function of the request's seed and of how many it has made. So a request gets the same tokens whatever else
is in the batch, and a generator has no state to save.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor

from torchft.config import Range
from torchft.errors import UserError
from torchft.generation.send import send

HALVINGS = 32  # of the range of a row's logits, in the search for a threshold: below fp32's own steps


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The ``sampling:`` section of a config. Filters apply in this order, as in transformers."""

    repetition_penalty: Annotated[float, Range(above=0)] = 1.0  # of tokens that were there before; above 1: fewer
    temperature: Annotated[float, Range(min=0)] = 1.0  # divides logits; 0: always the most likely token
    top_k: Annotated[int, Range(min=1)] | None = None  # only the k most likely
    top_p: Annotated[float, Range(above=0, max=1)] = 1.0  # only the most likely that together have this probability
    min_p: Annotated[float, Range(min=0, max=1)] = 0.0  # only those with this share of the most likely one's
    max_new_tokens: Annotated[int, Range(min=1)] = 256
    stop: list[str] = field(default_factory=list)  # texts that end an answer, besides the model's own stop tokens

    @property
    def is_filtered(self) -> bool:
        return self.top_k is not None or self.top_p < 1.0 or self.min_p > 0.0


def sampling_of(settings: Mapping[str, Any]) -> Sampling:
    """From a command line or a request. UserError that lists every number out of its range."""
    notes = get_type_hints(Sampling, include_extras=True)
    problems = []
    for name, value in settings.items():
        for note in [a for part in (notes[name], *get_args(notes[name])) for a in get_args(part)]:
            if isinstance(note, Range) and value is not None and (problem := note.problem(value)):
                problems.append(f"{name}: {value} {problem}")
    if problems:
        raise UserError(*problems)
    return Sampling(**settings)


class Rules(NamedTuple):
    """`Sampling` of each row, on the device; [b] each."""

    penalty: Tensor
    temperature: Tensor
    top_k: Tensor  # the vocabulary's size: all
    top_p: Tensor
    min_p: Tensor
    seed: Tensor  # int64


def rules(samplings: list[Sampling], seeds: list[int], *, vocab_size: int, device: torch.device) -> Rules:
    def column(values: list[float]) -> Tensor:
        return send(values, dtype=torch.float32, device=device)

    return Rules(
        penalty=column([s.repetition_penalty for s in samplings]),
        temperature=column([s.temperature for s in samplings]),
        top_k=column([float(s.top_k or vocab_size) for s in samplings]),
        top_p=column([s.top_p for s in samplings]),
        min_p=column([s.min_p for s in samplings]),
        seed=send(seeds, dtype=torch.int64, device=device),
    )


def sample(
    logits: Tensor, rules: Rules, draws: Tensor, *, seen: Tensor | None, filtered: bool, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """The next token of each row and its log-probability, [b] int64 and fp32 nats, from logits [b, v].

    The log-probability is that of softmax(logits / temperature) (greedy rows: 1), as training computes it, without
    penalty and filters. NaN if the logits are.

    Args:
        draws: [b], how many tokens the request has drawn before.
        seen: [b, v] bool, which tokens the row holds; None: no row has a repetition penalty.
        filtered: whether any row has a top-k, top-p or min-p.
        vocab_size: only ids below it are drawn; an embedding may have more rows than there are tokens.
    """
    logits = logits.float()
    is_greedy = rules.temperature == 0
    temperature = torch.where(is_greedy, 1.0, rules.temperature)[:, None]
    logps = (logits / temperature).log_softmax(-1)
    allowed = logits
    if seen is not None:
        penalty = rules.penalty[:, None]
        allowed = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    best = allowed[:, :vocab_size].argmax(-1)
    if filtered:
        if vocab_size < logits.shape[1]:
            allowed = allowed.masked_fill(torch.arange(logits.shape[1], device=logits.device) >= vocab_size, -torch.inf)
        probs = _filtered(allowed / temperature, rules).softmax(-1)
    else:
        probs = (logps if seen is None else (allowed / temperature).log_softmax(-1)).exp()
    token = torch.where(is_greedy, best, _drawn(probs[:, :vocab_size], uniform(rules.seed, draws)[:, None]))
    return token, logps.gather(1, token[:, None]).squeeze(1)


def _drawn(probs: Tensor, at: Tensor) -> Tensor:
    """[b]: where the sums of weights ``probs`` [b, v] along a row pass the share ``at`` [b, 1] of their total.

    First in which of about sqrt(v) parts, then where in it: sums along all of a vocabulary take a GPU longer than the
    softmax.
    """
    width = 1 << (probs.shape[1].bit_length() + 1) // 2
    parts = F.pad(probs, (0, -probs.shape[1] % width)).unflatten(1, (-1, width))  # [b, parts, width]
    sums = parts.sum(-1).cumsum(-1)
    at = at * sums[:, -1:]
    part = torch.searchsorted(sums, at, right=True).clamp_max(sums.shape[1] - 1)  # [b, 1]
    before = sums.gather(1, (part - 1).clamp_min(0)).where(part > 0, 0.0)
    within = parts.gather(1, part[..., None].expand(-1, -1, width)).squeeze(1).cumsum(-1)  # [b, width]
    last = torch.nextafter(within[:, -1:], torch.zeros_like(at))  # sums in two orders differ in their last bits
    place = torch.searchsorted(within, torch.minimum(at - before, last), right=True)
    return (part * width + place).squeeze(1).clamp_max(probs.shape[1] - 1)


def uniform(seeds: Tensor, draws: Tensor) -> Tensor:
    """[b] fp32 in [0, 1), a hash of the two (splitmix64, https://doi.org/10.1145/2714064.2660195).

    In steps of 2^-23: the product with a sum near 1 then never rounds up to that sum.
    """
    x = _mixed(seeds) + (draws + 1) * -7046029254386353131  # 0x9E3779B97F4A7C15, wrapping around
    return (_mixed(x) >> 41 & 0x7FFFFF).float() * 2.0**-23


def _filtered(x: Tensor, rules: Rules) -> Tensor:
    """x [b, v] with -inf for what top-k, top-p and min-p leave out, one after the other."""
    lowest = _threshold(x, torch.ones_like(x), rules.top_k)
    x = x.masked_fill(x < lowest, -torch.inf)
    lowest = _threshold(x, x.softmax(-1), rules.top_p)
    x = x.masked_fill(x < lowest, -torch.inf)
    return x.masked_fill(x < x.amax(-1, keepdim=True) + rules.min_p.log()[:, None], -torch.inf)


def _threshold(x: Tensor, weights: Tensor, target: Tensor) -> Tensor:
    """[b, 1]: the largest x whose equals and betters weigh ``target`` [b] together: bisection, where a sort of 128k
    words for each of 256 rows would take longer than the model."""
    low = torch.where(x.isinf(), torch.inf, x).amin(-1, keepdim=True)
    high = x.amax(-1, keepdim=True)
    for _ in range(HALVINGS):
        middle = low + (high - low) / 2
        enough = (weights * (x >= middle)).sum(-1, keepdim=True) >= target[:, None]
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


def _mixed(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shifted(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """x >> bits of unsigned 64-bit numbers."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
