"""What windows, the ways to levels and the ways to train cost on a plain ViT: seconds and memory.

    python tools/benchmark/vits.py --sizes 512x512 800x1216 1024x1024

For each size and each way a process of its own runs the model on an image: inference, the median of
some rounds, then two training steps with AdamW, of which the second is timed, and the peak of
memory of that process over what it had before the model was built.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings

import peft  # noqa: F401  before memory is measured: what it imports is not of the model
import torch
from detbackbones import SpatialTuningAdapter, TimmBackbone, build_pyramid
from tabulate import tabulate

WINDOWS = {"whole image": {}, "windows": {"window_size": 16, "global_blocks": 4}}
LEVELS = ("simple pyramid", "adapter")
ATTENTION = {"lora_rank": 16, "lora_layers": ["attn.qkv", "attn.proj"]}
TRAINED = {
    "all": {},
    "all, checkpointing": {"grad_checkpointing": True},
    "LoRA of all layers": {"lora_rank": 6},
    "LoRA of attention": ATTENTION,
    "LoRA of attention, checkpointing": ATTENTION | {"grad_checkpointing": True},
    "the pyramid alone": {"freeze_at": 5},
}
CASES = [(attention, levels, "all") for levels in LEVELS for attention in WINDOWS]
CASES += [("whole image", "simple pyramid", trained) for trained in TRAINED if trained != "all"]


def build(
    args: argparse.Namespace, attention: str, levels: str, trained: str
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A ViT, and a pyramid on it."""
    torch.manual_seed(0)
    options = WINDOWS[attention] | TRAINED[trained]
    if levels == "adapter":
        options = options | {"out_depths": [0.5, 0.75, 1]}
    vit = TimmBackbone(args.model, **options)
    return vit, build_pyramid(SpatialTuningAdapter(vit) if levels == "adapter" else vit)


def measure(args: argparse.Namespace, size: str, *case: str) -> dict[str, float]:
    """Seconds of inference and of a training step, and MiB that each needs at its peak."""
    torch.set_num_threads(args.threads)
    height, width = map(int, size.split("x"))
    image = torch.rand(1, 3, height, width)
    before = _peak()
    vit, model = build(args, *case)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-6)
    found = {"M that learn": sum(p.numel() for p in vit.parameters() if p.requires_grad) / 1e6}
    seconds = []
    with torch.no_grad():
        for _ in range(args.rounds):
            start = time.perf_counter()
            model.eval()(image)
            seconds.append(time.perf_counter() - start)
    found["inference, s"], found["MiB"] = statistics.median(seconds), _peak() - before
    for _ in range(2):
        start = time.perf_counter()
        sum(level.mean() for level in model.train()(image).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        found["training, s"] = time.perf_counter() - start
    found["MiB of it"] = _peak() - before
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
    add("--case", nargs=4, help=argparse.SUPPRESS)  # what one of the processes does
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.case:
        print(json.dumps(measure(args, *args.case)))
        return
    rows = []
    for size in args.sizes:
        for case in CASES:
            command = [sys.executable, *sys.argv, "--case", size, *case]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(out.splitlines()[-1])
            rows.append([size, *case, *(round(value, 2) for value in found.values())])
            print(rows[-1], file=sys.stderr)
    headers = ["image", "attention", "levels", "trained", *found]
    print(tabulate(rows, headers, "github"))


if __name__ == "__main__":
    main()
