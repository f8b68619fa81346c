"""What many masks in an image cost a training step of Mask2Former: peak memory and seconds.

    python tools/benchmark/mask_memory.py

For each number of masks a process of its own takes a step with the true masks as bits, as
TransformersSegmenter has them, and another one with floats, as transformers' loss takes them.
Memory is the peak of the process, which has the libraries in it.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings

import torch
from detbackbones import TimmBackbone, TransformersSegmenter
from detectron2.structures import BitMasks, Instances
from tabulate import tabulate
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss


def step(args: argparse.Namespace, count: int, kind: str) -> dict[str, float]:
    """One step; returns seconds and the peak of memory in MiB."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    backbone = TimmBackbone(args.model, norm="FrozenBN", freeze_at=2)
    segmenter = TransformersSegmenter(
        backbone=backbone, num_classes=80, num_queries=args.queries, config_kwargs={}
    )
    height, width = args.size
    bits = torch.zeros(count, height, width, dtype=torch.bool)
    for i in range(count):
        top, left = 37 * i % (height - 64), 53 * i % (width - 64)
        bits[i, top : top + 64, left : left + 64] = True
    instances = Instances((height, width))
    instances.gt_masks, instances.gt_classes = BitMasks(bits), torch.zeros(count, dtype=torch.long)
    image = {"image": torch.rand(3, height, width) * 255, "instances": instances}
    if kind == "floats":
        model = segmenter.model
        model.criterion = Mask2FormerLoss(model.config, model.weight_dict)
        prepare = segmenter.prepare_targets

        def with_floats(*args):
            classes, masks = prepare(*args)
            return classes, masks.float()

        segmenter.prepare_targets = with_floats
    start = time.perf_counter()
    sum(segmenter([image]).values()).backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return {"seconds": seconds, "MiB": peak}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="resnet18", help="of timm; default: %(default)s")
    add("--size", type=int, nargs=2, default=[800, 1216], metavar=("H", "W"))
    add("--queries", type=int, default=200, help="default: %(default)s")
    add("--counts", type=int, nargs="+", default=[20, 200], help="masks; default: %(default)s")
    add("--threads", type=int, default=2, help="default: %(default)s")
    add("--case", nargs=2, help=argparse.SUPPRESS)  # what one of the processes does
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.case:
        print(json.dumps(step(args, int(args.case[0]), args.case[1])))
        return
    rows = []
    for kind in ("bits", "floats"):
        for count in args.counts:
            command = [sys.executable, *sys.argv, "--case", str(count), kind]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append((kind, count, *json.loads(out.splitlines()[-1]).values()))
    headers = ("true masks", "in the image", "seconds", "peak MiB")
    print(tabulate(rows, headers, "github", floatfmt=(".0f", ".0f", ".1f", ".0f")))


if __name__ == "__main__":
    main()
