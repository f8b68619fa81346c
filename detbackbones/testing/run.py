"""The contract over many models, each in a process of its own."""

import gc
import logging
import multiprocessing
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing import connection
from typing import Any

import torch
from tqdm import tqdm

from .contract import POINTS, contract


def _child(sender: connection.Connection, row: dict[str, Any], max_params: float) -> None:
    warnings.simplefilter("ignore")
    logging.disable()
    contract(row, max_params, sender.send)


def run_contract(
    rows: Iterable[dict[str, Any]], jobs: int, time_limit: float, max_params: float
) -> Iterator[dict[str, Any]]:
    """Try models at the same time, each in a process of its own, so that a crash is but a row.

    The processes are forks of this one, which has imported all that they need; while they run,
    torch has one thread here.

    Args:
        rows: what :func:`new_row` gives for each model.
        jobs: how many at the same time.
        time_limit: seconds for a model.
        max_params: millions of parameters, above which no real numbers are used.

    Yields:
        the rows with what was found, each when it is done.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    tqdm.monitor_interval = 0  # nor would tqdm's
    gc.freeze()  # what is imported need not be searched for garbage in every fork
    fork = multiprocessing.get_context("fork")
    waiting = deque(rows)
    running = {}  # receiving end of the pipe -> process, deadline, last row that came
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                row = waiting.popleft()
                receiver, sender = fork.Pipe(duplex=False)
                process = fork.Process(target=_child, args=(sender, row, max_params), daemon=True)
                process.start()
                sender.close()  # or its end would not be seen when the process ends
                running[receiver] = process, time.monotonic() + time_limit, row
            first = min(deadline for _, deadline, _ in running.values())
            ready = connection.wait(running, max(0, first - time.monotonic()))
            for receiver, (process, deadline, row) in list(running.items()):
                if receiver in ready:
                    try:
                        running[receiver] = process, deadline, receiver.recv()
                        continue
                    except EOFError:
                        process.join()
                        why = f"its process ended with exit code {process.exitcode}"
                elif time.monotonic() >= deadline:
                    process.kill()
                    process.join()
                    why = f"not done after {time_limit:g} s"
                else:
                    continue
                del running[receiver]
                receiver.close()
                for point in POINTS:  # the first that is not there is the one under way
                    if point not in row["points"]:
                        row["points"][point], why = why, "skipped"
                row.setdefault("seconds", time_limit)
                yield row
    finally:
        for process, _, _ in running.values():
            process.kill()
        gc.unfreeze()
        torch.set_num_threads(threads)
