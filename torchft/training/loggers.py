"""Experiment trackers behind one small interface: ``log(step, values)`` and ``close()``.

A recipe makes those that its config names, and gives each the config with secrets redacted:

    trackers = Loggers(partial(node.build, run_id=run.id, output_dir=run.path, config=...) for node in metric_loggers)

A tracker that fails (network, disk, service) is dropped with one warning, and training goes on: metrics.jsonl has all.
"""

import importlib
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

from torchft.errors import UserError
from torchft.redact import redact

log = logging.getLogger(__name__)

Values = Mapping[str, float | int | None]


class Logger(Protocol):
    """What a recipe asks of a tracker, the user's own included."""

    def log(self, step: int, values: Values) -> None: ...

    def close(self) -> None: ...


class WandB:
    """Weights & Biases: ``pip install "torchft-recipes[wandb]"``, then ``wandb login``, or ``mode: offline``."""

    def __init__(
        self,
        *,
        run_id: str,
        output_dir: Path,
        config: dict[str, Any],
        project: str = "torchft",
        entity: str | None = None,
        name: str | None = None,
        mode: Literal["online", "offline"] | None = None,  # None: WANDB_MODE decides
    ) -> None:
        wandb = _extra("wandb", "wandb")
        where = {"project": project, "entity": entity, "name": name, "mode": mode, "dir": str(output_dir)}
        # no console, code or machine capture: what it would send is not redacted
        settings = wandb.Settings(console="off", disable_code=True, disable_git=True, x_disable_meta=True)
        self._run = wandb.init(id=run_id, resume="allow", config=config, settings=settings, **where)

    def log(self, step: int, values: Values) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """TensorBoard event files in ``output_dir/tensorboard``: ``pip install "torchft-recipes[tensorboard]"``."""

    def __init__(self, *, run_id: str, output_dir: Path, config: dict[str, Any]) -> None:
        _extra("tensorboard", "tensorboard")
        self._writer = _extra("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(output_dir / "tensorboard"))
        self._writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()), 0)

    def log(self, step: int, values: Values) -> None:
        for key, value in values.items():
            if value is not None:
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class MLflow:
    """MLflow, local or at ``tracking_uri``: ``pip install "torchft-recipes[mlflow]"``."""

    def __init__(
        self,
        *,
        run_id: str,
        output_dir: Path,
        config: dict[str, Any],
        experiment: str = "torchft",
        tracking_uri: str | None = None,
    ) -> None:
        mlflow = _extra("mlflow", "mlflow")
        mlflow.set_tracking_uri(tracking_uri or f"sqlite:///{output_dir}/mlflow.db")
        mlflow.set_experiment(experiment)
        same = mlflow.search_runs(filter_string=f"attributes.run_name = '{run_id}'", output_format="list")
        self._run = mlflow.start_run(run_name=run_id, run_id=same[0].info.run_id if same else None)
        if not same:
            mlflow.log_params({key: str(value)[:500] for key, value in config.items()})
        self._mlflow = mlflow

    def log(self, step: int, values: Values) -> None:
        self._mlflow.log_metrics({k: float(v) for k, v in values.items() if v is not None}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


class Loggers:
    """All trackers of a run. Each is dropped, with one warning, when it fails; a missing package is a UserError."""

    def __init__(self, builders: Iterable[Callable[[], Logger]]) -> None:
        self._loggers: list[Logger] = []
        for build in builders:
            try:
                self._loggers.append(build())
            except UserError:
                raise
            except Exception as e:  # another package's, of any kind
                _warn("a metric logger could not start", e)

    def log(self, step: int, values: Values) -> None:
        self._each(lambda logger: logger.log(step, values))

    def close(self) -> None:
        self._each(lambda logger: logger.close())

    def _each(self, action: Callable[[Logger], None]) -> None:
        for logger in list(self._loggers):
            try:
                action(logger)
            except Exception as e:  # another package's, and no tracker is worth a training run
                self._loggers.remove(logger)
                _warn(f"{type(logger).__name__} failed", e)


def _warn(what: str, error: Exception) -> None:
    log.warning("%s; the run goes on without it: %s: %s", what, type(error).__name__, redact(str(error)))


def _extra(module: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise UserError(f'this logger needs the package {extra}: pip install "torchft-recipes[{extra}]"') from None
