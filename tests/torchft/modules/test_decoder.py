"""What must not move the numbers: packing, recompute, compile, accumulation, a cache. Compared on gradients."""

import cpu_kernels
import pytest
import torch
from oracles import distance, gradients, mean_nll, violations
from tiny import LLAMA3_ROPE, decoder, tokens
from torch.nn.utils.rnn import pad_sequence
from transformers import MistralConfig, MistralForCausalLM

from torchft.documents import Documents
from torchft.hub import hub_format
from torchft.modules import masks
from torchft.modules.decoder import init_weights
from torchft.modules.kv_cache import KVCache
from torchft.modules.masks import Sight

EXACT = 3e-6  # relative, for each parameter; the measured noise of fp32 sums in another order is 1e-6


def documents(lengths, seed=0):
    """(tokens, labels) of documents; labels already shifted, the first two tokens not trained on."""
    rows = [tokens(1, n, seed=seed + i)[0] for i, n in enumerate(lengths)]
    labels = [torch.cat((row[1:], row.new_tensor([-100]))) for row in rows]
    for row in labels:
        row[:2] = -100
    return rows, labels


def separately(model, rows, labels):
    """Loss and gradients with each document alone in its own forward."""
    count = sum(int((y != -100).sum()) for y in labels)
    loss = sum(mean_nll(model, x[None], y[None], count=count) for x, y in zip(rows, labels))
    return {"loss": loss} | gradients(model, loss)


def together(model, rows, labels, positions=None):
    loss = mean_nll(model, rows, labels, positions)
    return {"loss": loss} | gradients(model, loss)


def worst(got, want):
    return max(distance(got[name], want[name])[1] for name in want)


def windowed(window):
    """Our decoder with a sliding window in every other layer."""
    model = decoder(rope_parameters=LLAMA3_ROPE)
    for layer in model.layers[::2]:
        layer.sight = Sight(window=window)
    model.sights = [layer.sight for layer in model.layers]
    return model


@pytest.mark.parametrize("lengths", [(5, 23, 1, 40), (40, 29), (3, 3, 3, 60)])
@pytest.mark.parametrize("window", [None, 4])
def test_packed_is_separate(lengths, window):
    model = decoder(rope_parameters=LLAMA3_ROPE) if window is None else windowed(window)
    rows, labels = documents(lengths)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = torch.cat(rows)[None], torch.cat(labels)[None]

    logits = torch.cat([model(row[None]) for row in rows], dim=1)
    assert distance(model(packed[0], positions), logits)[1] <= EXACT
    assert worst(together(model, *packed, positions), separately(model, rows, labels)) <= EXACT
    assert worst(together(model, *packed), separately(model, rows, labels)) > 0.1  # without the mask


def test_two_packed_rows_with_different_documents():
    model = decoder()
    rows, labels = documents((7, 13, 16, 4))
    positions = torch.stack(
        [torch.cat([torch.arange(7), torch.arange(13)]), torch.cat([torch.arange(16), torch.arange(4)])]
    )
    packed = torch.cat(rows).view(2, 20), torch.cat(labels).view(2, 20)
    assert worst(together(model, *packed, positions), separately(model, rows, labels)) <= EXACT


def test_padded_is_separate():
    model = decoder()
    rows, labels = documents((5, 23, 3, 40))
    padded = pad_sequence(rows, batch_first=True), pad_sequence(labels, batch_first=True, padding_value=-100)
    assert worst(together(model, *padded), separately(model, rows, labels)) <= EXACT


@pytest.mark.parametrize("window", [1, 7, 60, 500])
def test_window_is_mistrals(window):
    ours = decoder()
    config = MistralConfig(**{k: v for k, v in hub_format(ours).config_json.items() if k != "architectures"})
    config.sliding_window, config._attn_implementation = window, "eager"
    theirs = MistralForCausalLM(config).eval()
    theirs.load_state_dict({hub_format(ours).names.rename(n): p for n, p in ours.named_parameters()})
    ours.sights = [Sight(window=window)] * len(ours.layers)
    batch = tokens(2, 60)
    assert violations({"logits": (ours(batch), theirs(batch).logits)}) == {}


@pytest.mark.parametrize("window", [None, 4])
def test_cache_equals_one_forward(window):
    model = decoder() if window is None else windowed(window)
    batch = tokens(2, 12)
    cache = KVCache(2, num_slots=15)
    steps = [(0, 5), (5, 6), (6, 9), (9, 12)]
    with torch.no_grad():
        logits = [model(batch[:, a:b], torch.arange(a, b).expand(2, -1), cache=cache) for a, b in steps]
        assert distance(torch.cat(logits, dim=1), model(batch))[1] <= EXACT


def test_recompute_is_bit_exact():
    model = decoder(rope_parameters=LLAMA3_ROPE)
    (batch, labels), calls = (tokens(), tokens()), []
    plain = together(model, batch, labels)
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.recompute = True
    recomputed = together(model, batch, labels)
    assert len(calls) == 2  # once more in backward
    assert all(torch.equal(recomputed[name], plain[name]) for name in plain)
    model.eval()
    together(model, batch, labels)
    assert len(calls) == 3


@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_blocks(recompute):
    model = decoder(rope_parameters=LLAMA3_ROPE)
    batch, labels = tokens(2, 24), tokens(2, 24)
    positions = torch.arange(24).remainder(16).expand(2, -1)
    plain = together(model, batch, labels, positions)
    model.recompute = recompute
    for layer in model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    assert worst(together(model, batch, labels, positions), plain) <= 1e-5
    assert list(dict(model.named_parameters())) == [n for n in plain if n != "loss"]  # no _orig_mod in the names
    torch.compiler.reset()


@pytest.mark.parametrize("kernel", ["dense", "flash"])
@pytest.mark.parametrize("budget", [1.0, 0.5, 0.0])
def test_compiled_blocks_meet_many_packings(monkeypatch, kernel, budget):
    """One graph for each kind of layer, whatever the documents are; and the partitioner knows attention's cost."""
    packings = [(5, 7, 12), (1,) * 12 + (12,), (24,), (23, 1)]
    monkeypatch.setattr(masks, "_kernel", lambda *_: kernel)
    model = windowed(6)
    rows, labels = tokens(2, 24), tokens(2, 24)
    positions = [torch.cat([torch.arange(n) for n in lengths]).expand(2, -1) for lengths in packings]
    with cpu_kernels.installed(), torch._functorch.config.patch(activation_memory_budget=budget):
        plain = [together(model, rows, labels, p) for p in positions]
        for layer in model.layers:
            layer.compile(backend="aot_eager_decomp_partition", fullgraph=True, dynamic=False)
        together(model, rows, labels, positions[0])
        with torch._dynamo.config.patch(error_on_recompile=True):
            for p, want in zip(positions, plain):
                assert worst(together(model, rows, labels, p), want) <= 1e-5
    torch.compiler.reset()


@pytest.mark.parametrize("window", [None, 4])
def test_fused_kernels_are_dense(monkeypatch, window):
    """The description of packed rows reaches a fused kernel through recompute, too."""
    model = windowed(window)
    positions = torch.arange(24).remainder(10).expand(2, -1)
    batch, labels = tokens(2, 24), tokens(2, 24)
    want = together(model, batch, labels, positions)
    monkeypatch.setattr(masks, "_kernel", lambda *_: "flash")
    model.recompute = True
    with cpu_kernels.installed():
        assert worst(together(model, batch, labels, positions), want) <= EXACT
        known = model(batch, positions, documents=Documents(6, 10))
        assert distance(known, model(batch, positions))[0] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("compile", [False, True])
def test_packed_is_separate_on_gpu(window, compile):
    lengths = (5, 230, 1, 148)
    model = windowed(window).to("cuda", torch.bfloat16)
    rows, labels = ([x.cuda() for x in part] for part in documents(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None].cuda()
    packed = torch.cat(rows)[None], torch.cat(labels)[None]
    want = separately(model, rows, labels)
    if compile:
        for layer in model.layers:
            layer.compile(fullgraph=True, dynamic=False)
    exact = separately(model.float(), rows, labels)
    model.bfloat16()
    got = together(model, *packed, positions)
    assert worst(got, exact) <= 1.5 * worst(want, exact) + 1e-3  # no worse than bf16 itself
    torch.compiler.reset()


def accumulated(model, rows, labels, size, normalise):
    """Gradients over micro-batches of ``size`` ragged rows; the last one may be smaller."""
    total = sum(int((y != -100).sum()) for y in labels)
    micro = [(rows[i : i + size], labels[i : i + size]) for i in range(0, len(rows), size)]
    sums = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for xs, ys in micro:
        x, y = pad_sequence(xs, batch_first=True), pad_sequence(ys, batch_first=True, padding_value=-100)
        loss = mean_nll(model, x, y, count=total) if normalise == "global" else mean_nll(model, x, y) / len(micro)
        for name, grad in gradients(model, loss).items():
            sums[name] += grad
    return sums


@pytest.mark.parametrize(
    "size", [1, 2, 3, 4]
)  # of 7 rows: windows of 7, 4, 3 and 2 micro-batches, the last ones partial
def test_accumulation_is_one_batch(size):
    model = decoder()
    rows, labels = documents((4, 31, 9, 5, 40, 17, 3))
    want = accumulated(model, rows, labels, len(rows), "global")
    assert worst(accumulated(model, rows, labels, size, "global"), want) <= EXACT
    assert worst(accumulated(model, rows, labels, size, "mean of means"), want) > 0.05


@pytest.mark.parametrize("tied", [True, False])
def test_decoder_holds_parameters_only(tied):
    model = decoder(tie_word_embeddings=tied)
    assert list(model.buffers()) == []
    assert (model.lm_head is None) == tied
    assert list(model.state_dict()) == [n for n, _ in model.named_parameters()]


def test_init_weights():
    model = decoder(hidden_size=128, attention_bias=True)
    init_weights(model, std=0.05)
    params = dict(model.named_parameters())
    assert all(p.eq(1).all() for n, p in params.items() if "norm" in n)
    assert all(p.eq(0).all() for n, p in params.items() if n.endswith("bias"))
    weights = torch.cat([p.flatten() for n, p in params.items() if "norm" not in n and n.endswith("weight")])
    assert abs(weights.std().item() - 0.05) < 1e-3 and abs(weights.mean().item()) < 1e-3
