r"""Evaluate a trained detector, and draw what it predicts.

    detbackbones eval --config-file output/mine/config.yaml
    detbackbones eval --config-file output/mine/config.yaml \
        train.init_checkpoint=output/mine/model_0004999.pth

What is evaluated is train.init_checkpoint, or else the last checkpoint in train.output_dir. The
config.yaml that a training wrote has all that the training was told.
"""

from collections.abc import Sequence

from omegaconf import DictConfig

from ..training.run import evaluate
from .launch import WRONG_INPUT, add_arguments, start
from .program import fail, new_parser


def work(command: str, cfg: DictConfig) -> None:
    """What each process does; wrong input ends it with one sentence."""
    try:
        evaluate(cfg)
    except WRONG_INPUT as error:
        fail(command, error)


def main(words: Sequence[str] | None = None) -> None:
    parser = new_parser("eval", __doc__)
    add_arguments(parser)
    start("eval", parser.parse_intermixed_args(words), work)
