"""Steps that are not finite are left out and counted, or end the run; a loss that leaps is said."""

import json
import math

import pytest
import torch
from torch import nn

from torchft.errors import UserError
from torchft.training import guard
from torchft.training.guard import Guard, GuardConfig


def look(guard, step, loss, *, grad=1.0):
    model = nn.Linear(2, 2)
    model.weight.grad = torch.full((2, 2), grad)
    norm = model.weight.grad.norm()
    return guard.allows(step, loss=torch.tensor(loss), grad_norm=norm, model=model, rows=(f"f:{step}" for _ in "ab"))


@pytest.mark.parametrize(("loss", "grad"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_n1_n2_what_is_not_finite_stops_or_is_left_out(loss, grad, caplog):
    with pytest.raises(UserError, match=r"step 1: .*not finite.*f:1"):
        look(Guard(GuardConfig()), 1, loss, grad=grad)
    skips = Guard(GuardConfig(not_finite="skip"))
    assert look(skips, 1, 1.0) and not look(skips, 2, loss, grad=grad) and look(skips, 3, 1.0)
    assert skips.skipped == 1 and "step left out, 1 so far: step 2" in caplog.text


def test_too_many_skips_on_end_stop():
    skips = Guard(GuardConfig(not_finite="skip"))
    for step in range(5):
        assert not look(skips, step, math.nan)
    assert look(skips, 5, 1.0)
    for step in range(guard.MOST_SKIPS):
        assert not look(skips, step, math.nan)
    resumed = Guard(GuardConfig(not_finite="skip"))
    resumed.load_state_dict(skips.state_dict())
    assert resumed.skipped == 5 + guard.MOST_SKIPS
    with pytest.raises(UserError, match=f"{guard.MOST_SKIPS + 1} steps on end"):
        look(resumed, 99, math.nan)
    with pytest.raises(UserError, match=f"{guard.MOST_SKIPS + 1} steps on end"):
        look(skips, 99, math.nan)


def leaps(config, losses):
    """Of a run that is resumed before every step."""
    watch = Guard(config)
    for step, loss in enumerate([1.0] * 50 + [3.0] * 50 + losses):  # mean 2
        state = json.loads(json.dumps(watch.state_dict()))
        watch = Guard(config)
        watch.load_state_dict(state)
        assert look(watch, step, loss)


def test_n3_a_leap_is_said_after_some_steps(caplog):
    leaps(GuardConfig(), [4.1] * 3 + [3.9] + [4.1] * 3)
    assert not caplog.text
    leaps(GuardConfig(), [4.1] * 4)
    assert caplog.text.count("the loss has been over 2 times its mean (4) for 4 steps, now 4.1") == 1
    assert "f:103" in caplog.text
    caplog.clear()
    leaps(GuardConfig(), [4.1] * 8)
    assert caplog.text.count("the loss has been over") == 2  # and again while it lasts
    caplog.clear()
    leaps(GuardConfig(spike="ignore"), [100.0] * 9)
    leaps(GuardConfig(spike_factor=3.0), [5.9] * 9)
    assert not caplog.text
    with pytest.raises(UserError, match=r"for 2 steps, now 4\.1"):
        leaps(GuardConfig(spike="stop", spike_steps=2), [4.1] * 2)


def test_the_first_steps_are_not_compared(caplog):
    watch = Guard(GuardConfig(spike="stop", spike_steps=1))
    for step, loss in enumerate([1.0] * 99 + [100.0]):
        look(watch, step, loss)
    assert not caplog.text
