"""Ending a training between two iterations, when it is asked to by a signal."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SAME = 1.0  # seconds in which a signal counts once: a terminal and a launcher may both send it


class Interrupted(KeyboardInterrupt):
    """The training has ended before its time, with a checkpoint to continue from.

    Attributes:
        signum: the signal that asked for it.
    """

    def __init__(self, signum: int, iteration: int):
        name = signal.Signals(signum).name
        super().__init__(
            f"interrupted by {name} after iteration {iteration + 1}, of which there is a "
            "checkpoint: continue with --resume, or resume=True"
        )
        self.signum = signum


class InterruptHook(HookBase):
    """After a SIGINT or SIGTERM, ends the iteration or evaluation, and writes a checkpoint.

    A second signal ends the process at once. Outside of the main thread, where Python takes no
    signals, it does nothing.
    """

    def __init__(self, save: Callable[..., None]):
        """
        Args:
            save: takes the checkpoint's name and ``iteration``, that was just done.
        """
        self._save = save
        self._signum = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}
        self._pid = os.getpid()

    def before_train(self) -> None:
        """Take the signals."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def after_train(self) -> None:
        """Give them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, signum: int, frame: object) -> None:
        if os.getpid() != self._pid:  # a data loader's worker, which ends with its parent
            return
        now = time.monotonic()
        if self._signum and now - self._since > _SAME:
            self.after_train()
            os.kill(self._pid, signum)
        elif not self._signum:
            self._signum, self._since = signum, now

    def after_step(self) -> None:
        """End here if any process was asked to."""
        asked = torch.tensor(self._signum, device=self._device())
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if asked:
            self._end(int(asked))

    def check(self) -> None:
        """End an evaluation, which comes after a step, if this process was asked to."""
        if self._signum:
            self._end(self._signum)

    def _end(self, signum: int) -> None:
        # in the last evaluation the trainer counts one more
        done = min(self.trainer.iter, self.trainer.max_iter - 1)
        self.after_train()
        self._save(f"model_{done:07d}", iteration=done)
        raise Interrupted(signum, done)

    def _device(self) -> str:
        gpu = comm.get_world_size() > 1 and torch.distributed.get_backend() == "nccl"
        return "cuda" if gpu else "cpu"


@contextlib.contextmanager
def forwarding(pids: Callable[[], Iterable[int]]) -> Iterator[list[int]]:
    """Pass the signals on to other processes, and let them end.

    Args:
        pids: gives those of the processes.

    Yields:
        the signals that have come.
    """
    come: list[int] = []

    def forward(signum: int, frame: object) -> None:
        come.append(signum)
        for pid in pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    before = {number: signal.signal(number, forward) for number in SIGNALS}
    try:
        yield come
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
