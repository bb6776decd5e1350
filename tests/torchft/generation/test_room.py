"""What an engine takes of memory: to the byte for its cache, and lengths of slots that fit."""

from pathlib import Path

import pytest
import torch
from families import CASES
from tiny import decoder, transformers_model

from torchft import models
from torchft.errors import UserError
from torchft.generation import room
from torchft.generation.engine import Engine
from torchft.generation.requests import Request
from torchft.generation.room import longest_slots, need_of, slots_that_fit
from torchft.generation.sampling import Sampling


@pytest.fixture(scope="module")
def model():
    return decoder(max_position_embeddings=100_000).eval()  # 2 layers of 2 kv heads of 16: 512 bytes a token, and 12


def free(monkeypatch, size):
    monkeypatch.setattr(room, "free_memory", lambda device: int(size / room.HOST_SHARE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["llama3.3_mqa", "gemma3", "gemma4_e2b", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_the_cache_is_told_to_the_byte(case, dtype, tmp_path):
    """Of windows, layers that share keys, latent keys and recurrent states."""
    transformers_model(**CASES[case]).save_pretrained(tmp_path)
    ours = models.load(tmp_path, dtype=dtype)
    slots, length = 3, 77
    engine = Engine(ours, num_slots=slots, max_len=length, stop_ids=())
    engine.complete([Request(prompt=[5] * 40, sampling=Sampling(max_new_tokens=3))])
    own = engine._slots
    held = [x for layer in own.cache.layers for x in (layer.k, layer.v, layer.state) if x is not None]
    assert need_of(ours).cache(slots, length) == sum(x.nbytes for x in (*held, own.answers, own.logps))


def test_the_longest_slots_that_fit(model, monkeypatch):
    need = need_of(model)
    assert need.token == 2 * 2 * 2 * 16 * 4 + 12
    monkeypatch.setattr(room, "HOST_LEN", 10**9)
    for slots in (1, 16):
        free(monkeypatch, 64 << 20)
        length, _ = longest_slots(model, num_slots=slots, asked=None)
        assert length % 256 == 0
        assert need.total(slots, length) <= 64 << 20 < need.total(slots, length + 256)
        assert longest_slots(model, num_slots=slots, asked=length)[0] == length
    free(monkeypatch, 1 << 40)
    assert longest_slots(model, num_slots=16, asked=None)[0] == 100_000  # the context
    monkeypatch.setattr(room, "free_memory", lambda device: None)
    assert longest_slots(model, num_slots=16, asked=None)[0] == 100_000


def test_a_host_takes_modest_slots(model, monkeypatch):
    free(monkeypatch, 1 << 40)
    assert longest_slots(model, num_slots=16, asked=None)[0] == 4096
    assert longest_slots(model, num_slots=16, asked=50_000)[0] == 50_000


def test_more_than_fits_is_refused_with_what_would_fit(model, monkeypatch):
    free(monkeypatch, 64 << 20)
    with pytest.raises(UserError, match=r"16 answers .* 50000 tokens, take .*--max-len \d+ or --num-slots 1") as e:
        longest_slots(model, num_slots=16, asked=50_000)
    length = int(str(e.value).partition("--max-len ")[2].split()[0])
    assert longest_slots(model, num_slots=16, asked=length)[0] == length
    assert longest_slots(model, num_slots=1, asked=50_000)[0] == 50_000
    free(monkeypatch, 1 << 20)
    with pytest.raises(UserError, match=r"16 answers .* 256 tokens, .*--num-slots \d"):
        longest_slots(model, num_slots=16, asked=None)


def test_fewer_slots_where_all_do_not_fit(model, monkeypatch):
    free(monkeypatch, 64 << 20)
    found = slots_that_fit(model, most=32, max_len=20_000)
    need = need_of(model)
    assert 1 <= found < 32 and need.total(found, 20_000) <= 64 << 20 < need.total(found + 1, 20_000)
    assert slots_that_fit(model, most=4, max_len=100) == 4
    free(monkeypatch, 1 << 20)
    with pytest.raises(UserError, match="fewer --max-new-tokens"):
        slots_that_fit(model, most=32, max_len=20_000)


def test_peaks_are_measured_where_the_device_tells_them(model, monkeypatch):
    """A prefill of n tokens that takes 1000 n + 2 n^2 bytes, and a step of 2 slots of 2048 tokens that takes 7 each,
    and the draw."""
    sizes = (4096, 8192, 50, 100)
    lengths, peaks = [], [1000 * n + 2 * n * n for n in sizes]
    draw = 2 * room.DRAW_BYTES * model.config.vocab_size
    peaks = iter([*peaks[:2], 7 * 4096 + draw, *peaks[2:], 7 * 200 + draw])
    monkeypatch.setattr(room, "COUNTED", ("cpu",))
    monkeypatch.setattr(room, "PREFILL_TOKENS", 8192)
    prefilled = room._prefilled
    monkeypatch.setattr(room, "_prefilled", lambda m, n: lengths.append(n) or prefilled(m, min(n, 32)))
    monkeypatch.setattr(room, "_peak", lambda device, work: (work(), next(peaks))[1])
    need = need_of(model)
    assert lengths == [16, 4096, 8192] and (need.prefill, need.square, need.step) == (1000, 2, 7)
    assert need_of(model, tokens=100) == need and lengths[3:] == [16, 50, 100]  # no more than it is asked for
    bare = need.cache(2, 10_000) + 2 * need.draw
    assert need.total(2, 10_000) == bare + 10_000 * 1000 + 2 * 10_000**2 + 2 * 10_000 * 7


def test_what_is_free_is_told_here():
    free = room.free_memory(torch.device("cpu"))
    assert (free is None) != Path("/proc/meminfo").exists() and (free is None or free > 2**20)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama3.3_mqa", "gemma2", "gemma4_e2b", "qwen3_next", "deepseek_v3"])
def test_slots_as_long_as_is_said_can_be_filled_on_a_gpu(family, tmp_path, monkeypatch):
    """Prompts and answers fill every slot in no more memory than is free, nor far less."""
    transformers_model(**CASES[family] | {"max_position_embeddings": 1_000_000}).save_pretrained(tmp_path)
    model = models.load(tmp_path, dtype=torch.bfloat16).to("cuda").eval()
    monkeypatch.setattr(room, "free_memory", lambda device: 1 << 30)
    length, need = longest_slots(model, num_slots=3, asked=None)
    assert length < 1_000_000 and need.total(3, length) <= room.SHARE["cuda"] * 2**30 < need.total(3, length + 256)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, 100, (3, length - 6), generator=generator).tolist()
    requests = [Request(prompt=p, sampling=Sampling(max_new_tokens=6, top_p=0.9)) for p in prompts]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    answers = Engine(model, num_slots=3, max_len=length, stop_ids=()).complete(requests)
    taken = torch.cuda.max_memory_allocated() - before
    assert [len(a.tokens) for a in answers] == [6, 6, 6]
    assert 0.4 * 2**30 < taken <= 2**30, (length, need)
