r"""Probe frozen backbones: train a head for semantic segmentation on each, and compare.

    detbackbones probe --models resnet18,convnext_atto,vit_tiny_patch16_224 --heads linear,dpt \
        dataset.train_images='images/train_*.jpg' dataset.train_labels=labels \
        dataset.val_images='images/val_*.jpg' dataset.val_labels=labels dataset.num_classes=2

A model is a name of timm with its pretrained weights; NAME=random has random ones as timm makes
them, and NAME=FILE those of a checkpoint. A head is a config of configs/probe/, which the key=value
words override. The output folder gets probe.md, probe.json and probe.png, and for each head on each
model what `detbackbones train` writes. A run that fails is reported, and the others go on; the same
command with --resume does those again, and what else is not there yet.
"""

import argparse
import gc
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import instantiate

from ..messages import first_line, one_of
from ..training.log import logging_to
from ..training.output import prepare_output
from ..training.probe import draw, label, list_heads, probe, probe_config, table
from ..weights import replacing
from .program import fail, new_parser

logger = logging.getLogger(__name__)

KINDS = ("md", "json", "png")


def write(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Write table, JSON file and picture of the runs so far."""
    (args.output / "probe.md").write_text(table(rows))
    result = {"overrides": args.opts, "runs": rows}
    with replacing(str(args.output / "probe.json")) as temporary:  # --resume reads it
        Path(temporary).write_text(json.dumps(result, indent=2) + "\n")
    draw(rows, args.output / "probe.png")


def finished(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs that the output folder has and that did not fail; none without --resume.

    Raises:
        FileExistsError: if there are runs, and neither --resume nor --overwrite.
        ValueError: if they have other overrides, or their file cannot be read.
    """
    path = args.output / "probe.json"
    if args.overwrite or not (args.output / "log.txt").exists():
        return []
    if not args.resume:
        raise FileExistsError(
            f"--output {args.output} holds probes already: choose another, go on with --resume, or "
            "replace them with --overwrite"
        )
    if not path.exists():  # interrupted in the first run
        return []
    try:
        earlier = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--resume: {path} cannot be read: {error}") from error
    if earlier["overrides"] != args.opts:
        raise ValueError(
            f"--resume: the probes in {args.output} have the overrides "
            f"{' '.join(earlier['overrides']) or 'none'}: give the same, or choose another --output"
        )
    return [run for run in earlier["runs"] if "error" not in run]


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse heads that there are not, and overrides of what each run has of its own."""
    for head in args.heads.split(","):
        one_of("--heads", head, list_heads())
    for key in (word.partition("=")[0] for word in args.opts):
        if key == "train.output_dir":
            raise ValueError("train.output_dir is a folder of each run: set --output")
        if key == "train.init_checkpoint":
            raise ValueError("train.init_checkpoint is of each run: set --models NAME=FILE")
        if re.fullmatch(r"model\.backbone.*\.(model_name|pretrained|checkpoint_path)", key):
            raise ValueError(f"{key} is of each run: set --models NAME or NAME=WEIGHTS")
    if not 0 <= args.cache < float("inf"):
        raise ValueError(f"--cache {args.cache} must be a number of GiB from 0")


def plan(args: argparse.Namespace) -> tuple[list, list[dict[str, Any]]]:
    """What is to be run: model, weights, head and config of each; and the rows that are there.

    The folders of the runs are made.
    """
    rows = finished(args)
    done = {(row["model"], row["weights"], row["head"]) for row in rows}
    runs = []
    for head in args.heads.split(","):
        for entry in args.models.split(","):
            model, _, weights = entry.partition("=")
            run = (model, weights or "pretrained", head)
            if run not in done:
                cfg = probe_config(*run, args.opts)
                name = re.sub(r"[^\w.-]+", "_", "_".join((head, *run[:2])))
                cfg.train.output_dir = str(args.output / name)
                runs.append((*run, cfg))
    for *_, cfg in runs[:1]:  # what is wrong here is so in all
        instantiate(cfg.dataloader.train.dataset)
        instantiate(cfg.dataloader.test.dataset)
    if args.overwrite:
        for kind in KINDS:
            (args.output / f"probe.{kind}").unlink(missing_ok=True)
    for *_, cfg in runs:  # with --resume, over what is not finished
        prepare_output(cfg, overwrite=args.overwrite or args.resume)
    return runs, rows


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("probe", __doc__)
    add = parser.add_argument
    add("--models", required=True, metavar="NAME[=WEIGHTS],...")
    add("--heads", default="linear", metavar="HEAD,...", help="linear, fpn, dpt")
    add("--output", type=Path, default="output/probe", metavar="FOLDER")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="keep what is finished there")
    existing.add_argument("--overwrite", action="store_true", help="replace earlier probes there")
    add("--cache", type=float, default=2.0, metavar="GIB", help="memory for features; 0 for none")
    add("opts", nargs="*", metavar="key=value", help="overrides of the configs")
    return parser.parse_intermixed_args(words)


def main(words: Sequence[str] | None = None) -> None:
    args = parse_arguments(words)
    try:
        check_arguments(args)
        runs, rows = plan(args)
    except (ValueError, OSError, ImportError, KeyError) as error:
        fail("probe", error)
    args.output.mkdir(parents=True, exist_ok=True)  # there may be no run left
    with logging_to(str(args.output)):
        for count, (model, weights, head, cfg) in enumerate(runs, start=1):
            row = {"model": model, "weights": weights, "head": head}
            logger.info("probe %d of %d: %s on %s", count, len(runs), head, label(row))
            try:
                row |= probe(cfg, round(args.cache * 2**30))
            except Exception as error:  # the others may do better
                logger.exception("%s on %s failed", head, label(row))
                row["error"] = first_line(error)
                if isinstance(error, ConnectionError):
                    row["error"] += f"; here that is --models {model}=FILE or {model}=random"
            rows.append(row)
            write(rows, args)
            gc.collect()  # model and cache are in cycles
    print("\n" + table(rows))
    print("these are in", ", ".join(str(args.output / f"probe.{kind}") for kind in KINDS))
    if any("error" in row for row in rows):
        raise SystemExit(1)
