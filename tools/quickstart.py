"""Fine-tune a detector on photographs of blood cells, from ImageNet weights and from random ones.

Both are Faster R-CNNs on an EfficientNet-Lite0 that see 80 photographs twice. One starts from
ImageNet weights, with its batch norms frozen: that is what the config does by itself. The other
starts from random weights, with batch norms that learn. The weights (17 MB) are downloaded; no GPU
is needed.

    python tools/quickstart.py --output quickstart_output

Each command is printed before it runs, and commands.sh in the output folder keeps them all.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from tabulate import tabulate

TOOLS = Path(os.path.relpath(Path(__file__).resolve().parent))
DATA = TOOLS / "blood"
HEADER = "# The commands of tools/quickstart.py\n"
OUTPUTS = ("commands.sh", "pretrained", "random", "curves.png")

RANDOM_WEIGHTS = [
    "model.backbone.bottom_up.pretrained=False",
    "model.backbone.bottom_up.norm=BN",
    "model.backbone.bottom_up.freeze_at=0",
    "dataloader.train.aspect_ratio_grouping=False",
]


class Run(NamedTuple):
    """What came of a training.

    Attributes:
        ap: AP of boxes on the validation images, in percent, by iteration.
        ap50: the same for AP50.
        seconds: that it took.
    """

    ap: dict[int, float]
    ap50: dict[int, float]
    seconds: float


def prepare_output(folder: Path, overwrite: bool, resume: bool = False) -> None:
    """Make the output folder; refuse one that is in use.

    Of an earlier quickstart's folder the runs are removed with ``overwrite``, and stay with
    ``resume``.
    """
    commands = folder / "commands.sh"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (commands.is_file() and commands.read_text().startswith(HEADER)):
            raise FileExistsError(f"--output {folder} is not empty: give a new or empty folder")
        if resume:
            return
        if not overwrite:
            raise FileExistsError(
                f"--output {folder} holds an earlier quickstart: continue it with --resume, "
                "replace it with --overwrite, or give another folder"
            )
        for name in reversed(OUTPUTS):  # commands.sh last, so that a kill leaves the folder ours
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    commands.write_text(HEADER)


def train(title: str, output: Path, name: str, *more: str) -> Run:
    """Print the command of a training, keep it and run it; end with its exit status if it fails."""
    words = ["train", "--config-file=finetune/faster_rcnn.py", f"train.output_dir={output / name}"]
    words += [f"dataset.{split}_json={DATA / split}.json" for split in ("train", "val")]
    words += [f"dataset.{split}_images={DATA / 'images'}" for split in ("train", "val")]
    words += more
    text = f"\n# {title}\ndetbackbones " + " \\\n    ".join(map(shlex.quote, words))
    print(text, flush=True)
    with open(output / "commands.sh", "a") as commands:
        commands.write(text + "\n")
    start = time.perf_counter()
    status = subprocess.run([sys.executable, "-m", "detbackbones", *words]).returncode
    if status:
        print(f"quickstart: this failed with exit status {status}: {title}", file=sys.stderr)
        sys.exit(status if status > 0 else 1)
    seconds = time.perf_counter() - start
    lines = map(json.loads, (output / name / "metrics.json").read_text().splitlines())
    evaluated = [line for line in lines if "bbox/AP" in line]
    curves = (
        {line["iteration"]: line[key] for line in evaluated} for key in ("bbox/AP", "bbox/AP50")
    )
    return Run(*curves, seconds)


def draw_curves(runs: dict[str, Run], path: Path) -> None:
    """Draw AP and AP50 of the runs over the iterations."""
    figure = Figure((9, 4), dpi=100, layout="constrained")
    for axes, (label, metric) in zip(figure.subplots(1, 2), (("AP", "ap"), ("AP50", "ap50"))):
        for name, run in runs.items():
            curve = {0: 0.0, **getattr(run, metric)}
            axes.plot(curve.keys(), curve.values(), marker="o", label=name)
        axes.set(xlabel="iteration", ylabel=f"{label} of boxes, percent", ylim=(0, 100))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default="quickstart_output", metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--iterations", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier quickstart")
    parser.add_argument("--resume", action="store_true", help="continue one that was interrupted")
    args = parser.parse_args()
    if args.seed < 0 or args.iterations < 1:
        parser.error(f"--seed {args.seed} must be 0 or more, --iterations {args.iterations} 1")
    output = args.output
    try:
        prepare_output(output, args.overwrite, args.resume)
    except OSError as error:
        parser.error(str(error))

    length = [
        f"train.seed={args.seed}",
        "train.pictures=4",
        f"train.max_iter={args.iterations}",
        f"train.eval_period={max(args.iterations // 2, 1)}",
        f"train.log_period={max(args.iterations // 5, 1)}",
    ]
    if args.resume:
        length.append("--resume")
    runs = {
        "ImageNet weights": train(
            "from ImageNet weights, batch norm frozen", output, "pretrained", *length
        ),
        "random weights": train(
            "from random weights, batch norm learning", output, "random", *length, *RANDOM_WEIGHTS
        ),
    }
    rows = [
        (name, args.iterations, [*run.ap.values()][-1], [*run.ap50.values()][-1], run.seconds)
        for name, run in runs.items()
    ]
    headers = ("start", "iterations", "AP", "AP50", "seconds")
    print("\n" + tabulate(rows, headers, tablefmt="github", floatfmt=("", "", ".1f", ".1f", ".0f")))
    draw_curves(runs, output / "curves.png")
    print(f"\nAP over the iterations: {output / 'curves.png'}")
    for name, folder in zip(runs, ("pretrained", "random")):
        print(f"ground truth beside predictions, {name}: {output / folder / 'predictions.png'}")
    print(f"the commands: {output / 'commands.sh'}")
    print(
        "\nFor photographs of your own, with boxes in COCO format:\n\n"
        "    detbackbones train --config-file finetune/faster_rcnn.py \\\n"
        "        dataset.train_json=data/train.json dataset.train_images=data/images/train \\\n"
        "        dataset.val_json=data/val.json dataset.val_images=data/images/val \\\n"
        "        train.output_dir=output/mine"
    )


if __name__ == "__main__":
    main()
