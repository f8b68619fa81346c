"""Experiment trackers, which a run sends its metrics to where it is asked to."""

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..messages import first_line
from ..weights import replacing
from .metrics import NewMetricsWriter

logger = logging.getLogger(__name__)

RUNS = "trackers.json"  # of a run's folder: its names at the trackers, to continue them


class TrackerWriter(NewMetricsWriter):
    """Sends metrics to a tracker. Where it cannot, a warning says so once, and training goes on.

    Attributes:
        run: the name of the run at the tracker.
    """

    run: str
    _lost = False

    def write(self) -> None:
        """Send what is new."""
        try:
            super().write()
        except Exception as error:  # of a network, a server, a client
            if not self._lost:
                name = type(self).__name__
                logger.warning("%s cannot send metrics: %s", name, first_line(error))
            self._lost = True


class WandbWriter(TrackerWriter):
    """Sends metrics to Weights & Biases, online or as ``WANDB_MODE`` says."""

    def __init__(self, cfg: DictConfig, run: str | None):
        """
        Args:
            cfg: whose values are logged as the run's config.
            run: the name that an interrupted run had there.
        """
        super().__init__()
        import wandb

        folder = Path(cfg.train.output_dir)
        self._run = wandb.init(
            project="detbackbones",
            name=folder.resolve().name,
            dir=str(folder),
            config=_settings(cfg),
            id=run,
            resume="allow",
        )
        self.run = self._run.id

    def put(self, iteration: int, metrics: dict[str, float]) -> None:
        """Send the metrics of an iteration."""
        self._run.log(metrics, step=iteration)

    def close(self) -> None:
        """End the run there."""
        self._run.finish()


class MLflowWriter(TrackerWriter):
    """Sends metrics to MLflow, to where ``MLFLOW_TRACKING_URI`` says.

    A run that is open already, as in a notebook, gets them, and stays open.
    """

    def __init__(self, cfg: DictConfig, run: str | None):
        """
        Args:
            cfg: whose values are logged as the run's parameters.
            run: the name that an interrupted run had there.
        """
        super().__init__()
        import mlflow

        self._mlflow = mlflow
        active = mlflow.active_run()
        self._own = active is None
        if active is None:
            if run is None and "MLFLOW_EXPERIMENT_NAME" not in os.environ:
                mlflow.set_experiment("detbackbones")
            name = Path(cfg.train.output_dir).resolve().name
            active = mlflow.start_run(run_id=run, run_name=name)
        self.run = active.info.run_id
        if run is None:
            values = {key: str(value)[:500] for key, value in _settings(cfg).items()}
            mlflow.log_params({_allowed(key): value for key, value in values.items()})

    def put(self, iteration: int, metrics: dict[str, float]) -> None:
        """Send the metrics of an iteration."""
        named = {_allowed(name): value for name, value in metrics.items()}
        self._mlflow.log_metrics(named, step=iteration, run_id=self.run)

    def close(self) -> None:
        """End the run there."""
        if self._own:
            self._mlflow.end_run()


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """The values of a config, by their keys with dots."""

    def walk(node: Any, key: str) -> Iterator[tuple[str, Any]]:
        if isinstance(node, dict):
            for name, value in node.items():
                yield from walk(value, f"{key}.{name}" if key else str(name))
        else:
            yield key, node if isinstance(node, int | float | bool | None) else str(node)

    return dict(walk(OmegaConf.to_container(cfg), ""))


def _allowed(name: str) -> str:
    """A name of the letters that MLflow takes."""
    return re.sub(r"[^\w\-. /]", "_", name)


TRACKERS: dict[str, type[TrackerWriter]] = {"wandb": WandbWriter, "mlflow": MLflowWriter}


def build_trackers(cfg: DictConfig, *, resume: bool) -> Sequence[NewMetricsWriter]:
    """The writers of ``train.trackers``; a run that is continued goes on there, too.

    Args:
        cfg: the config.
        resume: whether the run is continued.

    Raises:
        ImportError: if a tracker is not installed.
        ConnectionError: if it cannot start a run.
    """
    file = Path(cfg.train.output_dir, RUNS)
    runs = json.loads(file.read_text()) if resume and file.is_file() else {}
    writers = {}
    for name in cfg.train.trackers:
        try:
            writers[name] = TRACKERS[name](cfg, runs.get(name))
        except ImportError as error:
            raise ImportError(
                f"train.trackers={[*cfg.train.trackers]} needs {error.name}: pip install "
                "'.[track]', or wandb or mlflow-skinny alone"
            ) from error
        except Exception as error:  # theirs are of all kinds
            raise ConnectionError(
                f"train.trackers={[*cfg.train.trackers]}: {name} cannot start a run: "
                f"{first_line(error)}"
            ) from error
    if writers:
        with replacing(str(file)) as temporary:
            Path(temporary).write_text(json.dumps({name: w.run for name, w in writers.items()}))
    return [*writers.values()]
