"""What matters when a detector is fine-tuned: one setting at a time is changed, and AP compared.

    python tools/benchmark/finetuning.py boxes FOLDER --output output/finetuning
    python tools/benchmark/finetuning.py masks FOLDER --output output/finetuning
    python tools/benchmark/finetuning.py labels FOLDER --output output/finetuning

FOLDER has train.json, val.json and images/, or for labels images/ and labels/, whose files are
called train_* and val_*. Each run is a `detbackbones train` whose command is kept beside its
results in runs.jsonl; runs that are there already are not repeated. At the end there are a table
and a picture of the metric over the images seen, means over the seeds. The backbone is
tf_efficientnet_lite0 with ImageNet weights of the package index.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm import tqdm

BACKBONE = "model.backbone.bottom_up"
RANDOM = [f"{BACKBONE}.pretrained=False", f"{BACKBONE}.norm=BN", f"{BACKBONE}.freeze_at=0"]
RANDOM += ["optimizer.lr=5e-4", "dataloader.train.aspect_ratio_grouping=False"]


def batch_of_one(iterations: int) -> list[str]:
    """As many images, one at a time."""
    return ["dataloader.train.total_batch_size=1", f"train.max_iter={4 * iterations}"]


def settings(iterations: int) -> dict[str, list[str]]:
    """What is changed of the config, by a name."""
    one = batch_of_one(iterations)
    learning = [f"{BACKBONE}.norm=BN", f"{BACKBONE}.freeze_at=0"]
    return {
        "as the config": [],
        "freeze_at=0": [f"{BACKBONE}.freeze_at=0"],
        "freeze_at=3": [f"{BACKBONE}.freeze_at=3"],
        "freeze_at=5": [f"{BACKBONE}.freeze_at=5"],
        "norm=BN": [f"{BACKBONE}.norm=BN"],
        "norm=BN, freeze_at=0": learning,
        "backbone_lr_factor=0.1": ["optimizer.params.backbone_lr_factor=0.1"],
        "layer_decay=0.8": ["optimizer.params.layer_decay=0.8"],
        "lr=5e-4": ["optimizer.lr=5e-4"],
        "batches of 1": one,
        "batches of 1, norm=BN, freeze_at=0": [*one, *learning],
        "random, norm=BN, freeze_at=0, lr=5e-4": RANDOM,
        "random, the same, batches of 1": [*RANDOM, *one],
        "random, the same, norm=FrozenBN": [*RANDOM, f"{BACKBONE}.norm=FrozenBN"],
    }


# The config, what it needs, and the metric that is compared.
TASKS = {
    "boxes": ("faster_rcnn", [], "bbox/AP"),
    "masks": (
        "mask_rcnn",
        [
            "model.proposal_generator.anchor_generator.sizes=[[12],[24],[48],[96],[192]]",
            "dataset.train_sizes=[352,400]",
            "dataset.val_size=384",
        ],
        "segm/AP",
    ),
    "labels": ("semantic_fpn", ["dataset.num_classes=2", "dataset.val_size=256"], "sem_seg/mIoU"),
}


def data(task: str, folder: Path) -> list[str]:
    """The settings that name the files."""
    if task == "labels":
        return [
            f"dataset.{split}_{kind}={folder}/{kind}/{split}_*"
            for split in ("train", "val")
            for kind in ("images", "labels")
        ]
    jsons = [f"dataset.{split}_json={folder}/{split}.json" for split in ("train", "val")]
    return jsons + [f"dataset.{split}_images={folder}/images" for split in ("train", "val")]


def train(words: Sequence[str], output: Path, metric: str) -> dict:
    """One run: its command, its seconds, and the metric by iterations; ends all if it fails."""
    command = ["train", *words, f"train.output_dir={output}", "--overwrite"]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "detbackbones", *command],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", **os.environ},
    )
    result = {"command": shlex.join(["detbackbones", *command])}
    result["seconds"] = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"finetuning: {result['command']} failed: {done.stderr.strip().splitlines()[-1]}")
    lines = map(json.loads, (output / "metrics.json").read_text().splitlines())
    return {
        **result,
        "curve": [(line["iteration"], line[metric]) for line in lines if metric in line],
    }


def draw(rows: dict[str, list[dict]], metric: str, path: Path) -> None:
    """The metric over the share of the training, a line for each setting."""
    figure = Figure((9, 5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for name, runs in rows.items():
        curves = [run["curve"] for run in runs]
        steps = [100 * step / curves[0][-1][0] for step, _ in curves[0]]
        means = [statistics.mean(values) for values in zip(*([v for _, v in c] for c in curves))]
        axes.plot(steps, means, "--" if "random" in name else "-", marker="o", ms=3, label=name)
    axes.set_xlabel("images seen, percent")
    axes.set_ylabel(metric)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("folder", type=Path, help="of the data")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--iterations", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; default: %(default)s")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the settings")
    args = parser.parse_args()
    for key, least in (("iterations", 4), ("seeds", 1), ("jobs", 1)):
        if getattr(args, key) < least:
            parser.error(f"--{key} {getattr(args, key)} must be at least {least}")
    if not args.folder.is_dir():
        parser.error(f"folder {str(args.folder)!r} must be a folder with the data")
    every = settings(args.iterations)
    if unknown := set(args.only or ()) - every.keys():
        parser.error(f"--only {unknown.pop()!r} must be one of {', '.join(every)}")
    config, needs, metric = TASKS[args.task]
    output = args.output / args.task
    output.mkdir(parents=True, exist_ok=True)
    kept = output / "runs.jsonl"
    lines = map(json.loads, kept.read_text().splitlines() if kept.exists() else ())
    lines = [line for line in lines if line["iterations"] == args.iterations]
    found = {(line["name"], line["seed"]): line for line in lines}

    def run(case: tuple[str, int]) -> None:
        name, seed = case
        words = ["--config-file", f"finetune/{config}.py", *data(args.task, args.folder), *needs]
        words += [f"{BACKBONE}.model_name=tf_efficientnet_lite0", f"train.seed={seed}"]
        words += [f"train.max_iter={args.iterations}", "train.pictures=0", *every[name]]
        steps = 4 * args.iterations if "batches of 1" in name else args.iterations
        words += [f"train.eval_period={steps // 4}", f"train.checkpointer.period={steps}"]
        words += ["dataloader.train.num_workers=1", "dataloader.test.num_workers=1"]
        folder = output / f"run{[*every].index(name)}_{seed}"
        kind = {"name": name, "seed": seed, "iterations": args.iterations}
        found[case] = {**kind, **train(words, folder, metric)}
        with open(kept, "a") as file:
            file.write(json.dumps(found[case]) + "\n")

    names = args.only or [*every]
    cases = [(name, seed) for seed in range(args.seeds) for name in names]
    left = [case for case in cases if case not in found]
    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in tqdm(pool.map(run, left), total=len(left), unit="run"):
            pass
    rows = {name: [found[name, seed] for seed in range(args.seeds)] for name in names}
    table = []
    for name, runs in rows.items():
        ends = [run["curve"][-1][1] for run in runs]
        halves = [run["curve"][1][1] for run in runs]
        table.append((name, statistics.mean(halves), statistics.mean(ends), min(ends), max(ends)))
    headers = ("setting", f"{metric} at half", "at the end", "lowest", "highest")
    print(tabulate(table, headers, "github", floatfmt=".1f"))
    draw(rows, metric, output / "curves.png")
    print(f"wrote {kept} and {output / 'curves.png'}")


if __name__ == "__main__":
    main()
