"""The engine against transformers' generate and our own training forward, with few slots for many requests."""

from collections import Counter
from dataclasses import replace
from functools import partial

import cpu_kernels
import pytest
import torch
from families import CASES
from tiny import decoder, tokens, transformers_model

from torchft import models
from torchft.adapters.lora import LoRAConfig, apply_lora, init_adapters, lora_layers
from torchft.generation import prefill
from torchft.generation.engine import Engine
from torchft.generation.loaded import warm_up
from torchft.generation.prefill import compiled_passes
from torchft.generation.requests import Request
from torchft.generation.sampling import Sampling
from torchft.losses.likelihood import token_logps
from torchft.modules import attend as attend_file
from torchft.modules import masks
from torchft.modules.fused_attention import cached_attention
from torchft.training.compile import compile_blocks, compiled

LENGTHS = (5, 33, 1, 17, 60, 16, 2)
PROMPTS = [tokens(1, n, seed=n, vocab_size=97)[0].tolist() for n in LENGTHS]
STOPS = tuple(range(8))  # of 101 tokens: answers end at different steps
MAX_LEN = 128


def engine(model, *, num_slots=3, stop_ids=STOPS, max_len=MAX_LEN, **more):
    return Engine(model.eval(), num_slots=num_slots, max_len=max_len, stop_ids=stop_ids, **more)


def requests(prompts=PROMPTS, **sampling):
    how = Sampling(**{"max_new_tokens": 40} | sampling)
    return [Request(prompt=prompt, sampling=how, seed=100 + i) for i, prompt in enumerate(prompts)]


def logps_of(model, prompt, answer, temperature=1.0):
    """Of the tokens of ``answer``, by a training forward."""
    row = torch.tensor([[*prompt, *answer]])
    labels = torch.cat((row[:, 1:], torch.full((1, 1), -100)), dim=1)
    labels[:, : len(prompt) - 1] = -100
    with torch.no_grad():
        logps = model(row, head=partial(token_logps, labels=labels, temperature=temperature))
    return logps[0, len(prompt) - 1 : -1]


@pytest.fixture(scope="module")
def model():
    return decoder().eval()


@pytest.mark.parametrize("case", [name for name in CASES if name != "phi4_mini"])  # LongRoPE: by the engine's max_len
def test_greedy_with_refilled_slots_is_transformers(case, tmp_path):
    """Of every family; windows are passed, and slots are used again by longer and by shorter sequences."""
    theirs = transformers_model(**CASES[case])
    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path, dtype=torch.float32)
    want = []
    for prompt in PROMPTS:
        row = torch.tensor([prompt])
        options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": list(STOPS), "max_new_tokens": 40}
        out = theirs.generate(row, attention_mask=torch.ones_like(row), **options)
        want.append(out[0, len(prompt) :].tolist())
    found = engine(ours, num_slots=2).complete(requests(temperature=0.0))
    assert [c.tokens for c in found] == want
    assert [c.finish for c in found] == ["stop" if answer[-1] in STOPS else "length" for answer in want]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logps_are_those_of_a_training_forward(model, temperature):
    found = engine(model).complete(requests(temperature=temperature, top_p=0.9))
    assert sum(len(c.tokens) for c in found) > 50
    for prompt, c in zip(PROMPTS, found):
        want = logps_of(model, prompt, c.tokens, temperature)
        assert (torch.tensor(c.logps) - want).abs().max() < 1e-4


def test_a_request_gets_its_tokens_whatever_is_beside_it(model):
    sampled = requests(top_k=50)
    beside = [replace(r, seed=7, sampling=Sampling(max_new_tokens=9, repetition_penalty=1.3)) for r in requests()]
    want = [c.tokens for c in engine(model).complete(sampled)]
    alone = [engine(model, num_slots=1).complete([r])[0].tokens for r in sampled]
    mixed = engine(model, num_slots=5).complete([r for pair in zip(beside, sampled) for r in pair])[1::2]
    assert alone == want and [c.tokens for c in mixed] == want
    other = engine(model).complete([replace(r, seed=r.seed + 1) for r in sampled])
    assert [c.tokens for c in other] != want


def test_prompts_of_a_group_are_computed_once(model):
    """And their answers are those of the prompt alone."""
    rows = []
    hook = model.embed_tokens.register_forward_hook(lambda _, args, __: rows.append(tuple(args[0].shape)))
    group = [replace(requests()[4], seed=i) for i in range(6)] + [requests()[1]]
    found = engine(model, num_slots=8).complete(group)
    hook.remove()
    assert [shape for shape in rows if shape[1] > 1] == [(2, 64)]
    assert len({tuple(c.tokens) for c in found}) > 3
    assert [c.tokens for c in found] == [engine(model).complete([r])[0].tokens for r in group]


def test_streamed_tokens_are_those_at_the_end(model):
    want = engine(model).complete(requests())
    runs = engine(model)
    for request in requests():
        runs.submit(replace(request, is_streamed=True))
    found, updates = {}, 0
    while not runs.is_idle:
        for number, new, logps, finish in runs.advance():
            assert len(new) == len(logps)
            answer, _ = found.get(number, ([], None))
            found[number] = (answer + new, finish)
            updates += 1
    assert [found[i] for i in range(len(want))] == [(c.tokens, c.finish) for c in want]
    assert updates > 2 * len(want)


def test_stop_texts_end_an_answer_with_the_token_that_completes_them(model):
    decode = "".join  # ids as two letters each, so that a text begins and ends within a token
    spell = lambda ids: decode(f"{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in ids)  # noqa: E731
    [whole] = engine(model, stop_ids=()).complete(requests(PROMPTS[:1]))
    text = spell(whole.tokens)
    stop = text[21:24]
    [cut] = engine(model, stop_ids=(), decode=spell).complete(requests(PROMPTS[:1], stop=["nothing", stop]))
    assert cut.finish == "stop" and len(cut.tokens) == (text.index(stop) + 2) // 2 + 1
    assert cut.tokens == whole.tokens[: len(cut.tokens)]


def test_repetition_penalty_counts_prompt_and_answer(model):
    """A penalty that no logit survives: an answer has no token twice, nor one of the prompt."""
    slots = engine(model, num_slots=2, stop_ids=())
    for prompt, c in zip(PROMPTS, slots.complete(requests(temperature=0.0, repetition_penalty=1e9, max_new_tokens=12))):
        assert len(set(c.tokens)) == len(c.tokens) and not set(c.tokens) & set(prompt)


def test_bad_requests_are_named_and_counted(model):
    runs = engine(model, max_len=40)
    found = runs.complete(requests(temperature=0.0))
    assert [c.finish == "too_long" for c in found] == [n >= 40 for n in LENGTHS]
    assert all(len(p) + len(c.tokens) <= 40 for p, c in zip(PROMPTS, found) if c.tokens)
    assert runs.num_finished["too_long"] == 1 and sum(runs.num_finished.values()) == len(PROMPTS)
    with pytest.raises(ValueError, match="prompt 7 is empty"):
        runs.submit(Request(prompt=[]))
    with pytest.raises(ValueError, match="decode"):
        runs.submit(Request(prompt=[1], sampling=Sampling(stop=["x"])))


def test_logits_that_are_not_finite_end_one_request_alone(model):
    """And leave nothing in their slot, where 0 times NaN would be NaN for the next."""
    free = engine(model, stop_ids=()).complete(requests(temperature=0.0))
    held = {0, *(t for prompt in PROMPTS for t in prompt)}  # 0 is what prefills are padded with
    poisoned = next(t for t in free[0].tokens[3:30] if t not in held)
    want = engine(model, stop_ids=(poisoned,)).complete(requests(temperature=0.0))
    weight = model.embed_tokens.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[poisoned] = float("nan")  # as an input alone: the head is a layer of its own
    found = engine(model, stop_ids=(), num_slots=2).complete(requests(temperature=0.0))
    with torch.no_grad():
        weight.copy_(before)
    ends = [c.finish for c in want]
    assert set(ends) == {"stop", "length"}
    for ours, expected in zip(found, want):
        assert ours.tokens == expected.tokens
        assert ours.finish == ("not_finite" if expected.finish == "stop" else "length")


def test_cancelled_requests_make_room(model):
    runs = engine(model, num_slots=1)
    numbers = [runs.submit(r) for r in requests(PROMPTS[:3])]
    runs.advance()
    runs.cancel(numbers[0])
    runs.cancel(numbers[1])
    ends = {}
    while not runs.is_idle:
        ends |= {u.number: u.finish for u in runs.advance() if u.finish}
    assert list(ends) == [numbers[2]]


def test_adapters_are_live(model):
    """What training changes, the next token feels; switched off, the base answers."""
    lora = decoder()
    apply_lora(lora, LoRAConfig(rank=4, targets="all-linear"))
    init_adapters(lora)
    runs = engine(lora)
    want = [c.tokens for c in engine(model).complete(requests())]
    assert [c.tokens for c in runs.complete(requests())] == want
    for layer in lora_layers(lora).values():
        torch.nn.init.normal_(layer.lora_b, std=0.1)
    found = runs.complete(requests())
    assert [c.tokens for c in found] != want
    for prompt, c in zip(PROMPTS, found):
        assert (torch.tensor(c.logps) - logps_of(lora, prompt, c.tokens)).abs().max() < 1e-4


def test_release_frees_the_cache(model):
    runs = engine(model)
    want = [c.tokens for c in runs.complete(requests())]
    runs.release()
    assert all(layer.k is None for layer in runs._slots.cache.layers)
    assert [c.tokens for c in runs.complete(requests())] == want


@pytest.mark.parametrize("family", ["llama3.3_mqa", "gpt_oss", "deepseek_v3", "gemma3", "qwen3_next"])
def test_the_kernel_that_reads_a_cache_finds_the_same(family, tmp_path, monkeypatch):
    transformers_model(**CASES[family]).save_pretrained(tmp_path)
    model = models.load(tmp_path, dtype=torch.float32)
    want = engine(model).complete(requests(temperature=0.0))
    kinds = []
    with cpu_kernels.installed():
        monkeypatch.setattr(masks, "_kernel", lambda *_: "flash")
        monkeypatch.setattr(attend_file, "cached_attention", lambda *args: kinds.append(1) or cached_attention(*args))
        found = engine(model).complete(requests(temperature=0.0))
    assert kinds and [c.tokens for c in found] == [c.tokens for c in want]


def test_compiled_steps_find_the_same(monkeypatch):
    model = decoder().eval()
    want = engine(model).complete(requests(temperature=0.0))
    with cpu_kernels.installed():
        monkeypatch.setattr(masks, "_kernel", lambda *_: "flash")
        runs = engine(model, compile="aot_eager")
        before = compiled().graphs
        found = runs.complete(requests(temperature=0.0))
    assert compiled().graphs - before == 3  # all blocks, the projection, the draw; small prefills run as they are
    assert [c.tokens for c in found] == [c.tokens for c in want]


def test_full_prefills_are_compiled_by_their_shape(monkeypatch):
    """And by nothing else: whatever came before, the same prompts are computed alike."""
    monkeypatch.setattr(prefill, "PREFILL_TOKENS", 64)
    monkeypatch.setattr(prefill, "COMPILED_LENGTH", 16)
    monkeypatch.setattr(masks, "_kernel", lambda *_: "flash")
    model, counts = decoder().eval(), []
    short = [PROMPTS[i] for i in (0, 2, 5, 6)]  # rows of 16 tokens, with padding
    with cpu_kernels.installed():
        runs, before = engine(model, num_slots=5, compile="aot_eager"), compiled().graphs
        for prompts in (short[:3], [*short, PROMPTS[1]], short, PROMPTS[:2]):
            asked = requests(prompts, temperature=0.0, max_new_tokens=4)
            want = engine(model, num_slots=5).complete(asked)
            found = runs.complete(asked)
            assert [c.tokens for c in found] == [c.tokens for c in want]
            for ours, theirs in zip(found, want):
                assert ours.logps == pytest.approx(theirs.logps, abs=1e-4)
            counts.append(compiled().graphs - before)
    # A step has three; one more is four prompts together's; a single one of 64 tokens, as full as it is, has none.
    assert counts == [3, 4, 4, 4]


def test_all_lengths_of_all_kinds_of_layers_have_room_for_their_graphs(tmp_path, monkeypatch):
    """The compiler gives up, and the run with it, at so many graphs of a class of blocks."""
    transformers_model(**CASES["gemma4_e2b"]).save_pretrained(tmp_path)
    ours = models.load(tmp_path, dtype=torch.float32)
    torch.compiler.reset()
    runs, before = engine(ours, num_slots=64, max_len=4096, stop_ids=(), compile="eager"), compiled().graphs
    shapes = compiled_passes(num_slots=64, max_len=4096)
    assert [(len(prompts), len(prompts[0])) for prompts in shapes] == [
        (64, 127),
        (32, 255),
        (16, 511),
        (8, 1023),
        (4, 2047),
    ]
    warm_up(runs)
    num_graphs = compiled().graphs
    assert num_graphs - before > 5 * len({type(layer) for layer in ours.layers})
    for length in (128, 2048):  # as a burst of requests does
        runs.complete(requests([[i + 1, *[9] * (length - 2)] for i in range(8192 // length)], max_new_tokens=2))
    assert compiled().graphs == num_graphs


@pytest.mark.parametrize("trains_compiled", [False, True])
def test_a_compiled_engine_and_training_leave_each_other_alone(trains_compiled):
    """Adapters learn between rollouts: nothing compiles again, and answers are those of a plain engine."""
    model = decoder()
    apply_lora(model, LoRAConfig(rank=4))
    init_adapters(model)
    if trains_compiled:
        compile_blocks(model, backend="aot_eager")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=30.0)
    runs, plain = engine(model, compile="aot_eager", stop_ids=()), engine(model, stop_ids=())
    counts, answers = [], []
    for _ in range(3):
        found = runs.complete(requests(temperature=0.0))
        assert [c.tokens for c in found] == [c.tokens for c in plain.complete(requests(temperature=0.0))]
        answers.append([c.tokens for c in found])
        for own in (runs, plain):
            own.release()
        model.train()
        model(tokens(2, 32, vocab_size=97), head=lambda hidden, project: project(hidden).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        counts.append(compiled().graphs)
    assert counts[0] == counts[1] == counts[2] and answers[0] != answers[1] != answers[2]
    assert all((layer._compiled_call_impl is not None) == trains_compiled for layer in model.layers)


def test_looks_that_lag_behind_find_the_same(model, monkeypatch):
    """As on a GPU, where the next steps are queued before the look behind the last ones is read."""

    def decode(ids):
        return "".join(chr(65 + i % 26) for i in ids)

    asked = [replace(r, is_streamed=i % 2 == 0) for i, r in enumerate(requests(stop=("QX", "B")))]
    want = engine(model, decode=decode).complete(asked)
    runs = engine(model, decode=decode)
    monkeypatch.setattr(runs, "_steps", 4)
    monkeypatch.setattr(runs._reader, "is_apart", True)
    streamed = []
    advance = runs.advance
    monkeypatch.setattr(runs, "advance", lambda: streamed.append(advance()) or streamed[-1])
    found = runs.complete(asked)
    assert runs._last is None  # nothing runs on
    assert [(c.tokens, c.finish) for c in found] == [(c.tokens, c.finish) for c in want]
    for ours, theirs in zip(found, want):
        assert ours.logps == pytest.approx(theirs.logps, abs=1e-4)
    assert len({len(c.tokens) for c in want}) > 3
    assert max(Counter(number for window in streamed for number, *_ in window).values()) > 1  # in parts


def test_no_step_outlives_the_answers(model, monkeypatch):
    """Where looks lag, steps are queued behind the last stop token: their memory may be another's afterwards."""
    runs, waited = engine(model, num_slots=1), []
    monkeypatch.setattr(runs, "_steps", 4)
    monkeypatch.setattr(runs._reader, "is_apart", True)
    progress = runs._reader.progress
    monkeypatch.setattr(runs._reader, "progress", lambda look: waited.append(look) or progress(look))
    taken = []
    monkeypatch.setattr(runs._reader, "look", lambda *a, look=runs._reader.look: taken.append(look(*a)) or taken[-1])
    found = []
    for request in requests(PROMPTS):
        found += runs.complete([request])
        assert waited[-1] is taken[-1]  # behind the newest steps
    assert any(c.finish == "stop" and len(c.tokens) < 32 for c in found)


@pytest.mark.parametrize(("new", "steps"), [(1, 0), (4, 3), (40, 39)])
def test_no_more_steps_than_the_last_answer_needs(model, new, steps, monkeypatch):
    """Between two checks on a GPU there are many; the prefill draws the first token."""
    runs, taken = engine(model, stop_ids=()), []
    monkeypatch.setattr(runs, "_steps", 16)
    monkeypatch.setattr(runs._slots, "step", lambda *a, step=runs._slots.step, **b: taken.append(1) or step(*a, **b))
    found = runs.complete(requests(PROMPTS[:3], max_new_tokens=new))
    assert [len(c.tokens) for c in found] == [new] * 3
    assert len(taken) == steps


@pytest.mark.parametrize("case", CASES)
def test_the_step_of_every_family_is_one_graph(case, tmp_path, monkeypatch):
    """Nothing in it, nor in a full prefill, makes the compiler give up, and layers of a kind share theirs."""
    monkeypatch.setattr(prefill, "COMPILED_ROWS", 1)
    monkeypatch.setattr(prefill, "COMPILED_LENGTH", 16)
    monkeypatch.setattr(prefill, "PREFILL_TOKENS", 32)
    theirs = transformers_model(**CASES[case])
    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path, dtype=torch.float32)
    torch.compiler.reset()  # the families before have filled what one process may hold
    asked = requests(PROMPTS[:3], temperature=0.0, max_new_tokens=6)
    want = engine(ours, num_slots=2).complete(asked)
    found = engine(ours, num_slots=2, compile="eager").complete(asked)
    assert [c.tokens for c in found] == [c.tokens for c in want]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_change_nothing():
    model = decoder().eval().to("cuda")
    runs = engine(model)
    assert runs._graphs is not None
    got = runs.complete(requests(repetition_penalty=1.1, top_p=0.9))
    plain = engine(model)
    plain._graphs = None
    assert [c.tokens for c in plain.complete(requests(repetition_penalty=1.1, top_p=0.9))] == [c.tokens for c in got]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_slots", [1, 3])
def test_compiled_steps_on_a_gpu(num_slots, monkeypatch):
    """And full prefills. A single slot has products of its own. In fp32 the same tokens; in bf16 log-probabilities as
    training finds them."""
    monkeypatch.setattr(prefill, "COMPILED_ROWS", 1)
    monkeypatch.setattr(prefill, "COMPILED_LENGTH", 16)
    monkeypatch.setattr(prefill, "PREFILL_TOKENS", 32)
    model = decoder().eval().to("cuda")
    asked = requests(PROMPTS[:4], top_p=0.9)
    want = engine(model, num_slots=num_slots).complete(asked)
    found = engine(model, num_slots=num_slots, compile="inductor").complete(asked)
    assert [c.tokens for c in found] == [c.tokens for c in want]
    half, whole = decoder().eval().to("cuda", torch.bfloat16), decoder().eval()
    for prompt, c in zip(PROMPTS, engine(half, num_slots=num_slots, compile="inductor").complete(asked)):
        assert (torch.tensor(c.logps) - logps_of(whole, prompt, c.tokens)).abs().max() < 0.2
