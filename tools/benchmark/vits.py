"""What attention within windows and the ways to levels cost on a plain ViT: seconds and memory.

    python tools/benchmark/vits.py --sizes 512x512 800x1216 1024x1024

For each size and each way a process of its own runs the model on an image: inference, the median of
some rounds, then a training step, and the peak of memory of that process over what it had before.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings

import torch
from detbackbones import SpatialTuningAdapter, TimmBackbone, build_pyramid
from tabulate import tabulate

WINDOWS = {"whole image": {}, "windows": {"window_size": 16, "global_blocks": 4}}
LEVELS = ("simple pyramid", "adapter")


def build(args: argparse.Namespace, attention: str, levels: str) -> torch.nn.Module:
    """A ViT with a pyramid."""
    torch.manual_seed(0)
    options = dict(WINDOWS[attention])
    if levels == "simple pyramid":
        return build_pyramid(TimmBackbone(args.model, **options))
    vit = TimmBackbone(args.model, out_depths=[0.5, 0.75, 1], **options)
    return build_pyramid(SpatialTuningAdapter(vit))


def measure(args: argparse.Namespace, size: str, attention: str, levels: str) -> dict[str, float]:
    """Seconds of inference and of a training step, and MiB that each needs at its peak."""
    torch.set_num_threads(args.threads)
    model = build(args, attention, levels)
    height, width = map(int, size.split("x"))
    image = torch.rand(1, 3, height, width)
    found, before = {}, _peak()
    seconds = []
    with torch.no_grad():
        for _ in range(args.rounds):
            start = time.perf_counter()
            model.eval()(image)
            seconds.append(time.perf_counter() - start)
    found["inference, s"], found["MiB"] = statistics.median(seconds), _peak() - before
    start = time.perf_counter()
    sum(level.mean() for level in model.train()(image).values()).backward()
    found["training, s"], found["MiB of it"] = time.perf_counter() - start, _peak() - before
    return found


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="vit_small_patch16_224", help="of timm; default: %(default)s")
    add("--sizes", nargs="+", default=["512x512", "800x1216", "1024x1024"], metavar="HxW")
    add("--rounds", type=int, default=3, help="of inference; default: %(default)s")
    add("--threads", type=int, default=2, help="default: %(default)s")
    add("--case", nargs=3, help=argparse.SUPPRESS)  # what one of the processes does
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.case:
        print(json.dumps(measure(args, *args.case)))
        return
    rows = []
    for size in args.sizes:
        for levels in LEVELS:
            for attention in WINDOWS:
                command = [sys.executable, *sys.argv, "--case", size, attention, levels]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found = json.loads(out.splitlines()[-1])
                rows.append([size, levels, attention, *(round(v, 2) for v in found.values())])
                print(rows[-1], file=sys.stderr)
    headers = ["image", "levels", "attention", *found]
    print(tabulate(rows, headers, "github"))


if __name__ == "__main__":
    main()
