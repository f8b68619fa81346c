"""What a run says, on the screen and in a file."""

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Iterator

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..data.mapper import DATA_ERRORS
from ..messages import first_line

# What ends a training that is no fault of the program: wrong images, a full disk, a loss of NaN.
RUN_ERRORS = (*DATA_ERRORS, FloatingPointError)

# What they say of an evaluation is in its metrics, and is left to the file.
QUIET = (
    "detbackbones.evaluation",
    "detectron2.data.common",
    "detectron2.evaluation.coco_evaluation",
    "detectron2.evaluation.fast_eval_api",
    "detectron2.evaluation.sem_seg_evaluation",
)
LOGGERS = ("detbackbones", "detectron2", "fvcore")
FORMAT = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"


@contextlib.contextmanager
def logging_to(folder: str) -> Iterator[None]:
    """Log to the screen and to ``log.txt`` in a folder, and after that as before.

    An error in a thread, such as TensorBoard's on a full disk, is a line. Left out is the traceback
    of :data:`RUN_ERRORS`, which detectron2 would log before the error is raised.
    """
    rank = comm.get_rank()
    os.makedirs(folder, exist_ok=True)  # another machine has none yet
    file = logging.FileHandler(os.path.join(folder, f"log.txt.rank{rank}" if rank else "log.txt"))
    file.setFormatter(logging.Formatter(FORMAT, "%m/%d %H:%M:%S"))
    loop = logging.getLogger("detectron2.engine.train_loop")
    changed = [*map(logging.getLogger, LOGGERS)]
    before = [(one, one.handlers[:], one.propagate, one.level) for one in changed]
    for name in LOGGERS:
        logging.getLogger(name).handlers.clear()
        # not by its cache, which takes a second call for the first one's
        own = setup_logger.__wrapped__(distributed_rank=rank, name=name, abbrev_name=name)
        for screen in own.handlers:
            screen.addFilter(_is_for_the_screen)
        own.addHandler(file)
    hook, threading.excepthook = threading.excepthook, _say_in_a_line
    loop.addFilter(_is_a_fault)
    try:
        with without_warnings_of_torch():
            yield
    finally:
        loop.removeFilter(_is_a_fault)
        threading.excepthook = hook
        for one, handlers, propagate, level in before:
            one.handlers[:], one.propagate = handlers, propagate
            one.setLevel(level)
        file.close()


@contextlib.contextmanager
def without_warnings_of_torch() -> Iterator[None]:
    """Leave out two warnings of torch's at what detectron2 does in every run."""
    tracing = logging.getLogger("torch.fx._symbolic_trace")
    level = tracing.level
    tracing.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.meshgrid: in an upcoming release")
            yield
    finally:
        tracing.setLevel(level)


def _is_for_the_screen(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name not in QUIET


def _is_a_fault(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], RUN_ERRORS))


def _say_in_a_line(thread: threading.ExceptHookArgs) -> None:
    logging.getLogger(__name__).warning(
        "%s: %s", thread.exc_type.__name__, first_line(thread.exc_value or thread.exc_type())
    )
