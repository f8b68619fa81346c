r"""Train a detector from a LazyConfig, then evaluate it and draw what it predicts.

    detbackbones train --config-file finetune/faster_rcnn.py train.output_dir=output/mine \
        dataset.train_json=train.json dataset.train_images=images \
        dataset.val_json=val.json dataset.val_images=images

The config is a file, or one that comes with the package, by its name. The output folder gets
config.yaml, checkpoints, metrics.json, log.txt, and pictures: predictions.png, hardest.png,
errors.png, curves.png, and batch.png, which shows what the first batch was.
"""

import signal
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager

from detectron2.utils import comm
from omegaconf import DictConfig

from ..training.find_lr import find_lr
from ..training.interrupt import Interrupted
from ..training.log import RUN_ERRORS, logging_to
from ..training.output import reserved
from ..training.run import fit, prepare
from . import eval as evaluation
from .launch import WRONG_INPUT, add_arguments, start
from .program import fail, new_parser


def work(command: str, cfg: DictConfig, resume: bool) -> None:
    """What each process does; wrong input, and what may end a training, end it in one sentence."""
    try:
        with logging_to(cfg.train.output_dir):
            try:
                run = prepare(cfg, resume=resume)
            except WRONG_INPUT as error:
                fail(command, error)
            fit(run)
    except RUN_ERRORS as error:
        fail(command, error)
    except Interrupted as error:
        if comm.is_main_process():
            print(f"detbackbones {command}: {error}", file=sys.stderr)
        sys.exit(128 + error.signum)
    except KeyboardInterrupt:
        if comm.is_main_process():
            print(
                f"detbackbones {command}: ended at once by a second Ctrl-C; checkpoints written "
                "before are whole",
                file=sys.stderr,
            )
        sys.exit(128 + signal.SIGINT)


def find(command: str, cfg: DictConfig) -> None:
    """What each process does for --find-lr; wrong input and Ctrl-C end it in one sentence."""
    try:
        with logging_to(cfg.train.output_dir):
            find_lr(cfg)
    except (*WRONG_INPUT, *RUN_ERRORS) as error:
        fail(command, error)
    except KeyboardInterrupt:
        if comm.is_main_process():
            print(f"detbackbones {command}: interrupted by SIGINT", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def main(words: Sequence[str] | None = None) -> None:
    parser = new_parser("train", __doc__)
    add_arguments(parser)
    add = parser.add_argument
    add("--resume", action="store_true", help="continue the run in the output folder")
    add("--overwrite", action="store_true", help="replace the run in the output folder")
    add("--eval-only", action="store_true", help="evaluate, do not train: detbackbones eval")
    add("--find-lr", action="store_true", help="try learning rates, in 100 steps; do not train")
    args = parser.parse_intermixed_args(words)
    if args.find_lr:
        for other in ("resume", "overwrite", "eval_only"):
            if getattr(args, other):
                fail(
                    "train",
                    f"--find-lr must stand without --{other.replace('_', '-')}: it trains "
                    "and keeps nothing",
                )
        start("train", args, find)
        return
    if args.eval_only:
        start("train", args, evaluation.work)
        return

    def during(cfg: DictConfig) -> AbstractContextManager:
        return reserved(cfg, resume=args.resume, overwrite=args.overwrite)

    start("train", args, work, during, resume=args.resume)
