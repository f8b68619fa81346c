r"""Predict what is in images and videos with a trained detector or segmenter.

    detbackbones predict output/mine images/*.jpg --output found
    detbackbones predict output/mine large.png --output found --tile 640 --save pictures coco

The run is the folder of a training, of which the best checkpoint is taken, or a checkpoint; none of
its data is needed. The output folder gets what --save names:

  pictures  pictures/, each image with what is found; of a video a video
  coco      coco.json, in COCO's format with scores
  csv       boxes.csv, a row for each object
  yolo      yolo/, a text file for each image: class, box or polygon, score
  maps      maps/, of a segmenter: a label map for each image

What cannot be read is named, the rest goes on, and the exit status is 1.
"""

import argparse
import signal
import sys
from collections.abc import Sequence

from ..deploy.augmented import SCALES
from ..deploy.predict import MAPS, OBJECTS, predict_files
from ..deploy.predictor import Predictor
from ..deploy.sources import list_sources
from ..messages import fraction, whole_number
from ..training.log import without_warnings_of_torch
from .program import fail, new_parser


def _predict(args: argparse.Namespace) -> list[str]:
    fraction("--threshold", args.threshold)
    if args.nms is not None:
        fraction("--nms", args.nms)
    whole_number("--batch", args.batch)
    whole_number("--every", args.every)
    predictor = Predictor(
        args.run,
        config=args.config_file,
        device=args.device,
        score_threshold=args.threshold,
        nms_threshold=args.nms,
        classes=args.classes,
        trust=args.trust,
    )
    print(f"weights of {predictor.checkpoint}", file=sys.stderr)
    return predict_files(
        predictor,
        list_sources(args.images),
        args.output,
        save=args.save,
        batch_size=args.batch,
        tile=args.tile,
        overlap=args.overlap,
        augment=args.augment if args.augment != [] else SCALES,
        every=args.every,
    )


def main(words: Sequence[str] | None = None) -> None:
    parser = new_parser("predict", __doc__)
    add = parser.add_argument
    add("run", help="the folder of a training, or a checkpoint")
    add("images", nargs="+", help="images, videos, folders of images, or patterns")
    add("--output", required=True, metavar="FOLDER", help="a new folder")
    kinds = [*dict.fromkeys(OBJECTS + MAPS)]
    add("--save", nargs="+", choices=kinds, metavar="KIND", default=["pictures"])
    add("--threshold", type=float, default=0.5, help="lowest score (default: %(default)s)")
    add("--nms", type=float, metavar="IOU", help="keep the best of boxes of a class that overlap")
    add("--classes", nargs="+", metavar="NAME", help="write objects of these alone")
    add("--batch", type=int, default=1, metavar="N", help="images at once")
    add("--tile", type=int, metavar="PIXELS", help="cut images into tiles of this side")
    add("--overlap", type=float, default=0.2, help="of tiles (default: %(default)s of the side)")
    add(
        "--augment",
        nargs="*",
        type=float,
        metavar="SCALE",
        help="look at each image mirrored, too, and in other sizes: --augment 0.8 1 1.2",
    )
    add("--every", type=int, default=1, metavar="N", help="take each N-th frame of a video")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--config-file", metavar="FILE", help="of a checkpoint that holds no config")
    add("--trust", action="store_true", help="let a config call code of other packages")
    args = parser.parse_args(words)
    try:
        with without_warnings_of_torch():
            faults = _predict(args)
    except (ValueError, OSError, ImportError) as error:
        fail("predict", error)
    except KeyboardInterrupt:
        print("detbackbones predict: interrupted by SIGINT; what is written stays", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    print(f"wrote {args.output}", file=sys.stderr)
    for fault in faults:
        print(f"detbackbones predict: {fault}", file=sys.stderr)
    if faults:
        sys.exit(1)
