r"""Evaluate a trained detector, and draw what it predicts.

    detbackbones eval --config-file output/mine/config.yaml
    detbackbones eval --config-file output/mine/config.yaml \
        train.init_checkpoint=output/mine/model_0004999.pth

What is evaluated is train.init_checkpoint, or else the last checkpoint in train.output_dir. The
config.yaml that a training wrote has all that the training was told.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence

from detectron2.utils import comm
from omegaconf import DictConfig

from ..training.interrupt import SIGNALS
from ..training.run import evaluate
from .launch import WRONG_INPUT, add_arguments, start
from .program import fail, new_parser


def work(command: str, cfg: DictConfig) -> None:
    """What each process does; wrong input, Ctrl-C and SIGTERM end it with one sentence."""
    pid = os.getpid()

    def end(signum: int, frame: object) -> None:
        if os.getpid() == pid:  # and not in a data loader's process
            for child in multiprocessing.active_children():
                child.kill()
            if comm.is_main_process():
                name = signal.Signals(signum).name
                print(f"detbackbones {command}: interrupted by {name}", file=sys.stderr, flush=True)
        os._exit(128 + signum)

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        evaluate(cfg)
    except WRONG_INPUT as error:
        fail(command, error)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(words: Sequence[str] | None = None) -> None:
    parser = new_parser("eval", __doc__)
    add_arguments(parser)
    start("eval", parser.parse_intermixed_args(words), work, trains=False)
