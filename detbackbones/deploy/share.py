"""Sharing a trained detector: a folder as the Hugging Face hub has them, with a model card."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from omegaconf import OmegaConf
from tabulate import tabulate

from ..config import load_config
from ..data.files import new_folder
from ..training.metrics import EVALUATED
from ..training.record import CONFIG, KEY
from ..weights import read_checkpoint, write_checkpoint
from ..weights.packages import package_of
from .hub import PREFIX, WEIGHTS
from .predictor import Predictor

CARD = "README.md"
TASKS = {True: "object-detection", False: "image-segmentation"}  # the hub's, by having objects
SETTINGS = (  # of a training's config that the card tells
    "train.max_iter",
    "dataloader.train.total_batch_size",
    "dataset.train_sizes",
    "dataset.val_size",
    "optimizer.lr",
)


def save_pretrained(
    predictor: Predictor,
    folder: str | Path,
    *,
    name: str | None = None,
    data: str | None = None,
    license: str | None = None,
) -> Path:
    """Write a trained detector to a folder that can be put on the Hugging Face hub.

    It gets ``model.safetensors``; ``config.json``, by which :class:`Predictor` builds the detector;
    and ``README.md``, the model card. No path of the training's data is in them.

    Args:
        predictor: of a run's folder, or of a checkpoint.
        folder: to write to; it must not exist or be empty.
        name: of the model; by default the folder's.
        data: what it was trained on, a sentence for the card.
        license: of the model, such as "apache-2.0"; the hub's identifiers.

    Returns:
        the folder.

    Raises:
        FileExistsError: if the folder holds files.
    """
    name = name or Path(folder).absolute().name
    tensors = predictor.model.state_dict()
    # some detectors share tensors between layers, which the format does not know
    tensors = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    with new_folder("folder", folder) as unfinished:
        write_checkpoint(tensors, str(unfinished / WEIGHTS))
        content = {"library_name": "detbackbones", KEY: predictor.record}
        (unfinished / CONFIG).write_text(json.dumps(content, indent=1) + "\n")
        (unfinished / CARD).write_text(_card(predictor, name, data, license))
    return Path(folder)


def _card(predictor: Predictor, name: str, data: str | None, license: str | None) -> str:
    """The model card."""
    metrics, task = _metrics(predictor.checkpoint), TASKS[predictor.gives_objects]
    results = [
        EvalResult(task, "custom", data or "unnamed", key, round(value, 2), metric_name=key)
        for key, value in metrics.items()
        if "-" not in key
    ]
    known = ModelCardData(
        license=license,
        library_name="detbackbones",
        pipeline_tag=task,
        tags=["detectron2", "timm", task],
        model_name=name,
        eval_results=results or None,
    )
    detector = _kind(predictor.record["model"])
    backbones = [*_backbones(predictor.record["model"])]
    rows = []
    for i, label in enumerate(predictor.classes):
        own = {k: v for k, v in metrics.items() if k.rpartition("-")[2] == label and "-" in k}
        rows.append([i, label, *(f"{value:.1f}" for value in own.values())])
        columns = ["number", "class", *(key.rpartition("-")[0] for key in own)]
    order = sorted((key for key in metrics if "-" not in key), key=_order)
    whole = [[key, f"{metrics[key]:.1f}"] for key in order]
    versions = ", ".join(f"{key} {value}" for key, value in predictor.record["versions"].items())
    training = [[f"`{key}`", str(value)] for key, value in _settings(predictor.checkpoint)]
    backbone = " and ".join(f"`{x}`" for x in backbones) or "its own backbone"
    objects = """\
predictor.classes  # names of the classes
instances = predictor("image.jpg")["instances"]  # of detectron2: boxes, scores, classes
detections = predictor.detections("image.jpg")  # of supervision"""
    labels = """\
predictor.classes  # names of the classes
scores = predictor("image.jpg")["sem_seg"]  # (classes, height, width)"""
    text = f"""\
# {name}

{detector} on {backbone}, for {task.replace("-", " ")}.

It was trained with detbackbones, which makes models of timm and torchvision detectron2 backbones.

## Use

With detbackbones and detectron2 installed, the latter by `detbackbones install-detectron2`:

```python
from detbackbones import Predictor

predictor = Predictor("{PREFIX}USER/{name}")  # or the folder of this file
{objects if predictor.gives_objects else labels}
```

## Classes

{_table(rows, columns)}

## Metrics

{_table(whole, ["metric", "value"]) or "None is known."}

On the validation set of the training, in percent; `AP` is COCO's, over IoU of 0.50 to 0.95.

## Training

Data: {data or "nothing is said of them."}

{_start(predictor.checkpoint, backbones)}

{_table(training, ["setting", "value"])}

{versions}

## Licence

{license or "None is given: ask the author before you use it."}
"""
    return str(ModelCard(f"---\n{known.to_yaml()}\n---\n\n{text}"))


def _table(rows: list[list], headers: list[str]) -> str:
    return tabulate(rows, headers, "github", disable_numparse=True) if rows else ""


def _backbones(node: Any) -> Iterator[str]:
    """Names of the models of timm or torchvision in a config."""
    if isinstance(node, dict):
        if isinstance(node.get("model_name"), str):
            yield node["model_name"]
        for value in node.values():
            yield from _backbones(value)


def _kind(model: dict[str, Any]) -> str:
    """What a detector is called, by its config."""
    if "architecture" in model:
        return model["architecture"].upper()
    name, heads = model["_target_"].rpartition(".")[2], model.get("roi_heads") or {}
    if name != "GeneralizedRCNN":
        return name
    kind = "Mask R-CNN" if heads.get("mask_head") else "Faster R-CNN"
    return kind if "Cascade" not in heads.get("_target_", "") else f"Cascade {kind}"


def _order(key: str) -> tuple[str, int]:
    """Tasks together, and AP, AP50, ... as COCO orders them."""
    task, _, metric = key.partition("/")
    known = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    return task, known.index(metric) if metric in known else len(known)


def _start(checkpoint: str, backbones: list[str]) -> str:
    """What a training started from, by its config, and under what licence that is."""
    try:
        cfg = load_config(Path(checkpoint).with_name("config.yaml"))
    except (OSError, ValueError):
        return "What it started from is not known."
    if file := OmegaConf.select(cfg, "train.init_checkpoint"):
        return f"It started from a checkpoint, `{Path(file).name}`."
    backbone = OmegaConf.select(cfg, "model.backbone.bottom_up", default=cfg.model.get("backbone"))
    if file := backbone.get("checkpoint_path"):
        return f"The backbone started from a checkpoint, `{Path(file).name}`."
    if not (backbone.get("pretrained") or backbone.get("weights")):
        return "It started from random weights."
    said = "The backbone started from pretrained weights."
    for name in backbones:
        known = timm.is_model(name) and timm.get_pretrained_cfg(name)
        if known and known.license:
            source, package = known.hf_hub_id or known.url, package_of(name)
            said += f" Those of timm are `{source}`, under {known.license}."
            if package:
                said += (
                    " Where the hub could not be reached they were those of the package "
                    f"`{package}`, which another project has converted: the log of the training "
                    "says so."
                )
    return said


def _metrics(checkpoint: str) -> dict[str, float]:
    """What the evaluation of a checkpoint found, by its run's ``metrics.json``."""
    file = Path(checkpoint).with_name("metrics.json")
    if not (file.is_file() and checkpoint.endswith((".pth", ".pt"))):
        return {}
    content = read_checkpoint(checkpoint)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines = [line for line in lines if EVALUATED in line]
    if (metric := content.get("metric")) is not None:  # of the best
        lines = [line for line in lines if line.get(metric) == content["value"]]
    else:  # the last evaluation is recorded for the iteration after the last
        lines = [x for x in lines if 0 <= x["iteration"] - content.get("iteration", -2) <= 1]
    found = lines[-1] if lines else {}
    keys = [key for key in found if "/" in key and not key.startswith("evaluation/")]
    return {key: found[key] for key in keys if found[key] == found[key]}  # no NaN


def _settings(checkpoint: str) -> list[tuple[str, Any]]:
    """Settings of the training, if its config is beside the checkpoint."""
    try:
        cfg = load_config(Path(checkpoint).with_name("config.yaml"))
    except (OSError, ValueError):
        return []
    found = [(key, OmegaConf.select(cfg, key)) for key in SETTINGS]
    return [(key, value) for key, value in found if value is not None]
