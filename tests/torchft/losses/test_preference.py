"""Preference losses in fp64 against closed forms and TRL's trainers: values, rewards and every gradient."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import DPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

from torchft.errors import UserError
from torchft.losses import preference
from torchft.losses.documents import desensitised, document_sums
from torchft.losses.likelihood import IGNORE

BETA, SMOOTHING = 0.3, 0.2
LENGTHS = [7, 4, 9, 5, 6, 8]  # tokens of the answers of three pairs: chosen, then rejected


def token_logps(seed, lengths=LENGTHS):
    """[answers, longest] fp64 log-probabilities, padded by 0."""
    g = torch.Generator().manual_seed(seed)
    logps = -torch.rand(len(lengths), max(lengths), generator=g, dtype=torch.float64) * 2 - 1e-3
    return logps * (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


def pairs(seed=0):
    """Policy's and reference's sums [3] x 4, leaves of autograd, and the answers' lengths."""
    policy, reference = (token_logps(s).sum(1) for s in (seed, seed + 100))
    lengths = torch.tensor(LENGTHS)
    leaves = [x.clone().requires_grad_() for x in (*policy.chunk(2), *reference.chunk(2))]
    return leaves, {"chosen_lengths": lengths[:3], "rejected_lengths": lengths[3:]}


class Accelerator:
    device = torch.device("cpu")

    def gather_for_metrics(self, x):
        return x

    gather = gather_for_metrics


def trainer(**settings):
    """What a TRL trainer's loss reads of itself."""
    return SimpleNamespace(
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        aux_loss_enabled=False,
        **settings,
    )


def outputs(logps, collisions=None):
    zeros = torch.zeros_like(logps)
    return SimpleNamespace(
        log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), log_sum_sq_probs=collisions
    )


def trl_dpo(loss_type, policy, reference, lengths, *, smoothing=0.0, ld_alpha=None, collisions=None):
    """TRL's loss of one pair [2, s] of token log-probabilities, and its rewards."""
    mask = (torch.arange(policy.shape[1] + 1) > 0) & (
        torch.arange(policy.shape[1] + 1) <= torch.tensor(lengths)[:, None]
    )
    sums = reference.sum(1) if ld_alpha is None else shortened(reference, lengths, ld_alpha)
    stub = trainer(
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=BETA,
        label_smoothing=smoothing,
        ld_alpha=ld_alpha,
        f_divergence_type="reverse_kl",
        precompute_ref_logps=True,
        use_weighting=collisions is not None,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask, dtype=torch.long),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask.long(),
        "ref_chosen_logps": sums[:1],
        "ref_rejected_logps": sums[1:],
    }
    loss = DPOTrainer._compute_loss(stub, lambda **_: outputs(policy, collisions), inputs, False)
    metrics = stub._metrics["train"]
    return loss, metrics["rewards/chosen"][0], metrics["rewards/rejected"][0]


def shortened(logps, lengths, alpha):
    """Sums in which tokens beyond the shorter answer's length count alpha."""
    beyond = torch.arange(logps.shape[1]) >= min(lengths)
    return torch.where(beyond, alpha * logps, logps).sum(1)


@pytest.mark.parametrize(
    ("name", "loss_type", "smoothing"),
    [
        ("dpo", "sigmoid", None),
        ("dpo_normalised", "sigmoid_norm", None),
        ("robust", "robust", SMOOTHING),
        ("ipo", "ipo", None),
        ("hinge", "hinge", None),
        ("nca", "nca_pair", None),
        ("bco", "bco_pair", None),
    ],
)
def test_losses_with_a_reference_are_trls(name, loss_type, smoothing):
    """Every pair's loss, rewards, and the gradient of each of its tokens."""
    policy, reference = token_logps(0).requires_grad_(), token_logps(100)
    lengths = torch.tensor(LENGTHS)
    options = {} if smoothing is None else {"label_smoothing": smoothing}
    if name in ("ipo", "dpo_normalised"):
        options |= {"chosen_lengths": lengths[:3], "rejected_lengths": lengths[3:]}
    losses, chosen, rejected = vars(preference)[name](
        *policy.sum(1).chunk(2), *reference.sum(1).chunk(2), beta=BETA, **options
    )
    (grad,) = torch.autograd.grad(losses.sum(), policy)
    for i in range(3):
        pair = [i, i + 3]
        theirs = policy.detach()[pair].requires_grad_()
        loss, reward_chosen, reward_rejected = trl_dpo(
            loss_type, theirs, reference[pair], lengths[pair].tolist(), smoothing=smoothing or 0.0
        )
        assert abs(losses[i] - loss) <= 1e-10
        if name not in ("ipo", "dpo_normalised"):  # of which TRL logs rewards of sums
            assert abs(chosen[i] - reward_chosen) <= 1e-10 and abs(rejected[i] - reward_rejected) <= 1e-10
        (want,) = torch.autograd.grad(loss, theirs)
        assert (grad[pair] - want).abs().max() <= 1e-10 and want.abs().max() > 1e-3


def closed_dpo(pc, pr, rc, rr):
    odds = math.exp(BETA * ((pc - rc) - (pr - rr)))
    return math.log(1 + 1 / odds)


def test_dpo_closed_form():
    """And with smoothed labels, which TRL's sigmoid loss does not have."""
    leaves, _ = pairs()
    plain, chosen, rejected = preference.dpo(*leaves, beta=BETA)
    smooth, _, _ = preference.dpo(*leaves, beta=BETA, label_smoothing=SMOOTHING)
    grads = torch.autograd.grad(smooth.sum(), leaves)
    for i, values in enumerate(zip(*(x.tolist() for x in leaves))):
        pc, pr, rc, rr = values
        assert abs(plain[i].item() - closed_dpo(*values)) <= 1e-10
        flipped = closed_dpo(pr, pc, rr, rc)
        assert abs(smooth[i].item() - (0.8 * closed_dpo(*values) + 0.2 * flipped)) <= 1e-10
        assert abs(chosen[i].item() - BETA * (pc - rc)) <= 1e-10
        assert abs(rejected[i].item() - BETA * (pr - rr)) <= 1e-10
        slope = BETA * (1 / (1 + math.exp(-BETA * ((pc - rc) - (pr - rr)))) - 0.8)
        for grad, sign in zip(grads, (1, -1, -1, 1)):
            assert abs(grad[i].item() - sign * slope) <= 1e-10


def test_a_policy_that_is_the_reference():
    """No margin: ln 2, no reward, and beta / 2 of gradient that pushes the answers apart."""
    (pc, pr, _, _), _ = pairs()
    for name in ("dpo", "dpo_normalised", "robust"):  # of means, where no length is given
        loss = vars(preference)[name]
        options = {"label_smoothing": 0.1} if name == "robust" else {}
        losses, chosen, rejected = loss(pc, pr, pc.detach(), pr.detach(), beta=BETA, **options)
        assert (losses - math.log(2)).abs().max() <= 1e-10
        assert chosen.abs().max() == rejected.abs().max() == 0
        up, down = torch.autograd.grad(losses.sum(), (pc, pr), retain_graph=True)
        slope = BETA / 2 / (1 - 2 * options.get("label_smoothing", 0.0))
        assert (up + slope).abs().max() <= 1e-10 and (down - slope).abs().max() <= 1e-10


def test_swapped_answers_are_antisymmetric():
    """The margin changes its sign, and with it what the loss says: l(m) - l(-m) = -m for the logistic one."""
    (pc, pr, rc, rr), lengths = pairs()
    swapped_lengths = {"chosen_lengths": lengths["rejected_lengths"], "rejected_lengths": lengths["chosen_lengths"]}
    for name, options, back in (
        ("dpo", {}, {}),
        ("dpo_normalised", lengths, swapped_lengths),
        ("simpo", {"gamma": 0.0} | lengths, {"gamma": 0.0} | swapped_lengths),
    ):
        loss = vars(preference)[name]
        others = ([], []) if name == "simpo" else ([rc, rr], [rr, rc])
        one, chosen, rejected = loss(pc, pr, *others[0], beta=BETA, **options)
        other, chosen_swapped, rejected_swapped = loss(pr, pc, *others[1], beta=BETA, **back)
        assert (chosen - rejected_swapped).abs().max() == (rejected - chosen_swapped).abs().max() == 0
        assert (one - other + (chosen - rejected)).abs().max() <= 1e-10
        grad, grad_swapped = (torch.autograd.grad(x.sum(), pc, retain_graph=True)[0] for x in (one, other))
        slope = BETA if name == "dpo" else BETA / lengths["chosen_lengths"].double()
        assert (grad - grad_swapped + slope).abs().max() <= 1e-10


@pytest.mark.parametrize("smoothing", [0.0, SMOOTHING])
def test_losses_without_a_reference_are_trls(smoothing):
    (pc, pr, _, _), lengths = pairs()
    means = [pc / lengths["chosen_lengths"], pr / lengths["rejected_lengths"]]
    gamma = 0.7
    for name, loss_type, options, theirs in (
        ("simpo", "simpo", {"gamma": gamma} | lengths, means),
        ("cpo", "sigmoid", {"nll_weight": 0.0}, [pc, pr]),
    ):
        stub = trainer(loss_type=loss_type, alpha=0.0, beta=BETA, simpo_gamma=gamma, label_smoothing=smoothing)
        want = CPOTrainer.cpo_loss(stub, *theirs)
        got = vars(preference)[name](pc, pr, beta=BETA, label_smoothing=smoothing, **options)
        for ours, trl in zip(got, want, strict=True):
            assert (ours - trl).abs().max() <= 1e-10
        grads = [torch.autograd.grad(x.sum(), (pc, pr), retain_graph=True) for x in (got[0], want[0])]
        assert all((a - b).abs().max() <= 1e-10 and b.abs().max() > 1e-3 for a, b in zip(*grads))


def test_orpo():
    """TRL computes it in fp32; the closed form in fp64 has p / (1 - p) as it stands."""
    (pc, pr, _, _), lengths = pairs()
    losses, chosen, rejected = preference.orpo(pc, pr, beta=BETA, nll_weight=0.0, **lengths)
    means = [pc / lengths["chosen_lengths"], pr / lengths["rejected_lengths"]]
    theirs, trl_chosen, trl_rejected, _, _ = ORPOTrainer.odds_ratio_loss(trainer(beta=BETA), *means)
    assert (losses + theirs).abs().max() <= 1e-6  # which it then subtracts
    assert (chosen - trl_chosen).abs().max() <= 1e-6 and (rejected - trl_rejected).abs().max() <= 1e-6
    odds = [(m.exp() / (1 - m.exp())) for m in means]
    closed = -BETA * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))
    whole, _, _ = preference.orpo(pc, pr, beta=BETA, **lengths)
    assert (losses - closed).abs().max() <= 1e-10 and (whole - closed + means[0]).abs().max() <= 1e-10
    grads = [torch.autograd.grad(x.sum(), (pc, pr), retain_graph=True) for x in (whole, closed - means[0])]
    assert all((a - b).abs().max() <= 1e-10 for a, b in zip(*grads))
    sure = torch.tensor([-1e-9], requires_grad=True)  # nearly certain, in fp32
    (grad,) = torch.autograd.grad(preference.orpo(sure, sure.detach() - 1, beta=BETA)[0].sum(), sure)
    assert grad.isfinite().all()


def test_cpo_adds_the_chosen_answers_likelihood():
    (pc, pr, _, _), lengths = pairs()
    margin, _, _ = preference.cpo(pc, pr, beta=BETA, nll_weight=0.0)
    of_sums, _, _ = preference.cpo(pc, pr, beta=BETA, nll_weight=0.5)
    of_means, _, _ = preference.cpo(pc, pr, beta=BETA, nll_weight=0.5, chosen_lengths=lengths["chosen_lengths"])
    assert (of_sums - margin + 0.5 * pc).abs().max() <= 1e-10
    assert (of_means - margin + 0.5 * pc / lengths["chosen_lengths"]).abs().max() <= 1e-10


def test_rpo_term_is_trls_sft_loss_of_one_pair():
    policy, reference = token_logps(0), token_logps(100)
    ours = preference.chosen_nll(policy.sum(1)[:3], torch.tensor(LENGTHS[:3]))
    for i in range(3):
        loss, _, _ = trl_dpo("sft", policy[[i, i + 3]], reference[[i, i + 3]], [LENGTHS[i], LENGTHS[i + 3]])
        assert abs(ours[i] - loss) <= 1e-10


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.6)])
def test_kto_is_trls(weights):
    """Good and bad answers with a KL estimate; TRL's loss is their mean, chosen ones first."""
    policy, reference, strangers = token_logps(0).requires_grad_(), token_logps(100), token_logps(50) + 0.5
    is_desirable = torch.tensor([True, False, True, True, False, False])
    mask = (torch.arange(10) > 0) & (torch.arange(10) <= torch.tensor(LENGTHS)[:, None])
    kl_policy, kl_reference = strangers.sum(1), (strangers - 0.01).sum(1)
    stub = trainer(
        loss_type="kto",
        beta=BETA,
        calculate_KL=True,
        precompute_ref_logps=True,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _compute_kl_logps=lambda model, batch: kl_policy,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask, dtype=torch.long),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask.long(),
        "label": is_desirable,
        "ref_logps": reference.sum(1),
        "ref_KL_logps": kl_reference,
    }
    theirs = KTOTrainer._compute_loss(stub, lambda **_: outputs(policy), inputs, False)
    kl = (kl_policy - kl_reference).mean().clamp(min=0)
    assert kl > 0.05
    losses, rewards = preference.kto(
        policy.sum(1), reference.sum(1), is_desirable, kl, beta=BETA,
        desirable_weight=weights[0], undesirable_weight=weights[1],
    )  # fmt: skip
    assert abs(losses.mean() - theirs) <= 1e-10
    assert abs(rewards[is_desirable].mean() - stub._metrics["train"]["rewards/chosen"][0]) <= 1e-10
    grads = [torch.autograd.grad(x, policy, retain_graph=True)[0] for x in (losses.mean(), theirs)]
    assert (grads[0] - grads[1]).abs().max() <= 1e-10 and grads[1].abs().max() > 1e-3


def test_wpo_weights_are_trls():
    policy, reference, collisions = token_logps(0).requires_grad_(), token_logps(100), token_logps(200)
    lengths = torch.tensor(LENGTHS)
    sums = [x.sum(1).view(2, 3).T for x in (policy, collisions, lengths[:, None])]
    losses, _, _ = preference.dpo(*policy.sum(1).chunk(2), *reference.sum(1).chunk(2), beta=BETA)
    losses = losses * preference.wpo_weights(*sums)
    (grad,) = torch.autograd.grad(losses.sum(), policy)
    for i in range(3):
        pair = [i, i + 3]
        theirs = policy.detach()[pair].requires_grad_()
        loss, _, _ = trl_dpo("sigmoid", theirs, reference[pair], lengths[pair].tolist(), collisions=collisions[pair])
        assert abs(losses[i] - loss) <= 1e-10
        (want,) = torch.autograd.grad(loss, theirs)
        assert (grad[pair] - want).abs().max() <= 1e-10 and want.abs().max() > 1e-3


def test_length_desensitised_dpo_is_trls():
    """Rows of documents as a batch has them: a prompt of ragged length before each answer, a padding behind."""
    policy, reference = token_logps(0).requires_grad_(), token_logps(100)
    prompts = [1, 3, 2, 4, 1, 2]
    order = [0, 3, 1, 4, 2, 5]  # pair by pair
    values, others, labels, positions = [], [], [], []
    for i in order:
        n, prompt = LENGTHS[i], torch.zeros(prompts[i], dtype=torch.float64)
        values.append(torch.cat([prompt[1:], policy[i, :n], prompt[:1]]))  # the last token predicts nothing
        others.append(torch.cat([prompt[1:], reference[i, :n], prompt[:1]]))
        labels += [IGNORE] * (prompts[i] - 1) + [1] * n + [IGNORE]
        positions += list(range(prompts[i] + n))
    padding = -len(positions) % 2
    labels, positions = labels + [IGNORE] * padding, positions + list(range(padding))
    values, others = (torch.cat([*x, torch.zeros(padding, dtype=torch.float64)])[None] for x in (values, others))
    labels, positions = torch.tensor([labels]), torch.tensor([positions])
    pairs, count = torch.arange(6).view(3, 2), 6 + bool(padding)
    sums = [
        document_sums(desensitised(x, labels, positions, count, pairs, alpha=0.4), positions, count)[pairs]
        for x in (values, others)
    ]
    losses, _, _ = preference.dpo(*sums[0].unbind(1), *sums[1].unbind(1), beta=BETA)
    (grad,) = torch.autograd.grad(losses.sum(), policy)
    for i in range(3):
        pair, lengths = [i, i + 3], [LENGTHS[i], LENGTHS[i + 3]]
        theirs = policy.detach()[pair].requires_grad_()
        loss, _, _ = trl_dpo("sigmoid", theirs, reference[pair], lengths, ld_alpha=0.4)
        assert abs(losses[i] - loss) <= 1e-10
        (want,) = torch.autograd.grad(loss, theirs)
        want = want * (policy.detach()[pair] != 0)  # not of padding
        assert (grad[pair] - want).abs().max() <= 1e-10 and want.abs().max() > 1e-3


def test_bco_moves_what_counts_as_good():
    leaves, _ = pairs()
    losses, chosen, rejected = preference.bco(*leaves, beta=BETA, delta=0.4)
    closed = torch.log1p(torch.exp(0.4 - chosen)) + torch.log1p(torch.exp(rejected - 0.4))
    assert (losses - closed).abs().max() <= 1e-10


def test_labels_that_say_nothing_are_refused():
    leaves, _ = pairs()
    with pytest.raises(UserError, match=r"label_smoothing: 0.5 must be at least 0 and below 0.5"):
        preference.robust(*leaves, beta=BETA, label_smoothing=0.5)
