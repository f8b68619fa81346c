"""Evaluating a model: the metrics, their tables, and a picture of what is predicted."""

import contextlib
import io
import logging
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import Metadata, MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.utils import comm
from omegaconf import DictConfig
from PIL import Image
from tabulate import tabulate
from timm.utils import distribute_bn
from torch import nn

from ..data.evaluator import CocoEvaluator
from ..data.loader import TrainLoader
from .errors import draw_errors
from .pictures import draw_batch, draw_predictions
from .trainer import AMP_DTYPES

logger = logging.getLogger(__name__)

Results = dict[str, dict[str, float]]


def evaluate_model(
    cfg: DictConfig, model: nn.Module, before_batch: Callable[[], None] | None = None
) -> tuple[Results, CocoEvaluator | None]:
    """Evaluate a model on the test set, with autocast if training has it.

    Batch norm that learns has other running statistics in each process. What is evaluated is what
    the main process writes to its checkpoints.

    Args:
        cfg: the config.
        model: the detector.
        before_batch: is called before each batch.

    Returns:
        the metrics, and the evaluator of objects if the config has one.
    """
    if comm.get_world_size() > 1:
        distribute_bn(model, comm.get_world_size())
    amp = cfg.train.amp
    dtype = AMP_DTYPES[amp.dtype] if amp.enabled else None
    with torch.autocast(cfg.train.device, dtype, enabled=amp.enabled):
        loader, evaluator = map(instantiate, (cfg.dataloader.test, cfg.dataloader.evaluator))
        callbacks = {"before_inference": before_batch} if before_batch else None
        with contextlib.redirect_stdout(io.StringIO()) as printed:  # by hotcoco
            results = inference_on_dataset(model, loader, evaluator, callbacks)
    logging.getLogger("detbackbones.evaluation").info("printed\n%s", printed.getvalue())
    if comm.is_main_process():
        logger.info("metrics\n%s", "\n\n".join(metric_tables(results)))
    evaluators = evaluator if isinstance(evaluator, list) else [evaluator]
    of_objects = (x for x in evaluators if isinstance(x, CocoEvaluator))
    return results, next(of_objects, None)


def metric_tables(results: Results) -> list[str]:
    """A table of each task's metrics, and one of those that it has of classes, such as AP-cat.

    What a class without a true box has is no number, and is left out.
    """
    tables = []
    for task, metrics in without_nan(results).items():
        if not isinstance(metrics, dict):  # an evaluator may give single numbers
            metrics = {task: metrics}
        metrics, whole = _renamed(metrics), whole_metrics(metrics)
        tables.append(_table([[task, *whole.values()]], ["", *whole]))
        classes: dict[str, dict[str, float | None]] = {}
        for name, value in metrics.items():
            kind, dash, class_name = name.partition("-")
            if dash:
                classes.setdefault(class_name, {})[kind] = value
        if classes:
            kinds = [*next(iter(classes.values()))]
            rows = [[name, *(row.get(kind) for kind in kinds)] for name, row in classes.items()]
            tables.append(_table(rows, ["class", *kinds]))
    return tables


def whole_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of a task without those of single classes, such as AP-cat."""
    return {name: value for name, value in _renamed(metrics).items() if "-" not in name}


def _renamed(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics with a dash before the name of a class alone, which detectron2's "B-Iou" has too."""
    return {name.replace("B-Iou", "BoundaryIoU"): value for name, value in metrics.items()}


def _table(rows: list[list], headers: list[str]) -> str:
    numbers = {"floatfmt": ".1f", "missingval": "-", "disable_numparse": [0]}
    return tabulate(rows, headers, tablefmt="github", **numbers)


def without_nan(results: Any) -> Any:
    """The same with None for what is no number, which JSON has not."""
    if isinstance(results, dict):
        return {key: without_nan(value) for key, value in results.items()}
    return None if isinstance(results, float) and math.isnan(results) else results


def draw_pictures(
    cfg: DictConfig, model: nn.Module, evaluator: CocoEvaluator | None, prefix: str = ""
) -> list[Path]:
    """Draw ground truth beside predictions, of some images and of the hardest, and the errors.

    Args:
        cfg: the config; ``train.pictures`` says how many images, and 0 none.
        model: the detector.
        evaluator: of its objects.
        prefix: of the files' names.

    Returns:
        the files.
    """
    folder, count = Path(cfg.train.output_dir), cfg.train.pictures
    dataset = instantiate(cfg.dataloader.test.dataset)
    count = min(count, len(dataset))
    if not count:
        return []
    for name in ("errors", "hardest"):  # which may have no successors
        (folder / f"{prefix}{name}.png").unlink(missing_ok=True)
    shown = [dataset[i * len(dataset) // count] for i in range(count)]
    files = [_draw(cfg, model, shown, folder / f"{prefix}predictions.png")]
    if evaluator and evaluator.evaluations:
        files.append(draw_errors(evaluator.evaluations, folder / f"{prefix}errors.png"))
        by_id = {image["image_id"]: image for image in dataset}
        hardest = [by_id[key] for key in evaluator.hardest_images(-(-count // 2)) if key in by_id]
        if hardest:
            files.append(_draw(cfg, model, hardest, folder / f"{prefix}hardest.png"))
    return files


def draw_first_batch(cfg: DictConfig, loader: Iterable) -> list[Path]:
    """Draw what the first batch of a training shows the model, ``train.pictures`` at most.

    Args:
        cfg: the config.
        loader: of batches; of another kind than :class:`TrainLoader` nothing is drawn.

    Returns:
        the file.
    """
    if not cfg.train.pictures or not isinstance(loader, TrainLoader):
        return []
    batch = loader.first_batch(cfg.train.pictures)
    metadata = _metadata(cfg.dataloader.train)
    bgr = cfg.dataloader.train.mapper.get("image_format") == "BGR"
    return [draw_batch(batch, metadata, Path(cfg.train.output_dir, "batch.png"), bgr)]


def show_in_tensorboard(pictures: list[Path], iteration: int) -> None:
    """Let TensorBoard show pictures of a run, which are in its folder."""
    if not pictures:
        return
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and for trainings alone

    with SummaryWriter(str(pictures[0].parent)) as writer:
        for file in pictures:
            with Image.open(file) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            writer.add_image(file.stem, pixels, iteration, dataformats="HWC")


def _draw(cfg: DictConfig, model: nn.Module, images: list[dict], path: Path) -> Path:
    mapper = instantiate(cfg.dataloader.test.mapper)
    model.eval()
    with torch.no_grad():
        predictions = [model([mapper(image)])[0] for image in images]
    metadata = _metadata(cfg.dataloader.test)
    read = getattr(mapper, "picture", None)
    threshold = cfg.train.score_threshold
    return draw_predictions(images, predictions, metadata, path, threshold, read)


def _metadata(loader: DictConfig) -> Metadata:
    """That of the data set; of several, which have the same classes, the first one's."""
    names = instantiate(loader.dataset.names)
    return MetadataCatalog.get(names if isinstance(names, str) else names[0])
