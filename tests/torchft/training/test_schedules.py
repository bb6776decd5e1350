"""Learning-rate sequences against transformers' schedulers and the papers' closed forms."""

import logging
import math

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from torchft.errors import UserError
from torchft.training import schedules

BASE = 3e-4


def optimizer(lr=BASE):
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=lr)


def sequence(schedule, steps):
    """The lr that each optimizer step uses."""
    lrs = []
    for _ in range(steps):
        lrs.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return lrs


def assert_same(ours, theirs):
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert abs(a - b) <= math.ulp(b), f"step {step}: {a} != {b}"


@pytest.mark.parametrize("total", [1, 7, 100])
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_equal_to_transformers(total, warmup):
    pairs = [
        (schedules.constant, get_constant_schedule_with_warmup(optimizer(), warmup)),
        (schedules.linear, get_linear_schedule_with_warmup(optimizer(), warmup, total)),
        (schedules.cosine, get_cosine_schedule_with_warmup(optimizer(), warmup, total)),
    ]
    for ours, theirs in pairs:
        mine = schedules.attach(optimizer(), ours(total_steps=total, warmup_steps=warmup))
        assert_same(sequence(mine, total), sequence(theirs, total))


def test_cosine_floor_equals_transformers():
    theirs = get_cosine_with_min_lr_schedule_with_warmup(optimizer(), 5, 50, min_lr_rate=0.1)
    factor = schedules.cosine(total_steps=50, warmup_steps=5, min_lr_share=0.1)
    assert_same(sequence(schedules.attach(optimizer(), factor), 50), sequence(theirs, 50))


@pytest.mark.parametrize("decay", ["1-sqrt", "linear"])
@pytest.mark.parametrize(("warmup", "floor"), [(5, 0.0), (0, 0.1)])  # theirs warms up from the floor, ours from 0
def test_wsd_equals_transformers(decay, warmup, floor):
    theirs = get_wsd_schedule(optimizer(), warmup, 12, num_training_steps=60, decay_type=decay, min_lr_ratio=floor)
    factor = schedules.wsd(total_steps=60, warmup_steps=warmup, decay_share=0.2, decay=decay, min_lr_share=floor)
    assert_same(sequence(schedules.attach(optimizer(), factor), 60), sequence(theirs, 60))


def test_rex_closed_form():
    factor = schedules.rex(total_steps=110, warmup_steps=10)
    for step in range(10, 111):
        t = (step - 10) / 100
        assert factor(step) == pytest.approx((1 - t) / (0.5 + 0.5 * (1 - t)), abs=1e-15)
    assert factor(60) == pytest.approx(2 / 3)  # halfway REX is at 2/3, where the line is at 1/2
    assert factor(110) == factor(500) == 0


def test_wsd_closed_form():
    factor = schedules.wsd(total_steps=100, decay_share=0.2)
    assert [factor(s) for s in (0, 50, 80, 85, 95, 100)] == pytest.approx([1, 1, 1, 0.5, 1 - math.sqrt(0.75), 0])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd", "rex"])
def test_resumed_lr_sequence_is_equal(name):
    """A lost schedule can't be seen in the first resumed loss, only in the lr."""
    factor = getattr(schedules, name)(total_steps=20, warmup_share=0.2)
    whole = sequence(schedules.attach(optimizer(), factor), 20)
    for step in (0, 1, 3, 4, 13, 20):
        assert sequence(schedules.attach(optimizer(), factor, step=step), 20 - step) == whole[step:]


def test_each_group_keeps_its_own_base():
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr} for lr in (1e-3, 1e-4)]
    opt = torch.optim.AdamW(groups)
    schedules.attach(opt, schedules.linear(total_steps=10), step=5)
    assert [g["lr"] for g in opt.param_groups] == [5e-4, 5e-5]


def test_bad_numbers_are_user_errors():
    with pytest.raises(UserError, match="not both"):
        schedules.cosine(total_steps=10, warmup_steps=2, warmup_share=0.1)
    with pytest.raises(UserError, match="min_lr_share must lie between 0 and 1, not 2"):
        schedules.cosine(total_steps=10, min_lr_share=2)
    with pytest.raises(UserError, match="total_steps"):
        schedules.linear(total_steps=0)


def test_warmup_longer_than_the_run_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        factor = schedules.cosine(total_steps=5, warmup_steps=100)
    assert "never ends" in caplog.text and factor(5) == 0.05
