"""The best model of a run, and the end of a run that gets no better."""

import logging
import math
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from torch import nn

from ..messages import few
from ..weights import read_checkpoint, write_checkpoint
from .record import of_record

logger = logging.getLogger(__name__)

NAME = "model_best.pth"


class StoppedEarly(BaseException):
    """The training has ended before ``train.max_iter``, as ``train.patience`` asks.

    No ``Exception``, which detectron2's loop would log as a failure.

    Attributes:
        iteration: the last that was done.
    """

    def __init__(self, message: str, iteration: int):
        super().__init__(message)
        self.iteration = iteration


class BestModel(HookBase):
    """Writes ``model_best.pth`` whenever a metric is better than ever, and ends a run that waits.

    The file holds the evaluated weights, ``iteration``, ``metric`` and ``value``, and is where a
    resumed run reads what the best is. A value that is no number is never the best.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: str,
        metric: str | None = None,
        patience: int | None = None,
        record: dict[str, Any] | None = None,
    ):
        """
        Args:
            model: that is evaluated.
            folder: of the run.
            metric: whose highest value is the best, such as "bbox/AP"; by default the first that
                the evaluator gives. An evaluation without it is passed over with a warning.
            patience: iterations after the best one in which a better one must come, or the
                training ends; None is for ever.
            record: of the detector, for the file.
        """
        self._model, self._file = model, Path(folder, NAME)
        self._metric, self._patience, self._record = metric, patience, record
        self._value, self._iteration = -math.inf, -1

    def read(self, start: int) -> None:
        """Go on with the best of an interrupted run, which all processes have from the main one.

        Args:
            start: the iteration that this run starts with.

        Raises:
            ValueError: if the file is damaged, or its metric is another.
        """
        found = None
        if start and comm.is_main_process() and self._file.is_file():
            content = read_checkpoint(str(self._file))
            found = [content[key] for key in ("metric", "value", "iteration")]
        found = comm.all_gather(found)[0]
        if found is None:
            return
        metric, self._value, self._iteration = found
        if self._metric not in (None, metric):
            raise ValueError(
                f"train.best_metric={self._metric!r} must be {metric!r}, that of the interrupted "
                f"run's {self._file}"
            )
        self._metric = metric

    def update(self, results: dict, iteration: int) -> None:
        """Compare an evaluation, and write the model if it is the best.

        Args:
            results: metrics by task and name; in processes other than the main one nothing.
            iteration: that was just done.
        """
        metrics = comm.all_gather(dict(flatten_results_dict(results)) if results else {})[0]
        if not metrics:
            return
        if self._metric is None:
            self._metric = next(iter(metrics))
        if self._metric not in metrics:
            logger.warning(
                "train.best_metric=%r is not among %s: no model is the best by this evaluation",
                self._metric,
                few([*metrics]),
            )
            return
        value = float(metrics[self._metric])
        if not value > self._value:
            return
        if comm.is_main_process():
            before = f", before it {self._value:.4g} after {self._iteration + 1}"
            logger.info(
                "best model so far: %s %.4g after %d iterations%s: wrote %s",
                self._metric,
                value,
                iteration + 1,
                before if self._iteration >= 0 else "",
                self._file,
            )
            content = {"metric": self._metric, "value": value, "iteration": iteration}
            content |= of_record(self._record)
            write_checkpoint({"model": self._model.state_dict(), **content}, str(self._file))
        self._value, self._iteration = value, iteration

    def before_train(self) -> None:
        """End a run at once that is continued, and had ended."""
        self._check(self.trainer.start_iter - 1)

    def after_step(self) -> None:
        """End the training if it has waited for long enough."""
        self._check(self.trainer.iter)

    def _check(self, iteration: int) -> None:
        if (
            self._patience is not None
            and self._iteration >= 0
            and iteration - self._iteration >= self._patience
            and iteration + 1 < self.trainer.max_iter
        ):
            raise StoppedEarly(
                f"the training ends after {iteration + 1} iterations: {self._metric} was never "
                f"better than {self._value:.4g}, after {self._iteration + 1}",
                iteration,
            )
