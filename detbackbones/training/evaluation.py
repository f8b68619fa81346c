"""Evaluating during a training: none is lost to an interruption, and metrics.json stays whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.engine import hooks

from ..weights import replacing


class EvaluationHook(hooks.EvalHook):
    """detectron2's ``EvalHook``, which makes up for an evaluation that an interruption cut off."""

    def __init__(self, period: int, function: Callable[[], dict[str, Any]], missed: bool = False):
        """
        Args:
            period: iterations from one evaluation to the next; 0 for one at the end alone.
            function: evaluates, and returns metrics by task and name.
            missed: whether the iteration before the first one is to be evaluated.
        """
        super().__init__(period, function)
        self._missed = missed

    def before_train(self) -> None:
        """Evaluate what was missed, and record it for the iteration that it is of."""
        if self._missed:
            storage, start = self.trainer.storage, self.trainer.start_iter
            storage.iter = start - 1
            self._do_eval()
            storage.iter = start


def missed_evaluation(metrics_file: Path, start: int, period: int, max_iter: int) -> bool:
    """Whether the metrics of the iteration before ``start`` should be there, and are not.

    Args:
        metrics_file: what detectron2's ``JSONWriter`` wrote, if anything.
        start: the iteration that a resumed run starts with.
        period: iterations from one evaluation to the next, or 0.
        max_iter: at the end of which there is an evaluation anyway.
    """
    if not period or not start or start % period or start >= max_iter:
        return False
    return not any(
        line["iteration"] == start - 1 and any("/" in key for key in line)
        for line in _lines(metrics_file)
    )


def cut_metrics(metrics_file: Path, start: int) -> None:
    """Leave out what an interrupted run wrote of the iterations that come again, and a cut line.

    Args:
        metrics_file: what detectron2's ``JSONWriter`` wrote, if anything.
        start: the iteration that the resumed run starts with.
    """
    if metrics_file.is_file():
        lines = [line for line in _lines(metrics_file) if line["iteration"] < start]
        with replacing(str(metrics_file)) as temporary:
            text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
            Path(temporary).write_text(text)


def _lines(metrics_file: Path) -> list[dict[str, Any]]:
    lines = []
    for text in metrics_file.read_text().splitlines() if metrics_file.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:  # cut off by a kill
            continue
        if isinstance(line, dict) and isinstance(line.get("iteration"), int):
            lines.append(line)
    return lines
