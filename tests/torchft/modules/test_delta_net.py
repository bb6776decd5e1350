"""The chunked delta rule against the recurrence itself and transformers' layer; nothing passes between documents."""

import pytest
import torch
from oracles import violations
from transformers import Qwen3_5TextConfig, Qwen3NextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from torchft.modules import delta_net
from torchft.modules.delta_net import GatedDeltaNet, causal_conv, delta_rule
from torchft.modules.kv_cache import LayerCache
from torchft.modules.masks import Visible

DIM = 32
SIZES = {
    "hidden_size": DIM,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-3,
    "layer_types": ["linear_attention"],
    "num_hidden_layers": 1,
}
CLASSES = {"grouped": (Qwen3NextGatedDeltaNet, Qwen3NextConfig), "plain": (Qwen3_5GatedDeltaNet, Qwen3_5TextConfig)}
SEEN = Visible()
DOCUMENTS = (1, 70, 3, 64, 2, 40)  # tokens: shorter and longer than a chunk, ending within one and with one
TOKENS = sum(DOCUMENTS)


def ours(is_grouped=False):
    return GatedDeltaNet(
        DIM, 4, 2, key_dim=8, value_dim=12, kernel=4, norm_eps=1e-3, is_grouped=is_grouped
    )  # fmt: skip


def random(module):
    torch.manual_seed(0)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module


def arange(x):
    return torch.arange(x.shape[1]).expand(x.shape[:2])


def packed_positions():
    return torch.cat([torch.arange(n) for n in DOCUMENTS])[None]


def recurrent(q, k, v, decay, beta, positions):
    """The rule as it is written, a token at a time, in fp64."""
    q, k, v, decay, beta = (x.double() for x in (q, k, v, decay, beta))
    state, outputs = torch.zeros(q.shape[0], q.shape[2], k.shape[-1], v.shape[-1], dtype=torch.float64), []
    for t in range(q.shape[1]):
        alive = (positions[:, t] > 0).double()[:, None] * decay[:, t].exp()  # [b, h]
        state = state * alive[..., None, None]
        error = v[:, t] - torch.einsum("bhk,bhkc->bhc", k[:, t], state)
        state = state + torch.einsum("bhk,bhc->bhkc", k[:, t], beta[:, t, :, None] * error)
        outputs.append(torch.einsum("bhk,bhkc->bhc", q[:, t], state))
    return torch.stack(outputs, dim=1)


def inputs(rows=1, tokens=TOKENS):
    torch.manual_seed(1)
    q, k = (torch.nn.functional.normalize(torch.randn(rows, tokens, 4, 8), dim=-1) for _ in range(2))
    v = torch.randn(rows, tokens, 4, 12)
    return [x.requires_grad_() for x in (q, k, v, -torch.rand(rows, tokens, 4), torch.rand(rows, tokens, 4))]


def output_and_gradients(function, given, positions):
    out = function(*given, positions)
    probe = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out)
    names = ("q", "k", "v", "decay", "beta")
    return {"out": out} | dict(zip(names, torch.autograd.grad((out * probe).mean(), given)))


@pytest.mark.parametrize("tokens", [1, 5, 64, 65, 200])
def test_chunks_are_the_recurrence(tokens):
    given = inputs(rows=2, tokens=tokens)
    got, want = (output_and_gradients(f, given, arange(given[0])) for f in (delta_rule, recurrent))
    assert violations({n: (got[n], want[n]) for n in want}) == {}


def test_chunks_of_packed_documents_are_the_recurrence_of_each():
    given, positions = inputs(), packed_positions()
    got, want = (output_and_gradients(f, given, positions) for f in (delta_rule, recurrent))
    assert violations({n: (got[n], want[n]) for n in want}) == {}
    leaking = delta_rule(*given, arange(given[0]))
    assert violations({"leak": (leaking, want["out"])})


@pytest.mark.parametrize("kind", CLASSES)
def test_layer_is_transformers(kind):
    cls, config = CLASSES[kind]
    theirs, mine = cls(config(**SIZES), 0), random(ours(kind == "grouped"))
    theirs.load_state_dict(mine.state_dict())
    x = torch.randn(2, 100, DIM, requires_grad=True)
    outputs = {"got": mine(x, None, None, SEEN, positions=arange(x)), "want": theirs(x)}
    inputs_of = {
        "got": {"x": x, **dict(mine.named_parameters())},
        "want": {"x": x, **dict(theirs.named_parameters())},
    }
    probe = torch.randn(outputs["want"].shape)
    grads = {
        side: dict(zip(inputs_of[side], torch.autograd.grad((out * probe).mean(), list(inputs_of[side].values()))))
        for side, out in outputs.items()
    }
    pairs = {"out": (outputs["got"], outputs["want"])} | {n: (grads["got"][n], grads["want"][n]) for n in grads["want"]}
    assert violations(pairs) == {}


def test_documents_of_a_row_do_not_see_each_other():
    """The layer, convolution too: each document as if it were alone, and no gradient from it to another."""
    layer, x = random(ours()), torch.randn(1, sum(DOCUMENTS), DIM, requires_grad=True)
    packed = layer(x, None, None, SEEN, positions=packed_positions()).split(DOCUMENTS, dim=1)
    alone = [layer(part, None, None, SEEN, positions=arange(part)) for part in x.split(DOCUMENTS, dim=1)]
    assert violations({f"document {i}": pair for i, pair in enumerate(zip(packed, alone))}) == {}
    (gradient,) = torch.autograd.grad(packed[3].sum(), x)
    norms = [part.abs().max().item() for part in gradient.split(DOCUMENTS, dim=1)]
    assert [norm > 1e-5 * max(norms) for norm in norms] == [False, False, False, True, False, False]


def test_bars_see_a_convolution_that_leaks(monkeypatch):
    layer, x = random(ours()), torch.randn(1, sum(DOCUMENTS), DIM)
    want = layer(x, None, None, SEEN, positions=packed_positions())
    monkeypatch.setattr(delta_net, "causal_conv", lambda x, weight, positions: causal_conv(x, weight, arange(x)))
    assert violations({"leak": (layer(x, None, None, SEEN, positions=packed_positions()), want)})


def test_cache_goes_on_from_rows_of_different_lengths():
    """Prompts of 7 and 3 tokens, padded to 7; then a token each, at their own ends."""
    layer, x = random(ours()), torch.randn(2, 10, DIM)
    alone = [layer(x[i : i + 1], None, None, SEEN, positions=arange(x[:1])) for i in range(2)]
    cache = LayerCache(12)
    prompt = x[:, :7].clone()
    prompt[1, 3:] = 99.0  # padding
    layer(prompt, None, None, SEEN, cache, arange(prompt))
    for step in range(3):
        position = torch.tensor([[7 + step], [3 + step]])
        token = torch.stack([x[0, 7 + step], x[1, 3 + step]])[:, None]
        out = layer(token, None, None, SEEN, cache, position)
        want = torch.stack([alone[0][0, 7 + step], alone[1][0, 3 + step]])[:, None]
        assert violations({"step": (out, want)}) == {}


def test_single_tokens_go_on_from_the_state(monkeypatch):
    """A prefill of 7 and 3 tokens, copied to three rows in another order; then tokens one by one, each step twice over,
    as a warm-up repeats it, without the rule over all slots. A row is then filled anew."""
    layer, x = random(ours()), torch.randn(2, 10, DIM)
    alone = [layer(x[i : i + 1], None, None, SEEN, positions=arange(x[:1])) for i in range(2)]
    prompt = x[:, :7].clone()
    prompt[1, 3:] = 99.0  # padding
    prefill = LayerCache(None, lengths=torch.tensor([7, 3]))
    layer(prompt, None, None, SEEN, prefill, arange(prompt))
    cache = LayerCache(12)

    def steps(rows, count):
        for step in range(count):
            places = [(7, 3)[i] + step for i in rows]
            token = torch.stack([x[i, place] for i, place in zip(rows, places)])[:, None]
            for _ in range(2):
                out = layer(token, None, None, SEEN, cache, torch.tensor(places)[:, None])
            want = torch.stack([alone[i][0, place] for i, place in zip(rows, places)])[:, None]
            assert violations({"step": (out, want)}) == {}

    with monkeypatch.context() as patch:
        patch.setattr(delta_net, "delta_rule_and_state", None)
        cache.copy_rows(prefill, torch.tensor([1, 0, 1]), torch.tensor([0, 1, 2]), num_rows=3)
        steps([1, 0, 1], 3)
        cache.copy_rows(prefill, torch.tensor([0, 1]), torch.tensor([0, 1]), num_rows=3)
        steps([0, 1], 2)


@pytest.mark.parametrize("kind", CLASSES)
def test_compiles_in_one_graph_for_every_packing(kind):
    torch._dynamo.reset()
    layer = random(ours(kind == "grouped"))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=False)
    x = torch.randn(1, sum(DOCUMENTS), DIM)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for positions in (packed_positions(), arange(x).contiguous()):
            got = compiled(x, None, None, SEEN, None, positions)
            assert violations({"out": (got, layer(x, None, None, SEEN, None, positions))}) == {}
