"""What an engine takes of a device's memory beside the model, and how long its slots can be.

The cache is computed to the byte, from a short prefill. The peaks of prefills and steps hang on the kernels: on a GPU
they are measured.
"""

import bisect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from torchft.errors import UserError
from torchft.generation.narrow_adapters import NarrowAdapters
from torchft.generation.prefill import PREFILL_TOKENS, SHORTEST, Prefill
from torchft.generation.sampling import Sampling
from torchft.generation.slots import Slots, Start
from torchft.modules.decoder import Decoder
from torchft.modules.kv_cache import KVCache

SHARE = {"cuda": 0.9}  # of the free memory: CUDA graphs, fragments and the kernels of a step want some
HOST_SHARE = 0.5  # what else a host's memory is for is not known
HOST_LEN = 4096  # tokens of a slot where nothing else is asked for: a prompt that fills it takes a CPU minutes
COUNTED = ("cuda",)  # devices whose peaks torch tells
STEP_LEN = 2048  # tokens of the slots whose step is measured
MULTIPLE = 256  # of which a length that is chosen is one
ANSWER_BYTES = 12  # of a token in `Slots`: its id and its log-probability
DRAW_BYTES = 32  # of a slot and a word of the vocabulary: logits and what a draw makes of them, in fp32


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes beside the model."""

    token: int  # of a slot's token: keys and values of all layers that have some, and what is drawn
    slot: int  # of a slot however short: states of recurrent layers
    draw: int  # of a slot while its token is drawn
    prefill: float  # of a prefill's token
    square: float = 0.0  # of a prefill's tokens squared: masks, where a kernel needs them
    step: float = 0.0  # of a slot's token while the next one is computed: keys repeated for all heads, scores

    def cache(self, num_slots: int, max_len: int) -> int:
        """What stays from step to step."""
        return num_slots * (self.slot + max_len * self.token)

    def total(self, num_slots: int, max_len: int) -> int:
        """With the largest prefill and step."""
        most = min(max(PREFILL_TOKENS, max_len), num_slots * max_len)
        prefill = most * (self.prefill + max_len * self.square)
        return self.cache(num_slots, max_len) + int(prefill + num_slots * (self.draw + max_len * self.step))


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def need_of(model: Decoder, *, tokens: int = PREFILL_TOKENS) -> Need:
    """From prefills, the largest of ``tokens``, and a step, as an engine makes them that does not compile, which takes
    more. UserError if these do not fit."""
    device, context = model.embed_tokens.weight.device, model.config.max_seq_len
    shortest, length = min(SHORTEST, context), min(tokens, PREFILL_TOKENS, context)
    try:
        with NarrowAdapters(model).used():
            layers = _prefilled(model, shortest).layers
            held = sum(x.nbytes for layer in layers for x in (layer.k, layer.v) if x is not None)
            states = sum(2 * layer.state.nbytes for layer in layers if layer.state is not None)  # a slot has two
            need = Need(
                token=held // shortest + ANSWER_BYTES,
                slot=states + ANSWER_BYTES,  # `Slots` has a place for a token more
                draw=DRAW_BYTES * model.config.vocab_size,
                prefill=held / shortest,
            )
            if device.type not in COUNTED:
                return need
            del layers
            half, whole = (_peak(device, partial(_prefilled, model, n)) for n in (length // 2, length))
            square = max(0.0, (whole - 2 * half) * 2 / length**2)
            step_len = min(STEP_LEN, length)
            step = max(0, _peak(device, _step(model, step_len)) - 2 * need.draw) / (2 * step_len)
    except torch.OutOfMemoryError:
        raise UserError(f"{device}: beside the model no memory is left for a prompt of {length} tokens") from None
    return replace(need, prefill=whole / length - square * length, square=square, step=step)


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free now; None if nobody says."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if device.type != "cpu" or not info.exists():
        return None
    found = dict(line.split(":") for line in info.read_text().splitlines())
    return int(found["MemAvailable"].split()[0]) << 10


def longest_slots(model: Decoder, *, num_slots: int, asked: int | None) -> tuple[int, Need]:
    """Tokens of each of ``num_slots``: ``asked``, or the most that the device and the model have room for; HOST_LEN at
    most where that is not a GPU. UserError, with what would fit, for more than does."""
    device, context = model.embed_tokens.weight.device, model.config.max_seq_len
    need, usable = need_of(model), _usable(device)
    fits = context
    if usable is not None:
        fits = bisect.bisect_right(range(1, context + 1), usable, key=lambda n: need.total(num_slots, n))
    least = min(context, MULTIPLE) if asked is None else asked
    if fits < least:
        slots = _slots_that_fit(need, num_slots, least, usable)
        ways = [f"--max-len {fits // MULTIPLE * MULTIPLE}"] if fits >= MULTIPLE else []
        ways += [f"--num-slots {slots}"] if 0 < slots < num_slots else []
        raise UserError(_too_much(need, num_slots, least, device, usable, ways))
    if asked is not None:
        return asked, need
    if device.type != "cuda":
        fits = min(fits, HOST_LEN)
    return (fits if fits == context else fits // MULTIPLE * MULTIPLE), need


def slots_that_fit(model: Decoder, *, most: int, max_len: int) -> int:
    """As many slots of ``max_len`` tokens, up to ``most``, as the device has room for. UserError if that is none."""
    device = model.embed_tokens.weight.device
    need, usable = need_of(model, tokens=most * max_len), _usable(device)
    found = _slots_that_fit(need, most, max_len, usable)
    if not found:
        raise UserError(_too_much(need, 1, max_len, device, usable, ["a shorter prompt", "fewer --max-new-tokens"]))
    return found


def gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**29 else f"{size / 2**20:,.1f} MiB"


def _slots_that_fit(need: Need, most: int, max_len: int, usable: int | None) -> int:
    if usable is None:
        return most
    return bisect.bisect_right(range(1, most + 1), usable, key=lambda n: need.total(n, max_len))


def _too_much(
    need: Need, num_slots: int, max_len: int, device: torch.device, usable: int | None, ways: list[str]
) -> str:
    answers = f"{num_slots} answer{'s' if num_slots > 1 else ''} at a time"
    wanted = gib(need.total(num_slots, max_len))
    return (
        f"{answers}, each with its question up to {max_len} tokens, take {wanted}; {device} has {gib(usable or 0)} for "
        f"that beside the model: {' or '.join([*ways, 'a device with more'])}"
    )


def _usable(device: torch.device) -> int | None:
    free = free_memory(device)
    return None if free is None else int(free * SHARE.get(device.type, HOST_SHARE))


def _prefilled(model: Decoder, length: int) -> KVCache:
    return Prefill(model, reach=length, graphs=None)([(0,) * length], length=length)[1]


def _step(model: Decoder, length: int) -> Callable[[], None]:
    """A step of two slots of ``length`` tokens, looked at whole."""
    v = model.config.vocab_size
    slots = Slots(model, num_slots=2, max_len=length, stop_ids=(), vocab_size=v)
    starts = [Start(slot=i, prompt=(0,), sampling=Sampling(), seed=i, limit=length) for i in range(2)]
    slots.prefill(starts, [(0,)], length=min(SHORTEST, length), filtered=False, blocks=nullcontext())
    slots.cache.see(length)
    return partial(slots.step, 2, filtered=True)


def _peak(device: torch.device, work: Callable[[], object]) -> int:
    """Bytes at its height, more than before."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before
