"""Replayed micro-steps: the same losses and gradients as launched ones, whatever the optimizer does with gradients."""

from functools import partial

import pytest
import torch

from torchft import models
from torchft.adapters.fp8 import FP8Config, apply_fp8
from torchft.adapters.fused import fuse_lora
from torchft.adapters.lora import LoRAConfig, apply_lora, init_adapters
from torchft.adapters.nf4 import NF4Config, apply_nf4
from torchft.documents import Documents
from torchft.losses.likelihood import IGNORE, nll_sum
from torchft.modules.decoder import init_weights
from torchft.training.compile import compile_blocks
from torchft.training.graphs import Recorded, Replay, _aliased, _bounds, held_bytes

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
}

# Gemma 4's, whose embeddings are wider than its hidden states.
ELASTIC = {key: value for key, value in SIZES.items() if key not in ("hidden_act", "rope_theta")} | {
    "architectures": ["Gemma4ForCausalLM"],
    "model_type": "gemma4_text",
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", *["full_attention"] * 3],
    "sliding_window": 48,
    "head_dim": 64,
    "global_head_dim": 64,
    "num_kv_shared_layers": 1,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()


def build(method, *, tied=False):
    torch.manual_seed(0)
    config = ELASTIC if method == "elastic" else SIZES | {"tie_word_embeddings": tied}
    model = models.build(config).to_empty(device="cuda").to(torch.bfloat16)
    init_weights(model)
    if method == "nf4":
        apply_nf4(model, NF4Config())
    if method == "fp8":
        apply_fp8(model, FP8Config(), device=torch.device("cuda"))
    if method != "full":
        apply_lora(model, LoRAConfig(rank=8, alpha=16))
        fuse_lora(model)
        init_adapters(model)
        for name, p in model.named_parameters():
            if name.endswith("lora_b"):
                torch.nn.init.normal_(p, std=0.02)
    return model.train()


def batches(*, packed, steps=3, micro_steps=2, b=2, s=256):
    """Windows of (tokens, labels, positions, documents); the documents of later ones are more, and longer."""
    generator = torch.Generator("cuda").manual_seed(1)
    for step in range(steps):
        window = []
        for _ in range(micro_steps):
            tokens = torch.randint(0, 512, (b, s), device="cuda", generator=generator)
            labels = tokens.roll(-1, 1)
            labels[:, : 7 * (step + 1)] = IGNORE
            length = (64, 32, 128)[step]
            positions = torch.arange(s, device="cuda").expand(b, s) % length if packed else None
            window.append((tokens, labels, positions, Documents(b * s // length, length) if packed else None))
        yield window


def losses_and_gradients(model, windows, *, set_to_none):
    params = [p for p in model.parameters() if p.requires_grad]
    found = []
    for window in windows:
        for tokens, labels, positions, documents in window:
            head = partial(nll_sum, labels=labels, num_supervised=int((labels != IGNORE).sum()))
            loss = model(tokens, positions, documents=documents, head=head)
            loss.backward()
            found.append(loss.detach())
        found += [p.grad.clone() for p in params]
        torch._foreach_add_([p.data for p in params], [p.grad for p in params], alpha=-1e-5)
        for p in params:
            p.grad = None if set_to_none else p.grad.zero_()
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", ["lora", "nf4", "fp8", "full", "tied", "elastic"])
def test_replayed_steps_are_the_launched_ones(method, packed):
    tied = method == "tied"
    runs = []
    for replays in (False, True):
        model = build("full" if tied else method, tied=tied)
        compile_blocks(model, budget=0.8)
        if replays:
            model.replay = Replay(model)
        runs.append(losses_and_gradients(model, batches(packed=packed), set_to_none=True))
    if packed:
        assert len(model.replay._recorded) == 1
    for want, got in zip(*runs, strict=True):  # flash attention's backward adds in any order
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2 * want.abs().max().item())
    assert torch.equal(runs[0][0], runs[1][0])
    if not packed:
        exact = [torch.equal(a, b) for a, b in zip(*runs)]
        assert sum(exact) > 0.5 * len(exact)


@pytest.mark.gpu
def test_gradients_may_be_kept_or_set_to_none():
    kept, dropped = (
        losses_and_gradients(_replaying(build("lora")), batches(packed=False), set_to_none=set_to_none)
        for set_to_none in (False, True)
    )
    for a, b in zip(kept, dropped, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * b.abs().max().item())


@pytest.mark.gpu
def test_gradients_that_came_before_are_kept():
    model = _replaying(build("lora"))
    ((window,), *_) = batches(packed=False, steps=1, micro_steps=1), ()
    (tokens, labels, *_) = window[0]
    p = next(p for p in model.layers.parameters() if p.requires_grad)
    model(tokens, head=partial(nll_sum, labels=labels)).backward()
    alone, p.grad = p.grad.clone(), torch.ones_like(p)
    model(tokens, head=partial(nll_sum, labels=labels)).backward()
    torch.testing.assert_close(p.grad, alone + 1, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_two_forwards_before_a_backward_are_refused():
    model = _replaying(build("lora"))
    tokens = torch.randint(0, 512, (2, 256), device="cuda")
    first = model(tokens, head=partial(nll_sum, labels=tokens))
    model(tokens, head=partial(nll_sum, labels=tokens)).backward()
    with pytest.raises(AssertionError, match="a forward came between"):
        first.backward()


@pytest.mark.gpu
def test_a_third_shape_and_evaluation_are_not_recorded():
    model = _replaying(build("lora"))
    for s in (64, 128, 192):
        tokens = torch.randint(0, 512, (1, s), device="cuda")
        model(tokens, head=partial(nll_sum, labels=tokens)).backward()
    assert {shape[1] for shape, _ in model.replay._recorded} == {64, 128}
    with torch.no_grad():
        model(torch.randint(0, 512, (1, 32), device="cuda"))
    assert len(model.replay._recorded) == 2


@pytest.mark.gpu
def test_memory_that_a_graph_holds_is_known_and_given_back():
    model = _replaying(build("lora"))
    before = held_bytes()
    tokens = torch.randint(0, 512, (8, 512), device="cuda")
    model(tokens, head=partial(nll_sum, labels=tokens)).backward()
    one_block = 8 * 512 * 256 * 2
    assert held_bytes() - before > 3 * one_block
    model.replay = None
    assert held_bytes() == before


def _replaying(model):
    compile_blocks(model, budget=0.8)
    model.replay = Replay(model)
    return model


def test_bounds_leave_room_and_never_shrink():
    before = Recorded.__new__(Recorded)
    before.bounds = (20, 100)
    assert _bounds((8, 64), None, tokens=torch.Size((2, 256)))[:2] == (10, 80)
    assert _bounds((8, 128), before, tokens=torch.Size((2, 256)))[:2] == (20, 160)
    assert _bounds((500, 250), before, tokens=torch.Size((2, 256)))[:2] == (512, 256)
    assert before.holds((20, 100)) and not before.holds((21, 100)) and not before.holds((1, 101))
    assert not before.holds(None)


def test_gradients_of_others_go_into_the_buffers():
    recorded = Recorded.__new__(Recorded)
    recorded.params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    recorded.grads = [torch.full((2,), 7.0) for _ in range(3)]
    recorded.params[1].grad = torch.ones(2)
    recorded.params[2].grad = recorded.grads[2]
    recorded.own_gradients()
    assert all(p.grad is grad for p, grad in zip(recorded.params, recorded.grads))
    assert [p.grad[0].item() for p in recorded.params] == [0.0, 1.0, 7.0]


@pytest.mark.gpu
def test_each_replay_drops_other_values():
    torch.manual_seed(0)
    model = models.build(SIZES).to_empty(device="cuda").to(torch.bfloat16)
    init_weights(model)
    apply_lora(model, LoRAConfig(rank=8, alpha=16, dropout=0.5))
    init_adapters(model)
    for name, p in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(p, std=0.1)
    model = _replaying(model.train())
    tokens = torch.randint(0, 512, (2, 256), device="cuda")
    state = torch.cuda.get_rng_state()
    losses = []
    for _ in range(3):
        loss = model(tokens, head=partial(nll_sum, labels=tokens))
        loss.backward()
        losses.append(loss.item())
    assert len(set(losses)) == 3
    torch.cuda.set_rng_state(state)
    assert model(tokens, head=partial(nll_sum, labels=tokens)).item() == losses[0]


@pytest.mark.gpu
def test_recording_beside_a_loss_that_is_still_in_use():
    """Its graph holds nodes of the parameters, of another stream."""
    model = build("lora")
    compile_blocks(model, budget=0.8)
    tokens = torch.randint(0, 512, (2, 256), device="cuda")
    loss = model(tokens, head=partial(nll_sum, labels=tokens))
    loss.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    params = dict(model.named_parameters())
    for p in params.values():
        p.grad = None
    model.replay = Replay(model)
    again = model(tokens, head=partial(nll_sum, labels=tokens))
    again.backward()
    assert torch.equal(again, loss) and all(p is params[name] for name, p in model.named_parameters())
    for name, grad in want.items():
        torch.testing.assert_close(params[name].grad, grad, rtol=1e-2, atol=1e-2 * grad.abs().max().item())


def test_aliases_share_memory_and_not_gradients():
    torch.manual_seed(0)
    model = models.build(SIZES).to_empty(device="cpu")
    init_weights(model)
    params = list(model.layers.parameters())
    before, grads = dict(model.named_parameters()), [torch.zeros_like(p) for p in params]
    with _aliased(model, params, grads):
        inside = dict(model.named_parameters())
        model(torch.randint(0, 512, (1, 8))).sum().backward()
    assert all(p is before[name] for name, p in model.named_parameters())
    for name, p in before.items():
        assert inside[name].data_ptr() == p.data_ptr() and (inside[name] is p) == (not name.startswith("layers."))
        assert (p.grad is None) == name.startswith("layers.")
    assert all(grad.abs().max() > 0 for grad in grads)


@pytest.mark.gpu
def test_running_out_of_memory_while_recording_is_that_error_and_leaves_the_device_usable(monkeypatch):
    model = build("lora")
    compile_blocks(model, budget=0.8)
    (window,) = batches(packed=False, steps=1, micro_steps=1)
    tokens, labels, _, _ = window[0]
    model.replay = Replay(model)
    hidden = type(model).hidden

    def greedy(self, *args):
        if torch.cuda.is_current_stream_capturing():
            torch.empty(1 << 45, dtype=torch.uint8, device="cuda")
        return hidden(self, *args)

    monkeypatch.setattr(type(model), "hidden", greedy)
    with pytest.raises(torch.OutOfMemoryError):
        model(tokens, head=partial(nll_sum, labels=labels))
    monkeypatch.undo()
    model.replay = Replay(model)
    model(tokens, head=partial(nll_sum, labels=labels)).backward()
    torch.cuda.synchronize()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
