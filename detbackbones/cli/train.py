r"""Train a detector from a LazyConfig, then evaluate it and draw what it predicts.

    detbackbones train --config-file finetune/faster_rcnn.py train.output_dir=output/mine \
        dataset.train_json=train.json dataset.train_images=images \
        dataset.val_json=val.json dataset.val_images=images

The config is a file, or one that comes with the package, by its name. The output folder gets
config.yaml, checkpoints, metrics.json, log.txt, predictions.png and curves.png.
"""

from collections.abc import Sequence

from omegaconf import DictConfig

from ..data.mapper import DATA_ERRORS
from ..training.log import logging_to
from ..training.run import fit, prepare, prepare_output
from . import eval as evaluation
from .launch import WRONG_INPUT, add_arguments, start
from .program import fail, new_parser


def work(command: str, cfg: DictConfig, resume: bool) -> None:
    """What each process does; wrong input ends it with one sentence."""
    with logging_to(cfg.train.output_dir):
        try:
            run = prepare(cfg, resume=resume)
        except WRONG_INPUT as error:
            fail(command, error)
        try:
            fit(run)
        except DATA_ERRORS as error:
            fail(command, error)


def main(words: Sequence[str] | None = None) -> None:
    parser = new_parser("train", __doc__)
    add_arguments(parser)
    add = parser.add_argument
    add("--resume", action="store_true", help="continue the run in the output folder")
    add("--overwrite", action="store_true", help="replace the run in the output folder")
    add("--eval-only", action="store_true", help="evaluate, do not train: detbackbones eval")
    args = parser.parse_intermixed_args(words)
    if args.eval_only:
        start("train", args, evaluation.work)
        return

    def before(cfg: DictConfig) -> None:
        prepare_output(cfg, resume=args.resume, overwrite=args.overwrite)

    start("train", args, work, before, resume=args.resume)
