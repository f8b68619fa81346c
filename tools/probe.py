"""Probe frozen backbones: train a head for semantic segmentation on each, and compare.

    python tools/probe.py --models resnet18,convnext_atto,vit_tiny_patch16_224 --heads linear,dpt \
        dataset.train_images='images/train_*.jpg' dataset.train_labels=labels \
        dataset.val_images='images/val_*.jpg' dataset.val_labels=labels dataset.num_classes=2

A model is a name of timm with its pretrained weights; NAME=random has random ones as timm makes
them, and NAME=FILE those of a checkpoint. A head is a config of configs/probe/, which the key=value
words override. The output folder gets probe.md, probe.json and probe.png, and for each head on each
model what tools/train_net.py writes. A run that fails is reported, and the others go on; the same
command with --resume does those again, and what else is not there yet.
"""

import argparse
import gc
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

from detbackbones import FeatureBackbone
from detbackbones.checkpoint import Checkpointer, replacing
from detbackbones.config import config_folder
from detbackbones.heads.probe import cache_features
from detbackbones.messages import one_of
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.logger import setup_logger
from matplotlib.figure import Figure
from omegaconf import DictConfig
from tabulate import tabulate
from train_net import build_trainer, load_config, prepare_output, train

logger = logging.getLogger("detbackbones.probe")

CONFIGS = config_folder() / "probe"
KINDS = ("md", "json", "png")
COLUMNS = {
    "model": "model",
    "weights": "weights",
    "head": "head",
    "mIoU": "mIoU",
    "accuracy": "accuracy",
    "seconds": "seconds",
    "backbone_parameters": "parameters of the backbone, M",
    "trained_parameters": "trained, M",
}


def probe_config(model: str, weights: str, head: str, args: argparse.Namespace) -> DictConfig:
    """The config of one run; its output folder is made."""
    args.config_file = str(CONFIGS / f"{head}.py")
    cfg = load_config(args)
    backbone = cfg.model.backbone.get("bottom_up", cfg.model.backbone)
    backbone.model_name = model
    backbone.pretrained = weights == "pretrained"
    if weights not in ("pretrained", "random"):
        backbone.checkpoint_path = weights
    name = re.sub(r"[^\w.-]+", "_", f"{head}_{model}_{weights}")
    cfg.train.output_dir = str(args.output / name)
    return cfg


def probe(cfg: DictConfig, max_bytes: int) -> dict[str, Any]:
    """Train the head and evaluate it.

    Args:
        cfg: of the run.
        max_bytes: of the features that are kept; 0 keeps none.

    Returns:
        mIoU and the accuracy of the pixels in percent, the seconds of training with evaluation and
        pictures, and the number of parameters: of the frozen backbone, and of what is trained.
    """
    folder = Path(cfg.train.output_dir)
    trainer = build_trainer(cfg)
    model = trainer.model
    backbone = next(m for m in model.modules() if isinstance(m, FeatureBackbone))
    if max_bytes:
        cache_features(backbone, max_bytes)
    LazyConfig.save(cfg, str(folder / "config.yaml"))
    start = time.perf_counter()
    train(cfg, trainer, Checkpointer(model, str(folder), trainer=trainer), 0)
    seconds = time.perf_counter() - start
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    metrics = next(line for line in reversed(lines) if "sem_seg/mIoU" in line)
    return {
        "mIoU": metrics["sem_seg/mIoU"],
        "accuracy": metrics["sem_seg/pACC"],
        "seconds": seconds,
        "backbone_parameters": sum(p.numel() for p in backbone.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The runs as a markdown table, and a line for each that failed."""
    shown = []
    for row in rows:
        millions = {k: row[k] / 1e6 for k in row if k.endswith("_parameters")}
        shown.append([{**row, **millions}.get(key) for key in COLUMNS])
    formats = ("", "", "", ".1f", ".1f", ".0f", ".2f", ".4f")
    text = tabulate(shown, COLUMNS.values(), tablefmt="github", floatfmt=formats, missingval="-")
    failed = [f"\n- {label(row)}, {row['head']}: {row['error']}" for row in rows if "error" in row]
    return text + "\n" + "".join(failed)


def label(row: dict[str, Any]) -> str:
    """What the pictures call a backbone."""
    return row["model"] + ("" if row["weights"] == "pretrained" else f", {row['weights']}")


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the mIoU of each backbone, a bar for each head."""
    backbones = list(dict.fromkeys(label(row) for row in rows))
    heads = list(dict.fromkeys(row["head"] for row in rows))
    height = 0.8 / len(heads)
    figure = Figure((8, 1.4 + 0.3 * len(backbones) * (len(heads) + 1)), 100, layout="constrained")
    axes = figure.subplots()
    for i, head in enumerate(heads):
        runs = [row for row in rows if row["head"] == head]
        at = [backbones.index(label(row)) + (i - (len(heads) - 1) / 2) * height for row in runs]
        bars = axes.barh(at, [row.get("mIoU", 0) for row in runs], height, label=head)
        texts = [f"{row['mIoU']:.1f}" if "mIoU" in row else "failed" for row in runs]
        axes.bar_label(bars, texts, padding=3, fontsize=9)
    axes.set_yticks(range(len(backbones)), backbones)
    axes.set_ylim(len(backbones) - 0.5, -0.5)
    axes.set_xlim(0, 108)  # with room for the figure of a long bar
    axes.set_xlabel("mIoU, percent")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(title="head", loc="outside right upper", frameon=False)
    figure.savefig(path)


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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", required=True, metavar="NAME[=WEIGHTS],...")
    parser.add_argument("--heads", default="linear", metavar="HEAD,...", help="linear, fpn, dpt")
    parser.add_argument("--output", type=Path, default="output/probe", metavar="FOLDER")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="keep what is finished there")
    existing.add_argument("--overwrite", action="store_true", help="replace earlier probes there")
    parser.add_argument(
        "--cache", type=float, default=2.0, metavar="GIB", help="memory for features; 0 for none"
    )
    parser.add_argument("opts", nargs="*", metavar="key=value", help="overrides of the configs")
    args = parser.parse_intermixed_args()
    try:
        for head in args.heads.split(","):
            one_of("--heads", head, sorted(path.stem for path in CONFIGS.glob("*.py")))
        for key in (word.partition("=")[0] for word in args.opts):
            if key == "train.output_dir":
                raise ValueError("train.output_dir is a folder of each run: set --output")
            if key == "train.init_checkpoint":
                raise ValueError("train.init_checkpoint is of each run: set --models NAME=FILE")
            if re.fullmatch(r"model\.backbone.*\.(model_name|pretrained|checkpoint_path)", key):
                raise ValueError(f"{key} is of each run: set --models NAME or NAME=WEIGHTS")
        if not 0 <= args.cache < float("inf"):
            raise ValueError(f"--cache {args.cache} must be a number of GiB from 0")
        args.finished = finished(args)
        done = {(run["model"], run["weights"], run["head"]) for run in args.finished}
        args.runs = []
        for head in args.heads.split(","):
            for entry in args.models.split(","):
                model, _, weights = entry.partition("=")
                run = (model, weights or "pretrained", head)
                if run not in done:
                    args.runs.append((*run, probe_config(*run, args)))
        for *_, cfg in args.runs[:1]:  # what is wrong here is so in all
            instantiate(cfg.dataloader.train.dataset)
            instantiate(cfg.dataloader.test.dataset)
        if args.overwrite:
            for kind in KINDS:
                (args.output / f"probe.{kind}").unlink(missing_ok=True)
        anew = argparse.Namespace(eval_only=False, resume=False)
        anew.overwrite = args.overwrite or args.resume  # of what is not finished
        for *_, cfg in args.runs:
            prepare_output(cfg, anew)
    except (ValueError, OSError, ImportError, KeyError) as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parse_arguments()
    for name in ("detbackbones", "detectron2", "fvcore"):
        setup_logger(str(args.output), name=name, abbrev_name=name)
    rows = args.finished
    for count, (model, weights, head, cfg) in enumerate(args.runs, start=1):
        row = {"model": model, "weights": weights, "head": head}
        logger.info("probe %d of %d: %s on %s", count, len(args.runs), head, label(row))
        try:
            row |= probe(cfg, round(args.cache * 2**30))
        except Exception as error:  # the others may do better
            logger.exception("%s on %s failed", head, label(row))
            row["error"] = str(error).strip().partition("\n")[0] or type(error).__name__
            if isinstance(error, ConnectionError):
                row["error"] += f"; here that is --models {model}=FILE or {model}=random"
        rows.append(row)
        write(rows, args)
        gc.collect()  # model and cache are in cycles
    print("\n" + table(rows))
    print("these are in", ", ".join(str(args.output / f"probe.{kind}") for kind in KINDS))
    if any("error" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
