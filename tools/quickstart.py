"""Show on drawn shapes what a pretrained backbone is worth: no download, no GPU, a few minutes.

A detector learns some classes of shapes from many images (a), its backbone is saved as a timm
checkpoint (b), and a detector for other classes, of which there are few images, starts from that
checkpoint with its batch norms frozen (c). For comparison, one starts from random weights (d).

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
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

TOOLS = Path(os.path.relpath(Path(__file__).resolve().parent))
DRAW_SHAPES = (TOOLS / "draw_shapes.py",)
DETBACKBONES = ("-m", "detbackbones")
HEADER = "# The commands of tools/quickstart.py\n"
OUTPUTS = ("commands.sh", "shapes", "source", "backbone.safetensors", "finetune", "scratch")

SIZE = 128  # pixels
DATA = {  # classes, images to train on
    "source": ("circle,triangle,star,cross", 500),
    "target": ("ring,arrow,heart", 40),
}
SMALL_DETECTOR = [
    "model.backbone.bottom_up.model_name=resnet10t",
    "model.backbone.bottom_up.pretrained=False",
    "model.backbone.out_channels=64",
    "model.proposal_generator.anchor_generator.sizes=[[16],[32],[48],[64],[96]]",
    "model.proposal_generator.pre_nms_topk=[300,100]",
    "model.proposal_generator.post_nms_topk=[100,50]",
    "model.roi_heads.batch_size_per_image=64",
    "model.roi_heads.box_head.fc_dims=[256,256]",
    f"dataset.train_sizes=[{SIZE}]",
    f"dataset.val_size={SIZE}",
    "dataloader.train.total_batch_size=4",
    "dataloader.train.num_workers=0",
    "dataloader.test.num_workers=0",
    "train.log_period=50",
]
RANDOM_WEIGHTS = [
    "model.backbone.bottom_up.norm=BN",
    "model.backbone.bottom_up.freeze_at=0",
    "optimizer.lr=1e-3",
]
FROZEN_NORM = [
    "model.backbone.bottom_up.norm=FrozenBN",
    "model.backbone.bottom_up.freeze_at=2",
    "optimizer.lr=1e-3",
]


def prepare_output(folder: Path, overwrite: bool) -> None:
    """Make the output folder; refuse one that is in use, but for an earlier quickstart's."""
    commands = folder / "commands.sh"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not (commands.is_file() and commands.read_text().startswith(HEADER)):
            raise FileExistsError(f"--output {folder} is not empty: give a new or empty folder")
        if not overwrite:
            raise FileExistsError(
                f"--output {folder} holds an earlier quickstart: give another folder, or replace "
                "it with --overwrite"
            )
        for name in reversed(OUTPUTS):  # commands.sh last, so that a kill leaves the folder ours
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    commands.write_text(HEADER)


def run(title: str, output: Path, program: Sequence[str | Path], *arguments: str | Path) -> float:
    """Print a command, keep it and run it; end with its exit status if it fails.

    Returns:
        the seconds that it took.
    """
    command = [sys.executable, *program, *arguments]
    words = [shlex.quote(str(word)) for word in (os.path.relpath(command[0]), *command[1:])]
    first = 1 + len(program)
    text = f"\n# {title}\n{' '.join(words[:first])}"
    text += "".join(f" \\\n    {word}" for word in words[first:])
    print(text, flush=True)
    with open(output / "commands.sh", "a") as commands:
        commands.write(text + "\n")
    start = time.perf_counter()
    status = subprocess.run(command).returncode
    if status:
        print(f"quickstart: this failed with exit status {status}: {title}", file=sys.stderr)
        sys.exit(status if status > 0 else 1)
    return time.perf_counter() - start


def train(
    title: str, output: Path, name: str, data: str, iterations: int, *opts: str
) -> tuple[float, float, float]:
    """Train a detector on the source or the target shapes.

    Returns:
        AP and AP50 of its boxes on the validation images, in percent, and the seconds it took.
    """
    shapes = output / "shapes" / data
    seconds = run(
        title,
        output,
        (*DETBACKBONES, "train"),
        "--config-file=finetune/faster_rcnn.py",
        f"train.output_dir={output / name}",
        f"train.max_iter={iterations}",
        *(f"dataset.{split}_json={shapes / split}.json" for split in ("train", "val")),
        *(f"dataset.{split}_images={shapes / 'images' / split}" for split in ("train", "val")),
        *opts,
        *SMALL_DETECTOR,
    )
    metrics = [json.loads(line) for line in open(output / name / "metrics.json")]
    last = next(line for line in reversed(metrics) if "bbox/AP" in line)
    return last["bbox/AP"], last["bbox/AP50"], seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default="quickstart_output", metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0, help="of the shapes and the training")
    parser.add_argument("--iterations", type=int, default=150, help="of (c) and (d); (a): 6 times")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier quickstart")
    args = parser.parse_args()
    if args.seed < 0 or args.iterations < 1:
        parser.error(f"--seed {args.seed} must be 0 or more, --iterations {args.iterations} 1")
    output = args.output
    try:
        prepare_output(output, args.overwrite)
    except OSError as error:
        parser.error(str(error))

    for seed, (name, (classes, images)) in enumerate(DATA.items(), start=args.seed):
        options = [f"--classes={classes}", f"--train={images}", f"--size={SIZE}", f"--seed={seed}"]
        folder = output / "shapes" / name
        run(f"draw the {name} shapes", output, DRAW_SHAPES, f"--output={folder}", *options)
    seed = f"train.seed={args.seed}"
    title = "(a) train a detector on the source classes, with batch norm learning"
    iterations = 6 * args.iterations
    source = train(title, output, "source", "source", iterations, seed, *RANDOM_WEIGHTS)
    title = "(b) save its backbone as a timm checkpoint"
    backbone = output / "backbone.safetensors"
    trained = output / "source" / "model_final.pth"
    run(title, output, (*DETBACKBONES, "backbone"), trained, backbone)
    title = "(c) fine-tune from that checkpoint on the target classes, with batch norm frozen"
    checkpoint = f"model.backbone.bottom_up.checkpoint_path={backbone}"
    opts = (seed, checkpoint, *FROZEN_NORM)
    finetune = train(title, output, "finetune", "target", args.iterations, *opts)
    title = "(d) train on the target classes from random weights"
    opts = (seed, *RANDOM_WEIGHTS)
    scratch = train(title, output, "scratch", "target", args.iterations, *opts)

    rows = [
        ("(a) source classes, random weights, BN", iterations, *source),
        ("(c) target classes, backbone of (a), FrozenBN", args.iterations, *finetune),
        ("(d) target classes, random weights, BN", args.iterations, *scratch),
    ]
    headers = ("detector", "iterations", "AP", "AP50", "seconds")
    print("\n" + tabulate(rows, headers, tablefmt="github", floatfmt=("", "", ".1f", ".1f", ".0f")))
    print("\nGround truth beside predictions, and the curves:")
    for name in ("source", "finetune", "scratch"):
        print(f"    {output / name / 'predictions.png'}  {output / name / 'curves.png'}")
    print(f"The backbone: {backbone}\nThe commands: {output / 'commands.sh'}")


if __name__ == "__main__":
    main()
