"""What Routing counts, the loss that it weighs and the biases that it moves; the metrics; what a token costs."""

import pytest
import torch
from families import experts
from tiny import tokens, transformers_model
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from torchft import models
from torchft.modules.moe import Experts, MoE
from torchft.modules.routers import GroupedRouter
from torchft.training.compile import compile_blocks
from torchft.training.meter import training_flops
from torchft.training.routing import Routing, RoutingConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("checkpoint")
    transformers_model(**experts.QWEN3_MOE).save_pretrained(made)
    return made


def same(x):
    return x


def logits_of(model, batch):
    """Each layer's router logits [t, e], by hooks."""
    found = []
    hooks = [layer.mlp.router.register_forward_hook(lambda m, x, out: found.append(out)) for layer in model.layers]
    model(batch)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("recompute", [0.0, 1.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_loss_and_counts(folder, recompute, compiled):
    """The gradient of a weight is that of the likelihood plus transformers' loss, of each layer by itself."""
    torch._dynamo.reset()
    model, batch = models.load(folder, dtype=torch.float32).train(), tokens()
    probe = torch.randn(*batch.shape, model.config.vocab_size)
    router = model.layers[0].mlp.router.weight
    logits = logits_of(model, batch)
    balance = sum(load_balancing_loss_func((layer,), 8, 3) for layer in logits) / len(logits)
    want = torch.autograd.grad((model(batch) * probe).mean() + 0.3 / 2 * balance, router)[0]

    routing = Routing(model, RoutingConfig(balance=0.3), sum=same)
    model.recompute = recompute
    if compiled:
        compile_blocks(model, backend="aot_eager")
    routing.begin(micro_steps=2)
    got = torch.autograd.grad((model(batch) * probe).mean(), router)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)
    counts = torch.stack([layer.topk(3)[1].flatten().bincount(minlength=8) for layer in logits])
    assert torch.equal(torch.stack([layer.mlp.counts for layer in model.layers]), counts * (1 + int(recompute)))
    routing.end_of_step()
    row = routing.row()
    assert row["expert_load"] == pytest.approx((counts.max(1)[0] / counts.double().mean(1)).max().item())
    assert row["idle_experts"] == pytest.approx((counts == 0).double().mean().item())
    assert routing.row() == {"expert_load": 0.0, "idle_experts": 1.0}


def test_bias_follows_the_load():
    """DeepSeek V3's rule: experts over the mean lose, the others win, by one speed a step and the load of all ranks."""
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.embed_tokens = torch.nn.Embedding(2, 2)
    model.moe = MoE(GroupedRouter(8, 4, 1), Experts(4, 8, 8))
    routing = Routing(model, RoutingConfig(bias_speed=0.01), sum=lambda t: t + torch.tensor([0, 0, 60, 0]))
    routing.begin(micro_steps=1)
    with torch.no_grad():
        model.moe.router.weight.zero_()
        model.moe.router.correction.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))  # all 40 tokens to expert 0
    model.moe(torch.randn(1, 40, 8))
    routing.end_of_step()
    torch.testing.assert_close(model.moe.router.correction.data, torch.tensor([0.99, 0.01, -0.01, 0.01]))


def test_a_dense_model_has_no_rows():
    model = models.build("llama3/Llama-3.2-1B")
    routing = Routing(model, RoutingConfig(balance=0.1), sum=same)
    routing.begin(micro_steps=1)
    routing.end_of_step()
    assert routing.row() == {}


def test_flops_count_the_experts_that_a_token_uses():
    """Qwen3-30B-A3B: a token uses 3.35B of 30.5B parameters, both tables included; one is looked up."""
    model = models.build("qwen3_moe/Qwen3-30B-A3B")
    c = model.config
    attention = 2 * c.dim * (c.num_heads + c.num_kv_heads) * c.head_dim
    used = c.num_layers * (attention + c.dim * c.num_experts + 8 * 3 * c.dim * c.expert_dim) + c.vocab_size * c.dim
    assert used + c.vocab_size * c.dim == pytest.approx(3.35e9, rel=0.01)
    attended = 6 * c.num_layers * c.num_heads * c.head_dim * 4096
    assert training_flops(model, seq_len=4096) == pytest.approx(6 * used + attended, rel=1e-6)
