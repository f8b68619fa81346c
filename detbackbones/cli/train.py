r"""Train a detector from a LazyConfig, then evaluate it and draw what it predicts.

    detbackbones train --config-file finetune/faster_rcnn.py train.output_dir=output/mine \
        dataset.train_json=train.json dataset.train_images=images \
        dataset.val_json=val.json dataset.val_images=images
    detbackbones train --data FOLDER train.output_dir=output/mine

The config is a file, or one that comes with the package, by its name. The output folder gets
config.yaml, checkpoints, metrics.json, log.txt, and pictures: predictions.png, hardest.png,
errors.png, curves.png, and batch.png, which shows what the first batch was.

With --data the folder's format is found (COCO, YOLO, Pascal VOC, label maps and others:
`detbackbones data --help`), train.json and val.json are written to data/ in the output folder, with
a split that is made where there is none, and --config-file is by default finetune/faster_rcnn.py,
or mask_rcnn.py where each object has a mask, or semantic_fpn.py for label maps; --task says it.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from detectron2.utils import comm
from omegaconf import DictConfig

from ..data.formats import FORMATS
from ..data.formats.convert import read_for_training
from ..training.find_batch import find_batch
from ..training.find_lr import find_lr
from ..training.interrupt import Interrupted
from ..training.log import RUN_ERRORS, logging_to
from ..training.output import refuse_run, reserved
from ..training.overrides import apply_overrides
from ..training.run import fit, prepare, with_train_settings
from . import eval as evaluation
from .launch import WRONG_INPUT, add_arguments, load_asked, start
from .program import fail, new_parser

TOOLS = {"--find-lr": find_lr, "--find-batch": find_batch}
CONFIGS = {
    "boxes": "finetune/faster_rcnn.py",
    "masks": "finetune/mask_rcnn.py",
    "semantic": "finetune/semantic_fpn.py",
}


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


def find(command: str, cfg: DictConfig, tool: Callable[[DictConfig], object]) -> None:
    """What each process does for --find-lr and --find-batch; wrong input and Ctrl-C end it in one
    sentence.
    """
    try:
        with logging_to(cfg.train.output_dir):
            tool(cfg)
    except (*WRONG_INPUT, *RUN_ERRORS) as error:
        fail(command, error)
    except KeyboardInterrupt:
        if comm.is_main_process():
            print(f"detbackbones {command}: interrupted by SIGINT", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _has(args: argparse.Namespace, key: str) -> bool:
    return getattr(args, key.removeprefix("--").replace("-", "_"))


def _take_data(args: argparse.Namespace, trains_anew: bool) -> None:
    """Give the arguments the config and the files of a folder of data.

    They are written when it is known that the config takes them, and that the folder is free.
    """
    semantic = args.task == "semantic" or args.palette
    format = args.format or ("label_maps" if semantic else None)
    try:
        data = read_for_training(args.data, format, args.palette)
        if args.task not in (None, data.task) and (args.task, data.task) != ("boxes", "masks"):
            raise ValueError(f"--task {args.task} must be what the data have: {data.task}")
        args.config_file = args.config_file or CONFIGS[args.task or data.task]
        cfg = apply_overrides(with_train_settings(load_asked(args)), args.opts)
        folder = Path(cfg.train.output_dir)
        if trains_anew:
            refuse_run(folder)
        settings = data.write(folder / "data")
    except WRONG_INPUT as error:
        fail("train", error)
    print(f"{data.said}\nwrote {folder / 'data'}")
    args.opts = [*(f"{name}={value}" for name, value in settings.items()), *args.opts]


def main(words: Sequence[str] | None = None) -> None:
    parser = new_parser("train", __doc__)
    add_arguments(parser)
    add = parser.add_argument
    add("--data", metavar="FOLDER", help="of images and what is said of them, in a known format")
    add("--format", choices=[*FORMATS], help="of --data, by default the one that is found")
    add("--task", choices=CONFIGS, help="of --data, by default all that the data have")
    add("--palette", metavar="FILE", help="of label maps in --data: names of values or colours")
    add("--resume", action="store_true", help="continue the run in the output folder")
    add("--overwrite", action="store_true", help="replace the run in the output folder")
    add("--eval-only", action="store_true", help="evaluate, do not train: detbackbones eval")
    add("--find-lr", action="store_true", help="try learning rates, in 100 steps; do not train")
    add("--find-batch", action="store_true", help="say how many images fit; do not train")
    args = parser.parse_intermixed_args(words)
    given = [key for key in (*TOOLS, "--resume", "--overwrite", "--eval-only") if _has(args, key)]
    if args.data:
        _take_data(args, trains_anew=not given)
    for key in ("format", "task", "palette"):
        if getattr(args, key) and not args.data:
            fail("train", f"--{key} {getattr(args, key)} must stand with --data")
    if given and given[0] in TOOLS:
        if len(given) > 1:
            fail("train", f"{given[0]} must stand without {given[1]}: it keeps nothing")
        start("train", args, find, tool=TOOLS[given[0]])
        return
    if args.eval_only:
        start("train", args, evaluation.work, trains=False)
        return
    during = partial(reserved, resume=args.resume, overwrite=args.overwrite)
    start("train", args, work, during, resume=args.resume)
