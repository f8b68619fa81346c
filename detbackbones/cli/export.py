r"""Export a trained detector, or a backbone, to a file that runs without this package.

    detbackbones export output/mine --output exported
    detbackbones export output/mine --output exported --format openvino --int8 data/images/train
    detbackbones export resnet50 --output exported --images photographs

The first argument is the folder of a training, of which the best checkpoint is taken, a checkpoint,
or the name of a model of timm, whose backbone is exported. The output folder gets the file,
model.json with what must be known to use it, and example.py, a program that runs it.

What is written is tried: its outputs are compared with the model's on images of the validation set,
or of --images, and so is its AP where the validation set is there.
"""

import argparse
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..backbones import BACKBONES
from ..deploy.example import FILE as EXAMPLE
from ..deploy.export import Report
from ..deploy.export_detector import export_detector
from ..deploy.export_maps import export_maps
from ..deploy.formats import FORMATS
from ..deploy.predictor import Predictor
from ..messages import fraction, nearest
from ..training.evaluation import metric_tables, whole_metrics
from ..training.log import without_warnings_of_torch
from .program import fail, new_parser


def _export(args: argparse.Namespace) -> None:
    fraction("--threshold", args.threshold)
    size = None
    if args.size:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", args.size):
            raise ValueError(f"--size {args.size} must be HEIGHTxWIDTH in pixels, such as 640x640")
        height, width = map(int, args.size.split("x"))
        size = height, width
    options = {"format": args.format, "size": size}
    if not Path(args.what).exists():
        _say(_export_backbone(args, options), args.format)
        return
    predictor = Predictor(
        args.what,
        config=args.config_file,
        device="cpu",
        score_threshold=args.threshold,
        trust=args.trust,
    )
    print(f"weights of {predictor.checkpoint}", file=sys.stderr)
    report, metrics = export_detector(
        predictor,
        args.output,
        **options,
        images=args.images,
        int8=args.int8,
        evaluate=args.evaluation,
        trust=args.trust,
    )
    _say(report, args.format)
    for name, results in metrics.items():
        whole = {task: _whole(values) for task, values in results.items()}
        print(f"\n{name}", *metric_tables(whole), sep="\n")


def _whole(metrics: Any) -> Any:
    """Metrics without those of single classes, such as AP-cat."""
    if not isinstance(metrics, dict):  # an evaluator may give single numbers
        return metrics
    return whole_metrics(metrics)


def _export_backbone(args: argparse.Namespace, options: dict[str, Any]) -> Report:
    kind = BACKBONES[args.source]
    if args.what.partition(".")[0] not in kind.source_class.names():
        near = nearest(args.what, kind.source_class.names())
        raise ValueError(f"{args.what!r} must be a run, a checkpoint or a model: {near}")
    for key in ("int8", "config_file", "trust"):
        if getattr(args, key):
            option = f"--{key.replace('_', '-')}"
            raise ValueError(f"{option} is for a trained detector, not for a backbone alone")
    backbone = kind(args.what, norm="FrozenBN").eval()
    return export_maps(backbone, args.output, images=args.images, **options)


def _say(report: Report, format: str) -> None:
    for what, fault in report.refused.items():
        print(f"not with {what}: {fault}", file=sys.stderr)
    own, models = (1000 * seconds for seconds in report.seconds)
    shape = " x ".join(map(str, report.shape))
    numbers = f"any {' and '.join(report.free)}" if report.free else "no other size"
    print(f"wrote {report.folder}: {format}, of images {shape} ({numbers})")
    print(
        f"beside the model: {report.agreement}; {own:.0f} ms for an image, the model {models:.0f}"
    )
    if (report.folder / EXAMPLE).is_file():
        print(f"try it: python {report.folder / EXAMPLE} IMAGE")


def main(words: Sequence[str] | None = None) -> None:
    parser = new_parser("export", __doc__)
    add = parser.add_argument
    add("what", help="the folder of a training, a checkpoint, or the name of a model of timm")
    add(
        "--source", choices=list(BACKBONES), default="timm", help="of a model; default: %(default)s"
    )
    add("--output", required=True, metavar="FOLDER", help="a new folder")
    add("--format", choices=FORMATS, default="onnx", help="default: %(default)s")
    add("--size", metavar="HxW", help="of all images; default: any, where the model can")
    add("--images", metavar="FOLDER", help="to try it with; default: of the validation set")
    add("--int8", metavar="FOLDER", help="compute with 8 bits, in ranges that these images have")
    add("--threshold", type=float, default=0.5, help="of scores, in example.py")
    add("--no-evaluation", dest="evaluation", action="store_false", help="do not compute the AP")
    add("--config-file", metavar="FILE", help="of a checkpoint that holds no config")
    add("--trust", action="store_true", help="let a config call code of other packages")
    args = parser.parse_args(words)
    try:
        with without_warnings_of_torch():
            _export(args)
    except (ValueError, OSError, ImportError) as error:
        fail("export", error)
    except KeyboardInterrupt:
        print("detbackbones export: interrupted by SIGINT", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
