"""Pictures of what a model learns from, and of what it predicts beside the ground truth."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from detectron2.data import Metadata
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.data.transforms import ResizeTransform
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..data.images import read_image, read_label_map, shown_channels
from ..data.mixing import with_bits

PANELS = {2: 592, 4: 442}  # pixels: width of a picture, by how many are in a row
FEW = 4  # images that are drawn in rows of two pictures
GAP = 8  # pixels between pictures
HEADER = 30  # pixels: height of the titles
KINDS = ("panoptic_seg", "instances", "sem_seg")
MAX_LABELS = 10  # a picture with more objects has a legend only
UNPAINTED = {"background", "things"}  # stuff that says where none of the classes is


class _Region(NamedTuple):
    """An object or a class in an image: its mask (H, W), or else its box (x0, y0, x1, y1)."""

    name: str
    label: str
    mask: np.ndarray | None
    box: np.ndarray | None


def draw_predictions(
    images: Sequence[dict[str, Any]],
    predictions: Sequence[dict[str, Any]],
    metadata: Metadata,
    path: str | Path,
    score_threshold: float = 0.5,
    read: Callable[[dict[str, Any]], np.ndarray] | None = None,
) -> Path:
    """Draw ground truth (left) beside predictions (right), an image in a row, or two of many.

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
        read: gives the RGB pixels (H, W, 3) of an image; by default they are read from its file.

    Returns:
        `path`.

    Raises:
        ValueError: if images and predictions are not of one length or size, a prediction is of no
            known kind, or `metadata` lacks the names of its classes.
    """
    if not images or len(images) != len(predictions):
        raise ValueError(
            f"images and predictions must be of one length, at least 1; got {len(images)} and "
            f"{len(predictions)}"
        )
    colors, length = _colors(metadata), _length(2 * len(images))
    pictures, drawn, kinds = [], set(), set()
    for image, prediction in zip(images, predictions):
        pixels = read(image) if read else read_image(image["file_name"])
        kind = _kind(prediction, image["file_name"], pixels.shape[:2])
        kinds.add(kind)
        truth = _truth(image, kind, pixels.shape[:2], metadata)
        if kind == "instances" and not prediction[kind].has("pred_masks"):
            truth = [region._replace(mask=None) for region in truth]  # like beside like
        predicted = _predicted(prediction[kind], kind, metadata, score_threshold)
        sides = [[r for r in side if r.name not in UNPAINTED] for side in (truth, predicted)]
        drawn.update(region.name for side in sides for region in side)
        pictures += [_draw(pixels, side, colors, PANELS[length]) for side in sides]
    title = "prediction"
    if "instances" in kinds:
        title += f", scores from {score_threshold:g}"
    return _save(pictures, length, ("ground truth", title), colors, drawn, path)


def draw_batch(
    samples: Sequence[dict[str, Any]], metadata: Metadata, path: str | Path, bgr: bool = False
) -> Path:
    """Draw images as the model gets them to learn from, augmented.

    Args:
        samples: what a mapper gives: ``image`` (C, H, W) of 0 to 255, and ``instances`` or
            ``sem_seg``; at least one.
        metadata: the data set's entry in `MetadataCatalog`.
        path: the PNG file to write; its folder is made.
        bgr: whether the channels are blue, green and red.

    Returns:
        `path`.
    """
    colors, pictures, drawn = _colors(metadata), [], set()
    length = _length(len(samples))
    for sample in samples:
        pixels = shown_channels(sample["image"].permute(1, 2, 0).numpy())
        pixels = np.ascontiguousarray(pixels[:, :, ::-1]) if bgr else pixels
        regions = []
        if "sem_seg" in sample:
            regions += _stuff(sample["sem_seg"].numpy(), metadata)
        if "instances" in sample:
            regions += _objects(with_bits(sample["instances"]), metadata)
        regions = [region for region in regions if region.name not in UNPAINTED]
        drawn.update(region.name for region in regions)
        pictures.append(_draw(pixels, regions, colors, PANELS[length]))
    return _save(pictures, length, ("what the model sees",), colors, drawn, path)


def draw_annotations(
    images: Sequence[dict[str, Any]], metadata: Metadata, path: str | Path
) -> Path:
    """Draw images with their objects or label maps.

    Args:
        images: detectron2 dataset dicts with ``annotations`` or ``sem_seg_file_name``; at least
            one.
        metadata: the data set's entry in `MetadataCatalog`.
        path: the PNG file to write; its folder is made.

    Returns:
        `path`.
    """
    colors, pictures, drawn = _colors(metadata), [], set()
    length = _length(len(images))
    for image in images:
        pixels = read_image(image["file_name"])
        regions = _truth(image, "panoptic_seg", pixels.shape[:2], metadata)
        regions = [region for region in regions if region.name not in UNPAINTED]
        drawn.update(region.name for region in regions)
        pictures.append(_draw(pixels, regions, colors, PANELS[length]))
    return _save(pictures, length, ("what is annotated",), colors, drawn, path)


def _length(count: int) -> int:
    """How many of some pictures are in a row."""
    return 4 if count > 2 * FEW else 2


def _rows(pictures: list[np.ndarray], length: int) -> list[list[np.ndarray]]:
    """Pictures in rows, the last one filled up with white."""
    missing = -len(pictures) % length
    pictures = pictures + [np.full_like(pictures[-1], 255)] * missing
    rows = [pictures[start : start + length] for start in range(0, len(pictures), length)]
    return [[_padded(picture, row) for picture in row] for row in rows]


def _padded(picture: np.ndarray, row: Sequence[np.ndarray]) -> np.ndarray:
    """A picture with white below it, as high as the highest in its row."""
    missing = max(other.shape[0] for other in row) - picture.shape[0]
    return np.pad(picture, ((0, missing), (0, 0), (0, 0)), constant_values=255)


def _colors(metadata: Metadata) -> dict[str, tuple[float, ...]]:
    """A colour for each class, the same in every picture."""
    names = [*metadata.get("thing_classes", []), *metadata.get("stuff_classes", [])]
    bright = dict.fromkeys(tuple(c) for c in colormap(rgb=True, maximum=1) if np.ptp(c) > 0.3)
    return dict(zip(dict.fromkeys(names), itertools.cycle(bright)))


def _kind(prediction: dict[str, Any], file_name: str, size: tuple[int, int]) -> str:
    """The richest of the predictions, checked to be of the image's size (height, width)."""
    kind = next((kind for kind in KINDS if kind in prediction), None)
    if kind is None:
        raise ValueError(
            f"predictions must have one of {', '.join(KINDS)}; found the keys "
            f"{sorted(prediction)} for {file_name}"
        )
    found = prediction[kind]
    if kind == "panoptic_seg":
        found, segments_info = found
        if segments_info is None:
            raise ValueError("predictions: panoptic_seg needs its segments_info, which is None")
    found = tuple(found.image_size if kind == "instances" else found.shape[-2:])
    if found != size:
        raise ValueError(
            f"predictions must have the height and width of their images; {kind} has {found} for "
            f"{file_name}, which has {size}"
        )
    return kind


def _truth(
    image: dict[str, Any], kind: str, size: tuple[int, int], metadata: Metadata
) -> list[_Region]:
    if kind == "panoptic_seg" and "pan_seg_file_name" in image:
        rgb = read_image(image["pan_seg_file_name"]).astype(int)
        return _segments(rgb @ [1, 256, 256**2], image["segments_info"], metadata)
    regions = []
    if kind != "instances" and "sem_seg_file_name" in image:
        regions += _stuff(read_label_map(image["sem_seg_file_name"]), metadata)
    if kind != "sem_seg":
        for annotation in image.get("annotations", []):
            keys = ["bbox", "bbox_mode", "category_id"]
            keys += ["segmentation"] if annotation.get("segmentation") else []
            annotation = {key: annotation[key] for key in keys}
            regions += _objects(annotations_to_instances([annotation], size, "bitmask"), metadata)
    return regions


def _predicted(
    prediction: Any, kind: str, metadata: Metadata, score_threshold: float
) -> list[_Region]:
    if kind == "sem_seg":
        return _stuff(prediction.argmax(dim=0).cpu().numpy(), metadata)
    if kind == "panoptic_seg":
        return _segments(prediction[0].cpu().numpy(), prediction[1], metadata)
    return _objects(prediction[prediction.scores >= score_threshold].to("cpu"), metadata)


def _stuff(labels: np.ndarray, metadata: Metadata) -> list[_Region]:
    classes = set(np.unique(labels).tolist()) - {metadata.get("ignore_label", 255)}
    return [_region(metadata, c, False, mask=labels == c) for c in classes]


def _segments(
    ids: np.ndarray, segments_info: list[dict[str, Any]], metadata: Metadata
) -> list[_Region]:
    return [
        _region(metadata, s["category_id"], s["isthing"], ids == s["id"], score=s.get("score"))
        for s in segments_info
    ]


def _objects(instances: Instances, metadata: Metadata) -> list[_Region]:
    """The objects of a ground truth with gt_classes or of a prediction with pred_classes."""
    fields = {key.split("_")[-1]: value for key, value in instances.get_fields().items()}
    nothing = [None] * len(instances)
    columns = [fields.get(key, nothing) for key in ("classes", "masks", "boxes", "scores")]
    return [_region(metadata, int(category), True, *others) for category, *others in zip(*columns)]


def _region(
    metadata: Metadata,
    category: int,
    isthing: bool,
    mask: Any = None,
    box: Any = None,
    score: float | None = None,
) -> _Region:
    kind = "thing_classes" if isthing else "stuff_classes"
    names = metadata.get(kind, [])
    if category >= len(names):
        raise ValueError(
            f"metadata={metadata.get('name')!r} must name the classes that the model was trained "
            f"on; it has {len(names)} {kind}, which is too few to name class {category}"
        )
    label = names[category] if score is None else f"{names[category]} {score:.0%}"
    mask, box = (None if shape is None else np.asarray(shape) for shape in (mask, box))
    return _Region(names[category], label if isthing else "", mask, box)


def _draw(
    pixels: np.ndarray, regions: list[_Region], colors: dict[str, tuple[float, ...]], panel: int
) -> np.ndarray:
    """The image (H, W, 3) with its regions, as wide as a panel: so all labels are of one size."""
    height, width = pixels.shape[:2]
    resize = ResizeTransform(height, width, max(round(panel * height / width), 1), panel)
    visualizer = Visualizer(resize.apply_image(pixels))
    few = sum(bool(region.label) for region in regions) <= MAX_LABELS
    for name, label, mask, box in sorted(regions, key=_area, reverse=True):  # small ones on top
        labels = [label] if label and few else None
        if mask is None:
            look = {"boxes": resize.apply_box(box), "assigned_colors": [colors[name]]}
        else:
            mask = resize.apply_segmentation(mask.astype(np.uint8))
            visualizer.draw_binary_mask(mask, colors[name])
            look = {"masks": [mask], "assigned_colors": ["white"], "alpha": 0}  # its outline
        visualizer.overlay_instances(labels=labels, **look)
    output = visualizer.output
    for patch in output.ax.patches:
        patch.set_alpha(None)  # boxes are drawn half transparent
    for label in output.ax.texts:
        label.set_size(9)
        extent = label.get_window_extent(output.canvas.get_renderer()).padded(2)
        x, y = label.get_position()
        x += max(-extent.x0, 0) - max(extent.x1 - output.width, 0)  # not cut at the border
        y += max(extent.y1 - output.height, 0) - max(-extent.y0, 0)
        label.set_position((x, y))
    return output.get_image()


def _area(region: _Region) -> float:
    if region.mask is not None:
        return float(region.mask.sum())
    return float(np.prod(region.box[2:] - region.box[:2]))


def _save(
    pictures: list[np.ndarray],
    length: int,
    titles: Sequence[str],
    colors: dict[str, tuple[float, ...]],
    drawn: set[str],
    path: str | Path,
) -> Path:
    """Place pictures pixel by pixel, below titles and above a legend of what is drawn.

    Args:
        pictures: as wide as :data:`PANELS` says.
        length: of a row.
        titles: of the columns from the left, again and again if there are two.
        colors: of classes.
        drawn: the classes that are in the pictures.
        path: the file.
    """
    colors = {name: color for name, color in colors.items() if name in drawn}
    rows = _rows(pictures, length)
    cell = PANELS[length] + GAP
    cells = [row[0].shape[0] + GAP for row in rows]
    width = length * cell + 20
    columns = max((width - 20) // (60 + 10 * max(map(len, colors), default=0)), 1)
    footer = 20 + 25 * -(-len(colors) // columns)
    height = HEADER + sum(cells) + footer
    figure = Figure((width / 100, height / 100), dpi=100)
    for column in range(length):
        left = 10 + GAP / 2 + column * cell
        if column < len(titles) or len(titles) > 1:
            center, middle = (left + cell / 2) / width, 1 - HEADER / 2 / height
            title = titles[column % len(titles)]
            figure.text(center, middle, title, fontsize=14, ha="center", va="center")
        for i, row in enumerate(rows):
            bottom = height - HEADER - sum(cells[: i + 1])
            figure.figimage(row[column], left, bottom, origin="upper")
    handles = [Patch(color=color, label=name) for name, color in colors.items()]
    figure.legend(handles=handles, loc="lower center", ncols=columns, fontsize=12, frameon=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
