"""Exporting a trained detector with what is known of it, and comparing its AP."""

import contextlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import detectron2.data.transforms as T
import torch
from detectron2.config import instantiate
from omegaconf import DictConfig
from tqdm import tqdm

from ..config import load_config
from ..data.images import list_images, read_image
from ..messages import one_of
from ..training.evaluation import Results, without_nan
from ..training.record import fill_config, read_record
from ..training.run import check_config
from .export import Report, export
from .exported import ABOUT, Exported
from .graphs import ObjectsGraph, ScoresGraph, make_graph
from .predictor import Predictor
from .quantize import QUANTIZE, quantize

TRIED, CALIBRATED = 8, 200  # images
Detect = Callable[[Sequence[dict[str, Any]]], list[dict[str, Any]]]


def export_detector(
    predictor: Predictor,
    folder: str | Path,
    *,
    format: str = "onnx",
    size: tuple[int, int] | None = None,
    images: str | Path | None = None,
    int8: str | Path | None = None,
    evaluate: bool = True,
) -> tuple[Report, dict[str, Results]]:
    """Export a trained detector or segmenter.

    Args:
        predictor: of it, on the CPU; its ``score_threshold`` is that of ``example.py``.
        folder, format, size: see :func:`detbackbones.deploy.export.export`.
        images: the folder of some images to try it with; by default those of the validation set.
        int8: a folder of images of the kind that it will see: it computes with 8 bits, in the
            ranges that they have.
        evaluate: whether to compute the metrics where the validation set is there.

    Returns:
        the report, and the metrics of "model" and "exported", and "int8" if asked for; none
        without a validation set.

    Raises:
        FileNotFoundError: if there are no images to try it with.
        FileExistsError, ImportError, ValueError: as of ``export``.
    """
    if int8:
        one_of("format", format, QUANTIZE, " for int8")
    data = _validation(predictor)
    if images is None and data is None:
        raise FileNotFoundError(
            "the validation set of the training is not there: give a folder of images to try the "
            "exported model with (--images)"
        )
    about = _about(predictor)
    size = size or about.pop("size", None)
    files = _files(images) if data is None or images else _names(data)
    tried = [_load(predictor, file) for file in _spread(files, TRIED)]
    calibration = _spread(_files(int8), CALIBRATED) if int8 else []
    report = export(predictor.model, folder, tried, format=format, size=size, about=about)
    exported = Exported(folder)
    metrics = {}
    if evaluate and data is not None:
        metrics = _metrics(
            data, {"model": _at_its_size(predictor, exported), "exported": exported.detect}
        )
    if int8:
        fitted = [exported.fit(_load(predictor, f))[None].float().numpy() for f in calibration]
        del exported
        attends = not isinstance(make_graph(predictor.model), ObjectsGraph | ScoresGraph)
        quantize(Path(folder), fitted, format=format, attends=attends)
        if metrics:
            metrics |= _metrics(data, {"int8": Exported(folder).detect})
    _add(Path(folder, ABOUT), {"metrics": without_nan(metrics)} if metrics else {})
    return report, metrics


def _validation(predictor: Predictor) -> DictConfig | None:
    """The config of the training with its validation set registered, if that is there."""
    file = Path(predictor.checkpoint).with_name("config.yaml")
    try:
        cfg = check_config(load_config(file), ["train.device=cpu"], trains=False)
    except (OSError, ValueError):
        return None
    if record := read_record(predictor.checkpoint, trust=True):
        fill_config(cfg, record)
    return cfg


def _names(cfg: DictConfig) -> list[str]:
    return [image["file_name"] for image in instantiate(cfg.dataloader.test.dataset)]


def _files(folder: str | Path) -> list[str]:
    return [str(file) for file in list_images(str(folder), "images")]


def _spread(files: Sequence[str], most: int) -> list[str]:
    count = min(most, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def _load(predictor: Predictor, file: str) -> torch.Tensor:
    pixels = read_image(file, predictor.channels, predictor.max_value)
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
    for augmentation in predictor.mapper.augmentations.augs:
        if type(augmentation) is T.ResizeShortestEdge:
            shorter, longer = augmentation.short_edge_length[0], augmentation.max_size
            about["resize"] = {"shorter_side": shorter, "longer_side": longer}
        elif type(augmentation) is T.Resize:
            about["size"] = tuple(augmentation.shape)
        else:
            raise ValueError(
                "dataloader.test.mapper.augmentations must be ResizeShortestEdge or Resize, and "
                f"one is {type(augmentation).__name__}"
            )
    return about


def _at_its_size(predictor: Predictor, exported: Exported) -> Detect:
    def detect(inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        with torch.no_grad():
            return predictor.model([x | {"image": exported.fit(x["image"])} for x in inputs])

    return detect


def _metrics(cfg: DictConfig, detectors: dict[str, Detect]) -> dict[str, Results]:
    """The metrics of several detectors on the validation set."""
    loader = instantiate(cfg.dataloader.test)
    evaluators = {name: _evaluators(cfg) for name in detectors}
    for own in evaluators.values():
        for evaluator in own:
            evaluator.reset()
    for inputs in tqdm(loader, unit="batch", desc=" and ".join(detectors)):
        for name, detect in detectors.items():
            outputs = detect(inputs)
            for evaluator in evaluators[name]:
                evaluator.process(inputs, outputs)
    found = {}
    for name, own in evaluators.items():
        with contextlib.redirect_stdout(io.StringIO()):  # hotcoco prints a table
            found[name] = {k: v for e in own for k, v in (e.evaluate() or {}).items()}
    return found


def _evaluators(cfg: DictConfig) -> list[Any]:
    made = instantiate(cfg.dataloader.evaluator)
    return made if isinstance(made, list) else [made]


def _add(file: Path, content: dict[str, Any]) -> None:
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | content, indent=1) + "\n")
