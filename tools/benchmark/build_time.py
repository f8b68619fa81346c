"""Time to build a backbone beside the time to build timm's own model.

    python tools/benchmark/build_time.py [--runs 3]

A backbone is to cost at most 1.3 times as much, and a second, with all that it finds by running the
model on the meta device. Each build has a process of its own, so that nothing is found in advance;
the runs of the two are interleaved, and the medians compared. The exit status is 1 if a model is
above the bound.
"""

import argparse
import gc
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import timm
import torch
from detbackbones import TimmBackbone
from tabulate import tabulate
from tqdm import tqdm

# Those that detectors and downloads of the hub name most often
MODELS = """
resnet18 resnet34 resnet50 resnet101 resnext50_32x4d wide_resnet50_2 mobilenetv2_100
mobilenetv3_large_100 efficientnet_b0 efficientnet_b3 tf_efficientnetv2_s regnety_008 densenet121
vgg16 convnext_tiny convnext_base swin_tiny_patch4_window7_224 vit_small_patch16_224
vit_base_patch16_224 vit_small_patch14_dinov2
""".split()


def seconds(build: Callable[[str], object], name: str) -> float:
    """How long a call takes in a process of its own."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def child() -> None:
        start = time.perf_counter()
        build(name)
        sender.send(time.perf_counter() - start)

    process = fork.Process(target=child)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        sys.exit(f"build_time: building {name} failed")
    finally:
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="builds of each; default: %(default)s")
    args = parser.parse_args()
    if args.runs < 1:
        parser.error(f"--runs {args.runs} must be at least 1")
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    tqdm.monitor_interval = 0  # nor would tqdm's
    warnings.simplefilter("ignore")
    with torch.device("meta"):
        TimmBackbone("resnet18", out_features=["res2"])  # what torch imports on its first use
    gc.freeze()

    rows = []
    for name in tqdm(MODELS, unit="model"):
        runs = [
            (seconds(timm.create_model, name), seconds(TimmBackbone, name))
            for _ in range(args.runs)
        ]
        timms, ours = map(statistics.median, zip(*runs))
        bound = 1.3 * timms + 1
        rows.append((name, timms, ours, ours / timms, bound, "yes" if ours <= bound else "no"))
    header = ("model", "timm (s)", "backbone (s)", "ratio", "bound (s)", "within")
    print(tabulate(rows, header, floatfmt=".2f"))
    sys.exit(any(row[-1] == "no" for row in rows))


if __name__ == "__main__":
    main()
