"""The first row of a session says how long the first step was in coming."""

import pytest
import torch

from torchft.training import meter
from torchft.training.meter import Meter


def test_time_to_the_first_step_is_taken_at_it_and_reported_once(monkeypatch):
    clock = iter([7.5])  # asked once only
    monkeypatch.setattr(meter, "seconds_since_start", lambda: next(clock))
    told = Meter(torch.device("cpu"), flops_per_token=1.0)
    assert told.start_to_first_step_s is None
    rows = []
    for step in (1, 2, 3):
        told.add(torch.tensor(1.5), tokens=8, supervised=4)
        assert told.start_to_first_step_s == 7.5
        if step > 1:
            rows.append(told.row(step, lr=0.1, grad_norm=torch.tensor(1.0)))
    assert [row.get("start_to_first_step_s") for row in rows] == [7.5, None]
    assert [row["tokens"] for row in rows] == [16, 8]


def test_without_a_clock_of_the_process_nothing_is_claimed(monkeypatch):
    monkeypatch.setattr(meter, "seconds_since_start", lambda: None)
    told = Meter(torch.device("cpu"), flops_per_token=1.0)
    told.add(torch.tensor(1.5), tokens=8, supervised=4)
    assert "start_to_first_step_s" not in told.row(1, lr=0.1, grad_norm=torch.tensor(1.0))


@pytest.mark.gpu
def test_the_first_step_is_waited_for(monkeypatch):
    told = Meter(torch.device("cuda"), flops_per_token=1.0)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)  # half a second or so
    done = torch.cuda.Event()
    done.record()
    told.add(torch.ones((), device="cuda"), tokens=8, supervised=4)
    assert done.query()
