"""Pictures of what a model predicts and of how its training went."""

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data import Metadata
from detectron2.data.detection_utils import read_image
from detectron2.structures import BoxMode, polygons_to_bitmask
from detectron2.utils.colormap import colormap
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from .trainer import main_losses

PANEL_WIDTH = 6.0  # inches
MAX_LABELS = 10  # a picture with more objects has a legend only
UNPAINTED = {"background", "things"}  # stuff that says where none of the classes is
KINDS = ("panoptic_seg", "instances", "sem_seg")
METRICS = r"(bbox|segm|keypoints)/AP(50)?$|sem_seg/mIoU$|panoptic_seg/PQ$"


class _Region(NamedTuple):
    """An object or a class in an image: its mask (H, W), or else its box (x0, y0, x1, y1)."""

    name: str
    mask: np.ndarray | None
    box: np.ndarray | None
    label: str


def draw_predictions(
    images: Sequence[dict[str, Any]],
    predictions: Sequence[dict[str, Any]],
    metadata: Metadata,
    path: str | Path,
    score_threshold: float = 0.5,
) -> Path:
    """Draw ground truth (left) next to predictions (right), one row for each image.

    Of several predictions for an image the richest is drawn: panoptic_seg, instances, then sem_seg.
    Masks are drawn if there are any, boxes otherwise; stuff named background or things is left
    unpainted. An image without ground truth of that kind is shown plain on the left.

    Args:
        images: detectron2 dataset dicts: `file_name`, and `annotations` or `sem_seg_file_name`.
        predictions: for each image what the model returned for it at the image's own size:
            `{"instances": Instances}`, `{"sem_seg": (C, H, W) tensor}` or
            `{"panoptic_seg": ((H, W) tensor, segments_info)}`.
        metadata: the data set's entry in `MetadataCatalog`, with `thing_classes` for instances and
            `stuff_classes` for semantic segmentation.
        path: the PNG file to write; its folder is made.
        score_threshold: instances with a lower score, in 0..1, are left out.

    Returns:
        `path`.

    Raises:
        ValueError: if images and predictions are not of one length or size, a prediction is of no
            known kind, or `metadata` lacks the names of its classes.
    """
    if not images or len(images) != len(predictions):
        raise ValueError(
            f"images and predictions must be of one length, at least 1; got {len(images)} and "
            f"{len(predictions)}."
        )
    rows = []
    for image, prediction in zip(images, predictions):
        kind = next((kind for kind in KINDS if kind in prediction), None)
        if kind is None:
            raise ValueError(
                f"predictions: found the keys {sorted(prediction)} for {image['file_name']}; one "
                f"of {', '.join(KINDS)} is needed."
            )
        pixels = read_image(image["file_name"], "RGB")
        size = _size(prediction[kind], kind)
        if size != pixels.shape[:2]:
            raise ValueError(
                f"predictions: {kind} has the height and width {size} for {image['file_name']}, "
                f"which has {pixels.shape[:2]}; they must be the same."
            )
        truth = _truth(image, kind, size, metadata)
        if kind == "instances" and not prediction[kind].has("pred_masks"):
            truth = [region._replace(mask=None) for region in truth]  # like beside like
        rows.append((pixels, truth, _predicted(prediction[kind], kind, metadata, score_threshold)))

    heights = [PANEL_WIDTH * pixels.shape[0] / pixels.shape[1] for pixels, _, _ in rows]
    figure = Figure((2 * PANEL_WIDTH + 0.2, sum(heights) + 0.8), dpi=100, layout="constrained")
    grid = figure.subplots(len(rows), 2, squeeze=False, height_ratios=heights)
    colors = _palette(metadata)
    for axes, (pixels, truth, predicted) in zip(grid, rows):
        _draw_regions(axes[0], pixels, truth, colors)
        _draw_regions(axes[1], pixels, predicted, colors)
    for axes, title in zip(grid[0], ("ground truth", "prediction")):
        axes.set_title(title, fontsize=14)
    drawn = {region.name for _, *sides in rows for side in sides for region in side} - UNPAINTED
    if drawn:
        figure.legend(
            handles=[Patch(color=colors[name], label=name) for name in colors if name in drawn],
            loc="outside lower center",
            ncols=min(len(drawn), 7),
            fontsize=12,
            frameon=False,
        )
    return _save(figure, path)


def _size(prediction: Any, kind: str) -> tuple[int, int]:
    if kind == "instances":
        return tuple(prediction.image_size)
    segmentation = prediction[0] if kind == "panoptic_seg" else prediction
    return tuple(segmentation.shape[-2:])


def _truth(
    image: dict[str, Any], kind: str, size: tuple[int, int], metadata: Metadata
) -> list[_Region]:
    if kind == "panoptic_seg" and "pan_seg_file_name" in image:
        rgb = read_image(image["pan_seg_file_name"], "RGB").astype(np.int64)
        return _panoptic(rgb @ [1, 256, 256**2], image["segments_info"], metadata)
    regions = []
    if kind != "instances" and "sem_seg_file_name" in image:
        regions += _semantic(read_image(image["sem_seg_file_name"], "L")[:, :, 0], metadata)
    if kind != "sem_seg":
        for annotation in image.get("annotations", []):
            mask = annotation.get("segmentation")
            if isinstance(mask, list):
                mask = polygons_to_bitmask(mask, *size)
            elif mask is not None:
                mask = mask_util.decode(mask).astype(bool)
            box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            regions.append(_thing(metadata, annotation["category_id"], mask, np.array(box)))
    return regions


def _predicted(
    prediction: Any, kind: str, metadata: Metadata, score_threshold: float
) -> list[_Region]:
    if kind == "sem_seg":
        return _semantic(prediction.argmax(dim=0).cpu().numpy(), metadata)
    if kind == "panoptic_seg":
        segmentation, segments_info = prediction
        if segments_info is None:
            raise ValueError("predictions: panoptic_seg needs its segments_info, which is None.")
        return _panoptic(segmentation.cpu().numpy(), segments_info, metadata)
    instances = prediction[prediction.scores >= score_threshold].to("cpu")
    nothing = [None] * len(instances)
    boxes = instances.pred_boxes.tensor.numpy() if instances.has("pred_boxes") else nothing
    masks = (
        np.asarray(instances.pred_masks).astype(bool) if instances.has("pred_masks") else nothing
    )
    classes, scores = instances.pred_classes.tolist(), instances.scores.tolist()
    return [_thing(metadata, *fields) for fields in zip(classes, masks, boxes, scores)]


def _semantic(labels: np.ndarray, metadata: Metadata) -> list[_Region]:
    present = set(np.unique(labels).tolist()) - {metadata.get("ignore_label", 255)}
    return [_stuff(metadata, index, labels == index) for index in sorted(present)]


def _panoptic(
    segmentation: np.ndarray, segments_info: list[dict[str, Any]], metadata: Metadata
) -> list[_Region]:
    regions = []
    for segment in segments_info:
        mask, category = segmentation == segment["id"], segment["category_id"]
        if segment["isthing"]:
            regions.append(_thing(metadata, category, mask, None, segment.get("score")))
        else:
            regions.append(_stuff(metadata, category, mask))
    return regions


def _stuff(metadata: Metadata, category: int, mask: np.ndarray) -> _Region:
    return _Region(_name(metadata, "stuff_classes", category), mask, None, "")


def _thing(
    metadata: Metadata,
    category: int,
    mask: np.ndarray | None,
    box: np.ndarray | None,
    score: float | None = None,
) -> _Region:
    name = _name(metadata, "thing_classes", category)
    return _Region(name, mask, box, name if score is None else f"{name} {score:.0%}")


def _name(metadata: Metadata, kind: str, category: int) -> str:
    names = metadata.get(kind, [])
    if category >= len(names):
        raise ValueError(
            f"metadata of {metadata.get('name')!r} has {len(names)} {kind}, which is too few to "
            f"name class {category}; set {kind} to the classes that the model was trained on."
        )
    return names[category]


def _palette(metadata: Metadata) -> dict[str, np.ndarray]:
    """Return one colour for each class name, be it a thing's or stuff's."""
    names = [*metadata.get("thing_classes", []), *metadata.get("stuff_classes", [])]
    bright = [color for color in colormap(rgb=True, maximum=1) if np.ptp(color) > 0.3]
    return dict(zip(dict.fromkeys(names), itertools.cycle(bright)))


def _area(region: _Region) -> float:
    if region.mask is not None:
        return float(region.mask.sum())
    return float(np.prod(region.box[2:] - region.box[:2]))


def _draw_regions(
    axes: Axes, pixels: np.ndarray, regions: list[_Region], colors: dict[str, np.ndarray]
) -> None:
    height, width = pixels.shape[:2]
    pixels = pixels.astype(float) / 255
    painted = [region for region in regions if region.name not in UNPAINTED]
    regions = sorted(painted, key=_area, reverse=True)  # small ones on top
    for name, mask, box, _ in regions:
        if mask is None:
            x0, y0, x1, y1 = box
            axes.add_patch(
                Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, lw=2, edgecolor=colors[name])
            )
        elif mask.any():
            pixels[mask] = 0.6 * pixels[mask] + 0.4 * colors[name]
            # The frame of zeros closes the outlines of masks at the image's border.
            x, y = np.arange(-0.5, width + 1), np.arange(-0.5, height + 1)
            axes.contour(x, y, np.pad(mask, 1), [0.5], colors=[colors[name]], linewidths=1.5)
    axes.imshow(pixels.clip(0, 1), extent=(0, width, height, 0))
    axes.axis("off")
    labelled = [region for region in regions if region.label]
    for _, mask, box, label in labelled if len(labelled) <= MAX_LABELS else []:
        if mask is not None and mask.any():
            ys, xs = np.nonzero(mask)
            box = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
        if box is None:
            continue
        on_the_right = box[0] > 0.75 * width
        axes.text(
            min(box[2], width) if on_the_right else max(box[0], 0),
            max(box[1], 0),
            label,
            fontsize=9,
            color="white",
            ha="right" if on_the_right else "left",
            va="bottom" if box[1] > 0.05 * height else "top",
            bbox={"facecolor": "black", "alpha": 0.6, "pad": 1, "edgecolor": "none"},
        )


def draw_curves(metrics_file: str | Path, path: str | Path) -> Path:
    """Draw the losses, the learning rate and the metrics of a training run over its iterations.

    Left are the total loss, its parts and, below them, the learning rate; right are AP, AP50, mIoU
    and PQ, if the run was evaluated. Losses of a decoder's inner layers are left out.
    Where a resumed run repeats an iteration, the later value counts.

    Args:
        metrics_file: the `metrics.json` that detectron2's `JSONWriter` wrote.
        path: the PNG file to write; its folder is made.

    Returns:
        `path`.

    Raises:
        ValueError: if the file has no losses.
    """
    curves = _read_curves(metrics_file)
    losses = main_losses(curves)
    metrics = [k for k in curves if re.search(METRICS, k)]
    if not losses:
        raise ValueError(f"metrics_file={str(metrics_file)!r} has no losses, such as 'total_loss'.")

    columns = [["loss", "metric"], ["lr", "metric"]] if metrics else [["loss"], ["lr"]]
    figure = Figure((6.5 * len(columns[0]), 5), dpi=100, layout="constrained")
    axes = figure.subplot_mosaic(columns, height_ratios=[4, 1])
    for name in sorted(losses, key=lambda name: (name != "total_loss", name)):
        iterations, values = _smooth(*curves[name])
        look = {"lw": 2, "color": "black"} if name == "total_loss" else {"lw": 1.2}
        axes["loss"].plot(iterations, values, _marker(values), label=name, **look)
    if "lr" in curves:
        axes["lr"].plot(*curves["lr"], _marker(curves["lr"][0]), color="gray", lw=1)
    for name in sorted(metrics):
        axes["metric"].plot(*curves[name], marker="o", markersize=4, label=name)
    for key, label in ("loss", "loss"), ("lr", "learning rate"), ("metric", "percent"):
        if key in axes:
            axes[key].set_ylabel(label)
            axes[key].grid(alpha=0.3)
            axes[key].set_ylim(bottom=min(0, axes[key].dataLim.y0))
            if key != "lr":
                axes[key].sharex(axes["lr"])
                axes[key].legend(fontsize=9)
            axes[key].set_xlabel("iteration")
            axes[key].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes["loss"].tick_params(labelbottom=False)
    axes["loss"].set_xlabel("")
    return _save(figure, path)


def _read_curves(metrics_file: str | Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return the iterations and the values of each scalar, in the order of the iterations."""
    scalars: dict[str, dict[int, float]] = {}
    for line in Path(metrics_file).read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # a run that was killed leaves a line unfinished
        iteration = row.pop("iteration")
        for name, value in row.items():
            scalars.setdefault(name, {})[iteration] = value
    return {
        name: tuple(np.array(sorted(values.items()), dtype=float).T)
        for name, values in scalars.items()
    }


def _marker(values: np.ndarray) -> str:
    """The format of a curve: a line, or a dot where there is one value alone."""
    return "-" if len(values) > 1 else "."


def _smooth(iterations: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    half = len(values) // 100  # a moving mean over 2% of the run
    window = np.ones(2 * half + 1) / (2 * half + 1)
    return iterations[half : len(values) - half], np.convolve(values, window, mode="valid")


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
