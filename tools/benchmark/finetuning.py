"""What matters when a detector is fine-tuned: one setting at a time is changed, and AP compared.

It is changed from the config with optimizer.lr=2e-4; with --recipe augmentation, mixing and a
moving average are added to the config as it is, one at a time and together.

    python tools/benchmark/finetuning.py boxes FOLDER --output output/finetuning
    python tools/benchmark/finetuning.py masks FOLDER --output output/finetuning
    python tools/benchmark/finetuning.py labels FOLDER --output output/finetuning
    python tools/benchmark/finetuning.py boxes FOLDER --output output/recipe --recipe

FOLDER has train.json, val.json and images/, or for labels images/ with files called train_* and
val_*, and their label maps in labels/. Each run is a `detbackbones train` whose command is kept
beside its results in runs.jsonl; runs that are there already are not repeated. At the end there are
a table and a picture of the metric over the images seen, means over the seeds. The backbone is
tf_efficientnet_lite0 with ImageNet weights of the package index.
"""

import argparse
import statistics
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from runs import train_all
from tabulate import tabulate

BACKBONE = "model.backbone.bottom_up"
COLOURS = colormaps["tab20"]
RANDOM = [f"{BACKBONE}.pretrained=False", f"{BACKBONE}.norm=BN", f"{BACKBONE}.freeze_at=0"]
RANDOM += ["optimizer.lr=5e-4", "dataloader.train.aspect_ratio_grouping=False"]


def batch_of_one(iterations: int) -> list[str]:
    """As many images, one at a time."""
    return ["dataloader.train.total_batch_size=1", f"train.max_iter={4 * iterations}"]


def settings(iterations: int) -> dict[str, list[str]]:
    """What is changed, by a name."""
    one = batch_of_one(iterations)
    learning = [f"{BACKBONE}.norm=BN", f"{BACKBONE}.freeze_at=0"]
    return {
        "FrozenBN, freeze_at=2": [],
        "freeze_at=0": [f"{BACKBONE}.freeze_at=0"],
        "freeze_at=3": [f"{BACKBONE}.freeze_at=3"],
        "freeze_at=5": [f"{BACKBONE}.freeze_at=5"],
        "norm=BN": [f"{BACKBONE}.norm=BN"],
        "norm=BN, freeze_at=0": learning,
        "backbone_lr_factor=0.1": ["optimizer.params.backbone_lr_factor=0.1"],
        "layer_decay=0.8": ["optimizer.params.layer_decay=0.8"],
        "lr=5e-4": ["optimizer.lr=5e-4"],
        "lr=5e-4, backbone_lr_factor=0.1": [
            "optimizer.lr=5e-4",
            "optimizer.params.backbone_lr_factor=0.1",
        ],
        "batches of 1": one,
        "batches of 1, norm=BN, freeze_at=0": [*one, *learning],
        "random, norm=BN, freeze_at=0, lr=5e-4": RANDOM,
        "random, the same, batches of 1": [*RANDOM, *one],
        "random, the same, norm=FrozenBN": [*RANDOM, f"{BACKBONE}.norm=FrozenBN"],
    }


RECIPE = {
    "nothing": [],
    "moving average": ["train.model_ema.enabled=True"],
    "scale jitter": ["dataset.augmentation.scale_jitter=[0.5,2.0]"],
    "crop": ["dataset.augmentation.crop=0.5"],
    "zoom out": ["dataset.augmentation.zoom_out=0.3"],
    "colour": ["dataset.augmentation.color=0.4"],
    "no up": ["dataset.augmentation.upright=False"],
    "mosaic": ["dataset.mixing.mosaic=0.5"],
    "mixup": ["dataset.mixing.mixup=0.2"],
    "copy-paste": ["dataset.mixing.copy_paste=0.3"],
}


def recipe(task: str) -> dict[str, list[str]]:
    """The parts of a recipe, by a name, and all of them."""
    parts = {k: words for k, words in RECIPE.items() if k != "copy-paste" or task == "masks"}
    return {**parts, "all": [word for words in parts.values() for word in words]}


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
        images = [f"dataset.{split}_images={folder}/images/{split}_*" for split in ("train", "val")]
        return images + [f"dataset.{split}_labels={folder}/labels" for split in ("train", "val")]
    jsons = [f"dataset.{split}_json={folder}/{split}.json" for split in ("train", "val")]
    return jsons + [f"dataset.{split}_images={folder}/images" for split in ("train", "val")]


def draw(rows: dict[str, list[dict]], metric: str, path: Path) -> None:
    """The metric over the share of the training, a line for each setting, the best first."""
    figure = Figure((10, 5), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    curves = {}
    for name, runs in rows.items():
        whole = runs[0]["curve"][-1][0]
        steps = [100 * step / whole for step, _ in runs[0]["curve"]]
        values = zip(*([value for _, value in run["curve"]] for run in runs))
        curves[name] = steps, [statistics.mean(value) for value in values]
    for i, name in enumerate(sorted(curves, key=lambda name: -curves[name][1][-1])):
        style = "--" if "random" in name else ":" if "batches of 1" in name else "-"
        label = f"{curves[name][1][-1]:.1f}  {name}"
        axes.plot(*curves[name], style, marker="o", ms=3, color=COLOURS(i), label=label)
    axes.set_xlabel("images seen, percent")
    axes.set_ylabel(f"{metric}, percent")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, title="at the end")
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
    parser.add_argument("--recipe", action="store_true", help="compare the parts of the recipe")
    parser.add_argument("--add", nargs="+", default=[], metavar="KEY=VALUE", help="to all runs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the settings")
    args = parser.parse_args()
    for key, least in (("iterations", 4), ("seeds", 1), ("jobs", 1)):
        if getattr(args, key) < least:
            parser.error(f"--{key} {getattr(args, key)} must be at least {least}")
    if not args.folder.is_dir():
        parser.error(f"folder {str(args.folder)!r} must be a folder with the data")
    every = recipe(args.task) if args.recipe else settings(args.iterations)
    if unknown := set(args.only or ()) - every.keys():
        parser.error(f"--only {unknown.pop()!r} must be one of {', '.join(every)}")
    config, needs, metric = TASKS[args.task]
    output = args.output / args.task
    cases = {}
    names = args.only or [*every]
    for seed in range(args.seeds):
        for name in names:
            steps = 4 * args.iterations if "batches of 1" in name else args.iterations
            words = [
                "--config-file",
                f"finetune/{config}.py",
                *data(args.task, args.folder),
                *needs,
            ]
            words += [f"{BACKBONE}.model_name=tf_efficientnet_lite0", f"train.seed={seed}"]
            words += [f"train.max_iter={args.iterations}", "train.pictures=0"]
            words += [*([] if args.recipe else ["optimizer.lr=2e-4"]), *every[name]]
            words += [f"train.eval_period={steps // (2 if args.recipe else 4)}"]
            words += [f"train.checkpointer.period={steps}", "dataloader.train.num_workers=1"]
            words += ["dataloader.test.num_workers=1", *args.add]
            cases[name, seed] = (words, metric)
    found = train_all(cases, output, args.jobs)
    rows = {name: [found[name, seed] for seed in range(args.seeds)] for name in names}
    table = []
    for name, runs in rows.items():
        ends = [run["curve"][-1][1] for run in runs]
        halves = [run["curve"][len(run["curve"]) // 2 - 1][1] for run in runs]
        table.append((name, statistics.mean(halves), statistics.mean(ends), min(ends), max(ends)))
    headers = ("setting", f"{metric} at half", "at the end", "lowest", "highest")
    print(tabulate(table, headers, "github", floatfmt=".1f"))
    draw(rows, metric, output / "curves.png")
    print(f"wrote {output / 'runs.jsonl'} and {output / 'curves.png'}")


if __name__ == "__main__":
    main()
