"""Trackers: what arrives in TensorBoard's own files, and what happens when a tracker is missing or fails."""

import logging
from functools import partial

import pytest

from torchft.errors import UserError
from torchft.training.loggers import Loggers, MLflow, TensorBoard, WandB

SECRET = "hf_" + "a" * 34


def common(tmp_path):
    return {"run_id": "run-1", "output_dir": tmp_path, "config": {"lr": 0.1, "token": "<redacted>"}}


def test_tensorboard_holds_what_was_logged(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = Loggers([partial(TensorBoard, **common(tmp_path))])
    loggers.log(3, {"loss": 0.5, "mfu": None})
    loggers.log(4, {"loss": 0.25})
    loggers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 0.5), (4, 0.25)]
    assert "mfu" not in events.Tags()["scalars"]


@pytest.mark.parametrize(("tracker", "extra"), [(WandB, "wandb"), (MLflow, "mlflow"), (TensorBoard, "tensorboard")])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, tracker, extra):
    import sys

    monkeypatch.setitem(sys.modules, extra, None)  # as if it were not installed
    with pytest.raises(UserError, match=rf'pip install "torchft-recipes\[{extra}\]"'):
        Loggers([partial(tracker, **common(tmp_path))])


class Broken:
    def __init__(self, at):
        self.at, self.steps = at, []
        if at == 0:
            raise ConnectionError(f"no route; key {SECRET}")

    def log(self, step, values):
        if step == self.at:
            raise TimeoutError(f"https://me:{SECRET}@host did not answer")
        self.steps.append(step)

    def close(self):
        self.steps.append("closed")


@pytest.mark.parametrize("at", [0, 2])
def test_r6_s9_failure_costs_one_warning_without_secrets(caplog, at):
    good = Broken(None)
    with caplog.at_level(logging.WARNING):
        loggers = Loggers([lambda: Broken(at), lambda: good])
        for step in range(1, 5):
            loggers.log(step, {"loss": 1.0})
        loggers.close()
    assert good.steps == [1, 2, 3, 4, "closed"]
    assert caplog.text.count("the run goes on without it") == 1 and SECRET not in caplog.text
