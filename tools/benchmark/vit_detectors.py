"""Faster R-CNN on a plain ViT: the ways to levels and to train it, with the same weights.

    detbackbones distill tf_efficientnet_lite0 vit_tiny_patch16_224 IMAGES --output output/vit
    python tools/benchmark/vit_detectors.py FOLDER output/vit/student.safetensors \
        --output output/vit_detectors

FOLDER has train.json, val.json and images/. Each run is a `detbackbones train` whose command is
kept beside its results in runs.jsonl; runs that are there already are not repeated. The table has
AP, the mean over the seeds with the lowest and the highest, and medians of seconds, with start and
evaluation, and of the peak of memory of the process.
"""

import argparse
import re
import statistics
from pathlib import Path

from runs import folder_of, train_all
from tabulate import tabulate

BOTTOM_UP = "model.backbone.bottom_up"
PYRAMID = ("faster_rcnn", BOTTOM_UP)
ADAPTER = ("faster_rcnn_vit_adapter", f"{BOTTOM_UP}.net")
PLAIN = [f"{BOTTOM_UP}.norm=", f"{BOTTOM_UP}.freeze_at=0"]  # the config is for convolutions
# config and key of the ViT, overrides, and whether the given weights are loaded
SETTINGS = {
    "simple pyramid": (PYRAMID, PLAIN, True),
    "adapter": (ADAPTER, [f"{BOTTOM_UP}.net.patch_size=null"], True),
    "simple pyramid, LoRA": (PYRAMID, [*PLAIN, f"{BOTTOM_UP}.lora_rank=4"], True),
    "simple pyramid, LoRA of attention": (
        PYRAMID,
        [*PLAIN, f"{BOTTOM_UP}.lora_rank=8", f"{BOTTOM_UP}.lora_layers=[attn.qkv,attn.proj]"],
        True,
    ),
    "simple pyramid, frozen": (PYRAMID, [PLAIN[0], f"{BOTTOM_UP}.freeze_at=5"], True),
    "simple pyramid, frozen, cached": (
        PYRAMID,
        [PLAIN[0], f"{BOTTOM_UP}.freeze_at=5", "train.feature_cache=2"],
        True,
    ),
    "simple pyramid, random weights": (PYRAMID, PLAIN, False),
}


def words_of(name: str, seed: int, args: argparse.Namespace) -> list[str]:
    """The words of a run but for its output folder."""
    (config, key), more, loads = SETTINGS[name]
    words = ["--config-file", f"finetune/{config}.py", f"train.seed={seed}"]
    words += [f"dataset.{split}_json={args.folder}/{split}.json" for split in ("train", "val")]
    words += [f"dataset.{split}_images={args.folder}/images" for split in ("train", "val")]
    words += [f"{key}.model_name={args.model}", f"{key}.pretrained=False", *more]
    words += [f"{key}.final_norm=True"]  # as it was distilled
    words += ["optimizer.lr=5e-4", "optimizer.params.layer_decay=1.0"]
    if loads:
        words += [f"{key}.checkpoint_path={args.weights}"]
    words += ["dataset.train_sizes=[288]", "train.pictures=0", f"train.max_iter={args.iterations}"]
    words += [
        f"train.eval_period={args.iterations}",
        f"train.checkpointer.period={args.iterations}",
    ]
    return [*words, "dataloader.train.num_workers=1", "dataloader.test.num_workers=1", *args.add]


def peak(folder: Path) -> int:
    """The peak of memory in MiB that a run's log tells."""
    text = (folder / "log.txt").read_text()
    return max(map(int, re.findall(r"progress INFO: .* (\d+) MiB", text)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the data")
    parser.add_argument("weights", type=Path, help="of the ViT")
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--iterations", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; default: %(default)s")
    parser.add_argument("--add", nargs="+", default=[], metavar="KEY=VALUE", help="to all runs")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    args = parser.parse_args()
    for path in (args.folder, args.weights):
        if not path.exists():
            parser.error(f"{str(path)!r} does not exist")
    keys = [(name, seed) for seed in range(args.seeds) for name in args.only]
    cases = {key: (words_of(*key, args), "bbox/AP") for key in keys}
    found = train_all(cases, args.output, args.jobs)
    rows = []
    for name in args.only:
        runs = [found[name, seed] for seed in range(args.seeds)]
        values = [run["curve"][-1][1] for run in runs]
        seconds = statistics.median(run["seconds"] for run in runs)
        mib = statistics.median(peak(folder_of(args.output, (name, s))) for s in range(args.seeds))
        rows.append((name, statistics.mean(values), min(values), max(values), seconds, mib))
    headers = ("setting", "AP", "lowest", "highest", "seconds", "MiB")
    print(tabulate(rows, headers, "github", floatfmt=("", ".1f", ".1f", ".1f", ".0f", ".0f")))


if __name__ == "__main__":
    main()
