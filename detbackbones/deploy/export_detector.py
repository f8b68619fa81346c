"""Exporting a trained detector with what is known of it, and comparing its AP."""

import contextlib
import io
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.evaluation import inference_on_dataset
from omegaconf import DictConfig
from torch import nn
from tqdm import tqdm

from ..config import load_config
from ..data.files import check_new, new_folder
from ..data.images import list_images, read_image
from ..data.transforms import resizing
from ..messages import first_line, one_of
from ..training.evaluation import Results, without_nan
from ..training.record import fill_config, read_record
from ..training.run import check_config
from .agreement import NEAR_INT8
from .export import Report, compare, time_both, write
from .exported import ABOUT, Exported
from .extras import import_exporter
from .predictor import Predictor
from .quantize import PACKAGES, quantize

TRIED, CALIBRATED = 8, 200  # images

logger = logging.getLogger(__name__)


def export_detector(
    predictor: Predictor,
    folder: str | Path,
    *,
    format: str = "onnx",
    size: tuple[int, int] | None = None,
    images: str | Path | None = None,
    int8: str | Path | None = None,
    evaluate: bool = True,
    trust: bool = False,
) -> tuple[Report, dict[str, Results]]:
    """Export a trained detector or segmenter.

    Args:
        predictor: of it, on the CPU; its ``score_threshold`` is that of ``example.py``.
        folder, format, size: see :func:`detbackbones.deploy.export.export`.
        images: the folder of some images to try it with; by default those of the validation set.
        int8: a folder of images of the kind that it will see: it computes with 8 bits, in the
            ranges that they have.
        evaluate: whether to compute the metrics where the validation set is there.
        trust: let the training's config, which names the validation set, call code of other
            packages.

    Returns:
        the report, which is of the 8 bits if asked for; and the metrics of "model", on images of
        the sizes that it was made for, and "exported", and "int8", none without a validation set.

    Raises:
        FileNotFoundError: if there are no images to try it with.
        FileExistsError, ImportError, ValueError: as of ``export``.
    """
    check_new("folder", folder)
    for name in _packages_of_int8(format) if int8 else ():
        import_exporter(name)
    data, why = _validation(predictor, trust)
    if images is None and data is None:
        raise FileNotFoundError(
            f"the validation set of the training cannot be had ({why}): give a folder of images to "
            "try the exported model with (--images)"
        )
    if evaluate and data is None:
        logger.warning("the AP is not computed: %s", why)
    about = _about(predictor)
    own_size = about.pop("size", None)
    size = size or own_size
    files = _names(data) if images is None else list_images(str(images), "images")
    tried = [_load(predictor, file) for file in spread(files, TRIED)]
    calibration = list_images(str(int8), "int8") if int8 else []
    calibration = [_load(predictor, file) for file in spread(calibration, CALIBRATED)]
    metrics: dict[str, Results] = {}
    with new_folder("folder", folder) as unfinished:
        report = write(predictor.model, unfinished, tried, format=format, size=size, about=about)
        exported = Exported(unfinished)
        evaluated = data if evaluate else None
        if evaluated is not None:
            metrics["model"] = _metrics(evaluated, "model", predictor.model)
            metrics["exported"] = _metrics(evaluated, "exported", exported.detect)
        if int8:
            fitted = [exported.fit(image) for image in calibration]
            del exported
            attends = any("Attention" in type(m).__name__ for m in predictor.model.modules())
            quantize(unfinished, fitted, format=format, attends=attends)
            report = _try_int8(report, predictor.model, Exported(unfinished), tried)
            if evaluated is not None:
                metrics["int8"] = _metrics(evaluated, "int8", Exported(unfinished).detect)
        found = {"metrics": without_nan(metrics)} if metrics else {}
        _add(unfinished / ABOUT, {"int8": bool(int8)} | found)
    return replace(report, folder=Path(folder)), metrics


def _packages_of_int8(format: str) -> Sequence[str]:
    one_of("format", format, PACKAGES, " for int8")
    return PACKAGES[format]


def _try_int8(
    report: Report, model: nn.Module, exported: Exported, images: Sequence[torch.Tensor]
) -> Report:
    """The report of a model of 8 bits, whose outputs are others, but must be there and numbers.

    Raises:
        ValueError: if they are not.
    """
    agreement = compare(model, exported, images, NEAR_INT8)
    first = exported.fit(images[0]).float()
    outputs = exported(first[None].numpy())
    if not all(np.isfinite(values).all() for values in outputs.values()):
        raise ValueError("the quantised model gives no numbers: give other images as int8")
    if agreement.objects and agreement.lost == agreement.objects:
        logger.warning("int8: no object is where the model finds one")
    return replace(report, agreement=agreement, seconds=time_both(model, exported, first))


def _validation(predictor: Predictor, trust: bool) -> tuple[DictConfig | None, str]:
    """The config of the training with its validation set registered; or why there is none."""
    file = Path(predictor.checkpoint).with_name("config.yaml")
    try:
        cfg = check_config(load_config(file, trust=trust), ["train.device=cpu"], trains=False)
        if record := read_record(predictor.checkpoint, trust=True):
            fill_config(cfg, record)
        if missing := next((name for name in _names(cfg) if not os.path.isfile(name)), None):
            return None, f"{missing!r} is not there"
    except (OSError, ValueError, KeyError) as error:
        return None, first_line(error)
    return cfg, ""


def _names(cfg: DictConfig) -> list[str]:
    return [image["file_name"] for image in instantiate(cfg.dataloader.test.dataset)]


def spread(files: Sequence[Any], most: int) -> list[Any]:
    """At most so many of some files, from all over them."""
    count = min(most, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def _load(predictor: Predictor, file: str | Path) -> torch.Tensor:
    pixels = read_image(str(file), predictor.channels, predictor.max_value)
    return predictor.prepare(pixels)["image"]


def _about(predictor: Predictor) -> dict[str, Any]:
    """What ``model.json`` says of a detector.

    Raises:
        ValueError: if images are changed in a way that it cannot say.
    """
    about: dict[str, Any] = {
        "classes": predictor.classes,
        "categories": predictor.categories if predictor.gives_objects else [],
        "score_threshold": predictor.score_threshold,
        "channel_order": predictor.mapper.image_format,
        "resize": {},
    }
    if predictor.max_value:
        about["max_value"] = predictor.max_value
    for augmentation in resizing(predictor.mapper.augmentations):
        if isinstance(augmentation, T.ResizeShortestEdge):
            lengths, longer = {*augmentation.short_edge_length}, augmentation.max_size
            if len(lengths) > 1:
                raise ValueError(f"dataloader.test.mapper has several sizes: {sorted(lengths)}")
            (shorter,) = lengths
            about["resize"] = {"shorter_side": shorter, "longer_side": longer}
        else:
            about["size"] = tuple(augmentation.shape)
    return about


def _metrics(cfg: DictConfig, name: str, detect: Callable) -> Results:
    """The metrics of something that takes what detectron2's models take."""
    loader, evaluator = map(instantiate, (cfg.dataloader.test, cfg.dataloader.evaluator))
    with contextlib.redirect_stdout(io.StringIO()):  # hotcoco prints a table
        try:
            return inference_on_dataset(detect, tqdm(loader, name, unit="batch"), evaluator)
        except FloatingPointError as error:
            raise ValueError(f"{name}: {error}") from error


def _add(file: Path, content: dict[str, Any]) -> None:
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | content, indent=1) + "\n")
