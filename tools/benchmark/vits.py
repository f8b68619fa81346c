"""What windows, the ways to levels and the ways to train cost on a plain ViT: seconds and memory.

    python tools/benchmark/vits.py --sizes 512x512 800x1216 1024x1024

Each row is a ViT under a pyramid on one image: an inference, and a training step with AdamW. Times
are medians over some rounds after one that does not count. Memory is what the model and the
optimizer hold, and the most that is allocated besides at a time; torch's profiler counts it, which
sees what torch allocates on a CPU and not the scratch memory of oneDNN.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from detbackbones import SpatialTuningAdapter, TimmBackbone, build_pyramid
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

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
MIB = 2**20


def build(model: str, attention: str, levels: str, trained: str) -> tuple[nn.Module, nn.Module]:
    """A ViT, and a pyramid on it."""
    torch.manual_seed(0)
    options = WINDOWS[attention] | TRAINED[trained]
    if levels == "adapter":
        options = options | {"out_depths": [0.5, 0.75, 1]}
    vit = TimmBackbone(model, **options)
    return vit, build_pyramid(SpatialTuningAdapter(vit) if levels == "adapter" else vit)


def measure(args: argparse.Namespace, size: str, *case: str) -> dict[str, float]:
    """Millions of the ViT's parameters that learn, seconds, and MiB."""
    vit, model = build(args.model, *case)
    height, width = map(int, size.split("x"))
    image = torch.rand(1, 3, height, width)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def infer() -> None:
        with torch.no_grad():
            model.eval()(image)

    def train() -> None:
        sum(level.mean() for level in model.train()(image).values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    found = {"learns, M": sum(p.numel() for p in vit.parameters() if p.requires_grad) / 1e6}
    held = [*model.parameters(), *model.buffers()]
    for mode, step in (("inference", infer), ("training", train)):
        step()
        if args.rounds:
            found[f"{mode}, s"] = statistics.median(_seconds(step) for _ in range(args.rounds))
        tensors = [*held, *(t for state in optimizer.state.values() for t in state.values())]
        found[f"{mode}, MiB"] = sum(t.nbytes for t in tensors) / MIB + _most_allocated(step)
    return found


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _most_allocated(step: Callable[[], None]) -> float:
    """The most MiB that a step has allocated at a time."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most / MIB


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="vit_small_patch16_224", help="of timm; default: %(default)s")
    add("--sizes", nargs="+", default=["512x512", "800x1216", "1024x1024"], metavar="HxW")
    add("--rounds", type=int, default=3, help="0 measures memory alone; default: %(default)s")
    add("--threads", type=int, default=2, help="default: %(default)s")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    cases = [(size, *case) for size in args.sizes for case in CASES]
    rows = []
    for case in tqdm(cases, unit="case"):
        found = measure(args, *case)
        rows.append([*case, *(round(value, 2) for value in found.values())])
    headers = ["image", "attention", "levels", "trained", *found]
    print(tabulate(rows, headers, "github"))


if __name__ == "__main__":
    main()
