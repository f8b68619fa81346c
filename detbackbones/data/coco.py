"""A user's own COCO data as a detectron2 dataset: checked early, then loaded by it."""

import json
import logging
import math
import os
from pathlib import Path

from detectron2.data.datasets import load_coco_json

from ..messages import few, first_line, one_of
from .files import existing
from .registry import dataset_name, is_registered, register

_COCO_KEYS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "width", "height"),
    # COCOEvaluator needs area and iscrowd, and would miss them only after the training.
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
}

logger = logging.getLogger(__name__)


def register_coco(json_file: str, image_root: str, mask_format: str | None = None) -> str:
    """Check a COCO detection dataset and register it with detectron2 under a name of its own.

    The same files give the same name and are read again only if the JSON file has changed. Boxes
    that stick out of their image are clipped to it when the dataset is loaded.

    Args:
        json_file: path of the annotations, in COCO's format for instances.
        image_root: folder that the ``file_name`` of each image is relative to.
        mask_format: the mapper's ``instance_mask_format`` if instance masks are needed: "polygon",
            or "bitmask", which takes RLE too. None if the model needs boxes alone.

    Returns:
        the dataset's name, for ``get_detection_dataset_dicts`` and ``COCOEvaluator``.

    Raises:
        FileNotFoundError: if the JSON file, the folder or an image is missing.
        ValueError: if a path is empty, or the JSON file is not COCO's format or has wrong entries.
    """
    if mask_format is not None:
        one_of("mask_format", mask_format, ("polygon", "bitmask"))
    json_path = existing("json_file", json_file, os.path.isfile, "the path of a COCO JSON file")
    image_path = existing("image_root", image_root, os.path.isdir, "the folder of the images")
    name = dataset_name(json_path, image_path)
    stat = json_path.stat()
    version = (stat.st_mtime_ns, stat.st_size, mask_format)
    if is_registered(name, version):
        return name

    categories, num_clipped = _check_coco(json_path, image_path, mask_format)
    if num_clipped:
        logger.warning("'%s': %d boxes stick out of their images: clipped", json_path, num_clipped)
    ids = sorted(categories)
    register(
        name,
        version,
        lambda: _load_coco(json_path, image_path, name),
        json_file=str(json_path),
        image_root=str(image_path),
        evaluator_type="coco",
        thing_classes=[categories[i]["name"] for i in ids],
        thing_dataset_id_to_contiguous_id={k: i for i, k in enumerate(ids)},
    )
    return name


def _check_coco(json_file: Path, image_root: Path, mask_format: str | None) -> tuple[dict, int]:
    """The categories by id, and the number of boxes that stick out of their images."""
    try:
        data = json.loads(json_file.read_bytes())
    except ValueError as error:
        raise ValueError(f"json_file='{json_file}' must be JSON: {first_line(error)}") from error
    categories, images, annotations = (_by_id(json_file, data, s) for s in _COCO_KEYS)

    for key, image in images.items():
        for side in ("width", "height"):
            if not isinstance(image[side], (int, float)) or image[side] <= 0:
                raise ValueError(
                    f"'{json_file}': image {key}: {side}={image[side]!r} must be a number above 0"
                )
    missing = [k for k, i in images.items() if not (image_root / i["file_name"]).exists()]
    if missing:
        raise FileNotFoundError(
            f"'{json_file}': image {missing[0]}: file_name={images[missing[0]]['file_name']!r} "
            f"must be in image_root='{image_root}' ({len(missing)} of {len(images)} are missing)"
        )

    num_clipped = 0
    for key, annotation in annotations.items():
        where, box = f"'{json_file}': annotation {key}", annotation["bbox"]
        if annotation["image_id"] not in images:
            raise ValueError(
                f"{where}: image_id={annotation['image_id']!r} must be the id of one of the images"
            )
        if annotation["category_id"] not in categories:
            raise ValueError(
                f"{where}: category_id={annotation['category_id']!r} must be one of "
                + few(sorted(categories))
            )
        if annotation.get("ignore"):
            raise ValueError(
                f"{where}: ignore={annotation['ignore']!r} must be left out, for detectron2 has no "
                "such key: use iscrowd"
            )
        if not _is_box(box):
            raise ValueError(f"{where}: bbox={box!r} must be [x, y, width, height]")
        image = images[annotation["image_id"]]
        clipped = _clip(box, image["width"], image["height"])
        if min(clipped[2:]) <= 0:
            raise ValueError(
                f"{where}: bbox={box} must have an area inside its image, '{image['file_name']}' "
                f"of {image['width']}x{image['height']} pixels"
            )
        num_clipped += clipped is not box
        mask = annotation.get("segmentation")
        if mask_format and not mask:
            raise ValueError(
                f"{where}: segmentation={mask!r} must be a mask: the model needs instance masks"
            )
        if mask_format == "polygon" and isinstance(mask, dict) and not annotation["iscrowd"]:
            raise ValueError(
                f"{where}: segmentation must be polygons, and is RLE: for RLE set "
                "dataloader.train.mapper.instance_mask_format=bitmask"
            )
    return categories, num_clipped


def _by_id(json_file: Path, data: object, section: str) -> dict:
    """The entries of a section of a COCO file by their ids."""
    found = isinstance(data, dict) and isinstance(data.get(section), list)
    if not found:
        raise ValueError(f"json_file='{json_file}' must be a COCO file, with a list {section!r}")
    records = data[section]
    if not records:
        raise ValueError(f"'{json_file}': {section}=[] must have at least one entry")
    by_id = {}
    for i, record in enumerate(records):
        for key in _COCO_KEYS[section]:
            if not isinstance(record, dict) or key not in record:
                raise ValueError(f"'{json_file}': {section}[{i}] must have {key!r}")
        by_id[record["id"]] = record
    if len(by_id) < len(records):
        seen = set()
        twice = next(r["id"] for r in records if r["id"] in seen or seen.add(r["id"]))
        raise ValueError(f"'{json_file}': {section}: id={twice!r} must belong to one entry alone")
    return by_id


def _is_box(box: object) -> bool:
    """Whether it is a list of four finite numbers."""
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(v, (int, float)) and math.isfinite(v) for v in box)
    )


def _clip(box: list[float], width: float, height: float) -> list[float]:
    """Clip an XYWH box to its image; a box inside is returned itself, free of rounding."""
    x, y, w, h = box
    if x >= 0 and y >= 0 and x + w <= width and y + h <= height:
        return box
    left, top = max(x, 0), max(y, 0)
    return [left, top, min(x + w, width) - left, min(y + h, height) - top]


def _load_coco(json_file: Path, image_root: Path, name: str) -> list[dict]:
    """detectron2's dataset dicts, with the boxes clipped to their images."""
    dicts = load_coco_json(str(json_file), str(image_root), name)
    for image in dicts:
        for annotation in image["annotations"]:
            annotation["bbox"] = _clip(annotation["bbox"], image["width"], image["height"])
    return dicts
