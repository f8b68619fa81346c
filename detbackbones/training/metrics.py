"""metrics.json and the evaluations in it: an interruption loses none, and leaves no half line."""

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.engine import hooks
from detectron2.utils.events import EventWriter, get_event_storage

from ..weights import replacing

EVALUATED = "evaluation/seconds"  # is there for each iteration that was evaluated


class NewMetricsWriter(EventWriter):
    """Puts each metric once, those of an iteration together."""

    def __init__(self, window: int = 20):
        """
        Args:
            window: losses are medians over this many iterations.
        """
        self._window = window
        self._written: dict[str, int] = {}

    def put(self, iteration: int, metrics: dict[str, float]) -> None:
        """Write metrics of an iteration."""
        raise NotImplementedError

    def write(self) -> None:
        """Write what is new since the last call."""
        lines: dict[int, dict[str, Any]] = defaultdict(dict)
        latest = get_event_storage().latest_with_smoothing_hint(self._window)
        for name, (value, iteration) in latest.items():
            if iteration > self._written.get(name, -1):
                lines[iteration][name] = value
                self._written[name] = iteration
        for iteration, line in sorted(lines.items()):
            self.put(iteration, line)


class MetricsWriter(NewMetricsWriter):
    """detectron2's ``JSONWriter``, a line of JSON for each iteration, that may write one twice.

    What was measured before an evaluation is written before it, and the rest after it: detectron2's
    writes an iteration once.
    """

    def __init__(self, file: str | Path, window: int = 20):
        """
        Args:
            file: is continued if it exists.
            window: losses are medians over this many iterations.
        """
        super().__init__(window)
        self._file = open(file, "a")  # noqa: SIM115  closed by close()

    def put(self, iteration: int, metrics: dict[str, float]) -> None:
        """Write a line."""
        print(json.dumps({**metrics, "iteration": iteration}, sort_keys=True), file=self._file)

    def write(self) -> None:
        """Write what is new since the last call, to the disk."""
        super().write()
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class EvaluationHook(hooks.EvalHook):
    """detectron2's ``EvalHook``, which makes up for an evaluation that an interruption cut off."""

    def __init__(
        self,
        period: int,
        function: Callable[[], dict[str, Any]],
        *,
        before: Callable[[], None] | None = None,
        missed: bool = False,
    ):
        """
        Args:
            period: iterations from one evaluation to the next; 0 for one at the end alone.
            function: evaluates, and returns metrics by task and name.
            before: is called before it, such as to write what there is.
            missed: whether the iteration before the first one is to be evaluated.
        """
        super().__init__(period, function)
        self._before, self._missed = before, missed

    def _do_eval(self) -> None:
        if self._before:
            self._before()
        start = time.perf_counter()
        super()._do_eval()
        seconds = time.perf_counter() - start
        self.trainer.storage.put_scalar(EVALUATED, seconds, smoothing_hint=False)

    def after_train(self) -> None:
        """Evaluate at the end; for the same iteration where a resumed run had none to do."""
        self.trainer.storage.iter = min(self.trainer.iter, self.trainer.max_iter)
        super().after_train()

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
        metrics_file: what :class:`MetricsWriter` wrote, if anything.
        start: the iteration that a resumed run starts with.
        period: iterations from one evaluation to the next, or 0.
        max_iter: at the end of which there is an evaluation anyway.
    """
    if not period or not start or start % period or start >= max_iter:
        return False
    lines = _lines(metrics_file)
    return not any(line["iteration"] == start - 1 and EVALUATED in line for line in lines)


def cut_metrics(metrics_file: Path, start: int) -> None:
    """Leave out what an interrupted run wrote of the iterations that come again, and a cut line.

    Args:
        metrics_file: what :class:`MetricsWriter` wrote, if anything.
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
