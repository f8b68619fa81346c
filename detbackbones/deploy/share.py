"""Sharing a trained detector: a folder as the Hugging Face hub has them, with a model card."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate

from ..config import load_config
from ..data.files import new_folder
from ..training.evaluation import Results, metric_tables, whole_metrics
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
        EvalResult(task, "custom", data or "unnamed", f"{part}/{key}", round(value, 2))
        for part, found in metrics.items()
        for key, value in whole_metrics(found).items()
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
    backbones = [node["model_name"] for node in _models(predictor.record["model"])]
    cfg = _config(predictor.checkpoint)
    classes = tabulate(enumerate(predictor.classes), ["number", "class"], "github")
    versions = ", ".join(f"{key} {value}" for key, value in predictor.record["versions"].items())
    training = [(f"`{key}`", OmegaConf.select(cfg, key)) for key in SETTINGS]
    training = [(key, str(value)) for key, value in training if value is not None]
    measured = "\n\n".join(metric_tables(metrics))
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

{classes}

## Metrics

{measured or "None is known."}

On the validation set of the training, in percent; `AP` is COCO's, over IoU of 0.50 to 0.95.

## Training

Data: {data or "nothing is said of them."}

{_start(cfg)}

{tabulate(training, ["setting", "value"], "github", disable_numparse=True)}

{versions}

## Licence

{license or "None is given: ask the author before you use it."}
"""
    return str(ModelCard(f"---\n{known.to_yaml()}\n---\n\n{text}"))


def _models(node: Any) -> Iterator[dict[str, Any]]:
    """What a config says of models of timm or torchvision."""
    if isinstance(node, dict):
        if isinstance(node.get("model_name"), str):
            yield node
        for value in node.values():
            yield from _models(value)


def _kind(model: dict[str, Any]) -> str:
    """What a detector is called, by its config."""
    if architecture := model.get("architecture"):
        return architecture.upper()
    name, heads = model["_target_"].rpartition(".")[2], model.get("roi_heads") or {}
    if name != "GeneralizedRCNN":
        return name
    kind = "Mask R-CNN" if heads.get("mask_head") else "Faster R-CNN"
    return kind if "Cascade" not in heads.get("_target_", "") else f"Cascade {kind}"


def _config(checkpoint: str) -> DictConfig:
    """The config of a training, if it is beside the checkpoint; else an empty one."""
    try:
        return load_config(Path(checkpoint).with_name("config.yaml"))
    except (OSError, ValueError):
        return OmegaConf.create()


def _start(cfg: DictConfig) -> str:
    """What a training started from, and under what licence that is."""
    if "model" not in cfg:
        return "What it started from is not known."
    if file := OmegaConf.select(cfg, "train.init_checkpoint"):
        return f"It started from a checkpoint, `{Path(file).name}`."
    models = [*_models(OmegaConf.to_container(cfg.model))]
    for file in filter(None, (model.get("checkpoint_path") for model in models)):
        return f"The backbone started from a checkpoint, `{Path(file).name}`."
    pretrained = [x["model_name"] for x in models if x.get("pretrained") or x.get("weights")]
    if not pretrained:
        return "It started from random weights."
    said = "The backbone started from pretrained weights."
    for name in pretrained:
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


def _metrics(checkpoint: str) -> Results:
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
    found: Results = {}
    for key, value in lines[-1].items() if lines else ():
        task, slash, name = key.partition("/")
        if slash and task != EVALUATED.partition("/")[0] and value == value:  # no NaN
            found.setdefault(task, {})[name] = value
    return found
