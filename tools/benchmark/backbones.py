"""Speed and memory of backbones beside what a careful user would write without them.

    python tools/benchmark/backbones.py --models resnet50,efficientnet_b0 --output benchmark
    python tools/benchmark/backbones.py --models resnet50 --device cuda --amp --size 800x1216
    python tools/benchmark/backbones.py --models resnet50,convnext_tiny --options-off

Peers, with the same levels, weights and frozen parameters: for timm its own extractor
(features_only=True) with timm's freeze_batch_norm_2d; for torchvision create_feature_extractor, and
for ResNets IntermediateLayerGetter, frozen likewise; detectron2's own ResNet, where it has the
model. Before anything is timed, all must give the same feature maps. With --variants
the backbone with other values of fold and channels_last is a peer too.

A training step is: forward pass, the sum of the means of the levels, backward pass, a step of SGD
with a tiny learning rate, gradients set to None; with --freeze-at 5 the forward pass is all of it.
An inference step is a forward pass in eval mode without gradients. Each round runs a step of every
contestant, in random order, after a few rounds that do not count. Times are medians over the
rounds, and "peer / ours" is the median of the ratios of the two times of a round: above 1 the
backbone is faster. "q1..q3" is the middle half of the rounds. "saved" is what the forward pass
keeps for the backward pass besides parameters, buffers and images, and "weights" the part of it
that is copies of convolution weights: folded or, with --amp, cast.

The exit status is 1 if a model failed.
"""

import argparse
import json
import platform
import random
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from contestants import OURS, contestants, memory
from detbackbones.backbones import BACKBONES
from detbackbones.messages import one_of, whole_number
from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm import tqdm

WARM_UP = 3  # rounds
MEMORY = {  # what may have been measured beside the time
    "saved (MiB)": "saved_mib",
    "weights (MiB)": "saved_weights_mib",
    "peak (MiB)": "peak_mib",
}
FILES = ("benchmark.md", "benchmark.json", "benchmark.png")


def measure(
    name: str, args: argparse.Namespace, results: list[dict[str, Any]], progress: Callable
) -> None:
    """Time a model's contestants; appends to ``results``, round by round.

    Raises:
        ValueError: if the model cannot be built, or its peers give other feature maps.
    """
    images = torch.randn(args.batch, 3, *args.size, device=args.device)
    made = contestants(name, args, images)
    for mode in args.modes:
        rows = [{"model": name, "mode": mode, "contestant": one.label} for one in made]
        for one, row in zip(made, rows):
            one.train(mode == "train")
            row |= {**memory(one, images), "seconds": []}
        results += rows
        for count in range(-WARM_UP, args.rounds):
            for one, row in random.sample([*zip(made, rows)], len(made)):
                if images.is_cuda:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                one.step(images)
                if images.is_cuda:
                    torch.cuda.synchronize()
                if count >= 0:
                    row["seconds"].append(time.perf_counter() - start)
            progress()


def summarise(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add medians and ratios to what was measured; an interrupted round does not count."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results:
        groups.setdefault((row["model"], row["mode"]), []).append(row)
    rows = []
    for group in groups.values():
        rounds = min(len(row["seconds"]) for row in group)
        ours = group[0]["seconds"]
        for row in group if rounds else ():
            row = row | {"seconds": row["seconds"][:rounds]}
            row |= _quartiles("seconds", row["seconds"])
            if row["contestant"] != OURS:
                row["ratios"] = [peer / own for peer, own in zip(row["seconds"], ours)]
                row |= _quartiles("ratio", row["ratios"])
            rows.append(row)
    return rows


def _quartiles(key: str, values: Sequence[float]) -> dict[str, Any]:
    q1, median, q3 = torch.tensor(values, dtype=float).quantile(
        torch.tensor([0.25, 0.5, 0.75], dtype=float)
    )
    return {f"{key}_median": median.item(), f"{key}_quartiles": [q1.item(), q3.item()]}


def means(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The geometric mean of each peer's ratios over the models that it has, mode by mode."""
    ratios: dict[tuple[str, str], list[float]] = {}
    for row in sorted(rows, key=lambda row: row["mode"] == "inference"):
        if "ratio_median" in row:
            ratios.setdefault((row["mode"], row["contestant"]), []).append(row["ratio_median"])
    return [
        {"mode": mode, "contestant": peer, "models": len(values)}
        | {"ratio_median": statistics.geometric_mean(values)}
        for (mode, peer), values in ratios.items()
    ]


def table(rows: Sequence[dict[str, Any]], failures: dict[str, str]) -> str:
    """What was measured, in GitHub's Markdown."""

    def line(row: dict[str, Any], name: str) -> dict[str, str]:
        def spread(key: str, scale: float, digits: int) -> str:
            return "..".join(f"{scale * v:.{digits}f}" for v in row.get(f"{key}_quartiles", ()))

        def value(key: str, scale: float, digits: int) -> str:
            return f"{scale * row[key]:.{digits}f}" if key in row else ""

        cells = {
            "model": name,
            "mode": row["mode"],
            "contestant": row["contestant"],
            "ms": value("seconds_median", 1e3, 1),
            "ms, q1..q3": spread("seconds", 1e3, 1),
            "peer / ours": value("ratio_median", 1, 3),
            "q1..q3": spread("ratio", 1, 3),
        }
        for column, key in MEMORY.items():
            if any(key in row for row in rows):
                cells[column] = value(key, 1, 1)
        return cells

    lines = [line(row, row["model"]) for row in rows]
    lines += [{"model": name, "failed": why} for name, why in failures.items()]
    lines += [line(row, f"geometric mean of {row['models']}") for row in means(rows)]
    columns = [*line({"mode": "", "contestant": ""}, "")]
    align = ["left"] * 3 + ["right"] * (len(columns) - 3) + ["left"] * bool(failures)
    columns += ["failed"] * bool(failures)
    cells = [[row.get(key, "") for key in columns] for row in lines]
    return tabulate(cells, columns, "github", disable_numparse=True, colalign=align)


def draw(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Bars of the ratios, model by model, training beside inference."""
    rows = [row for row in rows if "ratio_median" in row]
    rows += [row | {"model": "geometric mean"} for row in means(rows)]
    peers = list(dict.fromkeys(row["contestant"] for row in rows))
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    places: dict[str, dict[str, float]] = {}  # model -> peer -> position from the top
    y = 0.0
    for model in dict.fromkeys(row["model"] for row in rows):
        own = {row["contestant"] for row in rows if row["model"] == model}
        places[model] = {peer: y + i for i, peer in enumerate(p for p in peers if p in own)}
        y += len(own) + 0.8
    figure = Figure((2.5 + 5 * len(modes), 1.6 + 0.27 * y), dpi=100, layout="constrained")
    grid = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    top = max(row.get("ratio_quartiles", [0, row["ratio_median"]])[1] for row in rows)
    text = {"va": "center", "fontsize": 8}
    text["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for axes, mode in zip(grid, modes):
        for index, peer in enumerate(peers):
            bars = [row for row in rows if (row["mode"], row["contestant"]) == (mode, peer)]
            ys = [places[row["model"]][peer] for row in bars]
            medians = [row["ratio_median"] for row in bars]
            axes.barh(ys, medians, height=0.85, color=f"C{index}", alpha=0.8, label=peer)
            for y, row in zip(ys, bars):
                median = row["ratio_median"]
                q1, q3 = row.get("ratio_quartiles", [median] * 2)
                axes.plot([q1, q3], [y, y], color="black", lw=1.2)
                axes.text(q3 + 0.02 * top, y, f"{median:.2f}", **text)
        axes.axvline(1, color="black", lw=1, ls="--")
        axes.axhline(min(places["geometric mean"].values()) - 0.9, color="gray", lw=0.8)
        axes.set(
            title=mode, xlabel=f"time of the peer / time of {OURS}   (above 1: ours is faster)"
        )
        axes.set_xlim(0, max(1.1, 1.12 * top))
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
    grid[0].set_yticks([statistics.mean(p.values()) for p in places.values()], [*places])
    grid[0].set_ylim(max(max(p.values()) for p in places.values()) + 0.8, -0.8)
    figure.suptitle(title, fontsize=10, wrap=True)
    handles = grid[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, format="png")


def setting(args: argparse.Namespace) -> str:
    """The machine, the versions and what was run, in a line."""
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    machine = cpu[1] if cpu else platform.processor() or platform.machine()
    machine += f", {args.threads} thread{'s' * (args.threads > 1)}"
    if args.device == "cuda":
        machine = f"{torch.cuda.get_device_name()} ({machine})"
    options = [f"norm={args.norm}", f"freeze_at={args.freeze_at}"]
    options += [key for key in ("grad_checkpointing", "compile") if getattr(args, key)]
    return (
        f"{machine}; torch {torch.__version__}, timm {timm.__version__}, torchvision "
        f"{torchvision.__version__}; {args.batch} images of {' x '.join(map(str, args.size))}, "
        f"{'bfloat16 AMP' if args.amp else 'float32'}; "
        f"{'all options off' if args.options_off else ', '.join(options)}; {args.rounds} rounds"
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", required=True, help="names, with commas between them")
    add("--source", choices=BACKBONES, default="timm", help="default: %(default)s")
    modes = parser.add_mutually_exclusive_group()
    for mode in ("train", "inference"):
        modes.add_argument(
            f"--{mode}", dest="modes", action="store_const", const=[mode], help="only this"
        )
    add("--size", default="384", help="N, or height x width as 800x1216; default: %(default)s")
    add("--batch", type=int, default=2, help="images in a step; default: %(default)s")
    add("--norm", choices=("FrozenBN", "BN"), default="FrozenBN", help="default: %(default)s")
    add("--freeze-at", type=int, choices=range(6), default=0, help="default: %(default)s")
    add("--amp", action="store_true", help="bfloat16 autocast; the peers are run without it too")
    add("--compile", action="store_true", help="ours; the peers are run compiled and not")
    add("--grad-checkpointing", action="store_true", help="ours; the peers keep everything")
    add(
        "--variants", action="store_true", help="also ours with other values of fold, channels_last"
    )
    add(
        "--options-off",
        action="store_true",
        help="the bare wrapper beside the bare extractor, nothing frozen or converted",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--threads", type=int, default=2, help="of the CPU; default: %(default)s")
    add("--rounds", type=int, default=15, help="default: %(default)s")
    add("--output", type=Path, help=f"folder for {', '.join(FILES)}")
    add("--overwrite", action="store_true", help="replace these")
    return parser.parse_args()


def check(args: argparse.Namespace) -> None:
    """Refuse wrong arguments before anything is run, and make the folder of ``--output``.

    Raises:
        ValueError, OSError: with one sentence.
    """
    args.models = [name for name in args.models.split(",") if name]
    args.modes = args.modes or ["train", "inference"]
    if not args.models or len(set(args.models)) < len(args.models):
        raise ValueError(f"--models {','.join(args.models)!r} must be different names")
    for name in args.models:
        plain = name.partition(".")[0] if args.source == "timm" else name
        one_of("--models", plain, BACKBONES[args.source].source_class.names())
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", args.size):
        raise ValueError(f"--size {args.size} must be N or HEIGHTxWIDTH in pixels, as 800x1216")
    height, _, width = args.size.partition("x")
    args.size = int(height), int(width or height)
    for key in ("batch", "threads", "rounds"):
        whole_number(f"--{key}", getattr(args, key))
    if args.options_off and (
        args.variants
        or args.freeze_at
        or args.grad_checkpointing
        or args.compile
        or args.norm != "FrozenBN"
    ):
        raise ValueError("--options-off goes with no option of the backbone")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda is not possible: torch finds no GPU")
    if args.overwrite and not args.output:
        raise ValueError("--overwrite is for the files of --output")
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        there = [name for name in FILES if (args.output / name).exists()]
        if there and not args.overwrite:
            raise FileExistsError(f"{args.output / there[0]} exists: replace it with --overwrite")


def report(
    args: argparse.Namespace, rows: Sequence[dict[str, Any]], failures: dict[str, str]
) -> str:
    """The table of what ``summarise`` gives; it and the rows are written if a folder was given."""
    text = f"{setting(args)}\n\n{table(rows, failures)}\n"
    if args.output:
        content = {"setting": setting(args), "arguments": vars(args) | {"output": str(args.output)}}
        content |= {"results": rows, "geometric_means": means(rows), "failures": failures}
        (args.output / FILES[0]).write_text(text)
        (args.output / FILES[1]).write_text(json.dumps(content, indent=1) + "\n")
        (args.output / FILES[2]).unlink(missing_ok=True)
    return text


def main() -> None:
    args = parse_args()
    try:
        check(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    random.seed(0)
    results: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    status = 0
    rounds = len(args.modes) * (WARM_UP + args.rounds)
    try:
        with tqdm(total=len(args.models) * rounds, unit="round") as bar:
            for index, name in enumerate(args.models):
                bar.set_description(name)
                try:
                    measure(name, args, results, bar.update)
                except Exception as error:  # a model may fail in any way, and the others count
                    failures[name] = str(error).partition("\n")[0] or type(error).__name__
                    bar.update((index + 1) * rounds - bar.n)
                    status = 1
                report(args, summarise(results), failures)
    except KeyboardInterrupt:
        print("interrupted: this is what was measured until then", file=sys.stderr)
        status = 130
    rows = summarise(results)
    print(report(args, rows, failures), end="")
    if args.output and rows:
        draw(rows, setting(args), args.output / FILES[2])
    sys.exit(status)


if __name__ == "__main__":
    main()
