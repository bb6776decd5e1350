"""Routers against transformers' own."""

import pytest
import torch
from oracles import violations
from transformers import DeepseekV3Config, GptOssConfig, Llama4TextConfig, MixtralConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from torchft.modules.routers import ChosenSoftmaxRouter, GroupedRouter, SigmoidRouter, SoftmaxRouter

DIM, EXPERTS = 16, 24
SIZES = {"hidden_size": DIM, "num_experts_per_tok": 4}
DEEPSEEK = SIZES | {"n_routed_experts": EXPERTS, "n_group": 6, "topk_group": 3, "routed_scaling_factor": 2.5}


def mixtral(**_):
    return MixtralTopKRouter(MixtralConfig(**SIZES, num_local_experts=EXPERTS)), SoftmaxRouter(DIM, EXPERTS, 4)


def qwen(norm):
    theirs = Qwen3MoeTopKRouter(Qwen3MoeConfig(**SIZES, num_experts=EXPERTS, norm_topk_prob=norm))
    return theirs, SoftmaxRouter(DIM, EXPERTS, 4, renormalises=norm)


def olmoe(norm=False):
    theirs = OlmoeTopKRouter(OlmoeConfig(**SIZES, num_experts=EXPERTS, norm_topk_prob=norm))
    return theirs, SoftmaxRouter(DIM, EXPERTS, 4, renormalises=norm)


def gpt_oss():
    theirs = GptOssTopKRouter(GptOssConfig(**SIZES, num_local_experts=EXPERTS))
    return theirs, ChosenSoftmaxRouter(DIM, EXPERTS, 4, bias=True)


def deepseek(norm):
    theirs = DeepseekV3TopkRouter(DeepseekV3Config(**DEEPSEEK, norm_topk_prob=norm))
    return theirs, GroupedRouter(DIM, EXPERTS, 4, num_groups=6, top_groups=3, renormalises=norm, scale=2.5)


PAIRS = {
    "mixtral": mixtral,
    "qwen3_moe": lambda: qwen(True),
    "qwen3_moe_as_it_is": lambda: qwen(False),
    "olmoe": olmoe,
    "gpt_oss": gpt_oss,
    "deepseek": lambda: deepseek(True),
    "deepseek_as_it_is": lambda: deepseek(False),
}


def with_same_weights(theirs, ours):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.copy_(ours.get_parameter(name).normal_())
        if isinstance(ours, GroupedRouter):  # as large as scores differ, so that it decides
            theirs.e_score_correction_bias.copy_(ours.correction.normal_(std=0.3))
    return theirs, ours


def dense(weights, chosen):
    """[t, e]: the weight of each expert, 0 for those not chosen; the order of choices means nothing."""
    return torch.zeros(len(weights), EXPERTS).scatter(1, chosen, weights)


def both(theirs, ours):
    x = torch.randn(200, DIM, requires_grad=True, generator=torch.Generator().manual_seed(1))
    want, got = dense(*theirs(x)[1:]), dense(*ours.choose(ours(x)))
    found = {"weights": (got, want)}
    probe = torch.randn(got.shape)
    for name, p in {"x": x, **dict(theirs.named_parameters())}.items():
        own = x if name == "x" else ours.get_parameter(name)
        gradient = [torch.autograd.grad((w * probe).sum(), q, retain_graph=True)[0] for w, q in ((got, own), (want, p))]
        found[name] = tuple(gradient)
    return found


@pytest.mark.parametrize("make", PAIRS.values(), ids=PAIRS)
def test_weights_and_gradients_are_transformers(make):
    assert violations(both(*with_same_weights(*make()))) == {}


def test_llama4_is_transformers():
    theirs = Llama4Router(Llama4TextConfig(hidden_size=DIM, num_local_experts=EXPERTS, num_experts_per_tok=1))
    theirs, ours = with_same_weights(theirs, SigmoidRouter(DIM, EXPERTS, 1))
    x = torch.randn(200, DIM)
    assert violations({"weights": (dense(*ours.choose(ours(x))), theirs(x)[0])}) == {}


MISTAKES = {
    "groups": {"num_groups": 4},
    "top_groups": {"top_groups": 2},
    "renormalisation": {"renormalises": False},
    "scale": {"scale": 1.0},
    "k": {"top_k": 3},
}


@pytest.mark.parametrize("changes", MISTAKES.values(), ids=MISTAKES)
def test_bars_see_a_wrong_group_router(changes):
    theirs, ours = with_same_weights(*deepseek(True))
    vars(ours).update(changes)
    assert "weights" in violations(both(theirs, ours))


def test_bars_see_a_correction_in_the_weights():
    _, ours = with_same_weights(*deepseek(True))
    logits = ours(torch.randn(200, DIM))
    weights, chosen = ours.choose(logits)
    corrected = (logits.sigmoid() + ours.correction).gather(1, chosen)
    assert violations({"weights": (corrected / corrected.sum(-1, keepdim=True) * 2.5, weights)})


def test_bars_see_a_softmax_before_the_choice():
    theirs, _ = make = with_same_weights(*gpt_oss())
    early = SoftmaxRouter(DIM, EXPERTS, 4, renormalises=False)
    early.weight, early.bias = make[1].weight, make[1].bias
    assert "weights" in violations(both(theirs, early))


def test_bars_see_a_missing_renormalisation():
    theirs, ours = with_same_weights(*mixtral())
    ours.renormalises = False
    assert "weights" in violations(both(theirs, ours))
