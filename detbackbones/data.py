"""A user's own COCO data as a detectron2 dataset: checked early, then loaded by it."""

import difflib
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Collection
from pathlib import Path

from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.detection_utils import SizeMismatchError, read_image
from PIL import Image

from .messages import one_of

_COCO_KEYS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "width", "height"),
    # COCOEvaluator needs area and iscrowd, and would miss them only after the training.
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
}

logger = logging.getLogger(__name__)
_versions: dict[str, object] = {}


def register_coco(json_file: str, image_root: str, mask_format: str | None = None) -> str:
    """Check a COCO detection dataset and register it with detectron2 under a name of its own.

    The same files give the same name and are read again only if the JSON file has changed. Boxes
    that stick out of their image are clipped to it when the dataset is loaded.

    Args:
        json_file: path of the annotations, in COCO's format for instances.
        image_root: folder that the `file_name` of each image is relative to.
        mask_format: the mapper's `instance_mask_format` if instance masks are needed: "polygon",
            or "bitmask", which takes RLE too. None if the model has boxes alone.

    Returns:
        The dataset's name, for `get_detection_dataset_dicts` and `COCOEvaluator`.

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
        logger.warning("%s: %d boxes stick out of their image: clipped.", json_path, num_clipped)
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


def num_classes(dataset: str) -> int:
    """Count the thing classes of a registered dataset, so that no config has to repeat the number.

    Args:
        dataset: name of the dataset, such as `register_coco` returns.

    Returns:
        The number of thing classes.

    Raises:
        ValueError: if there is no such dataset, or it has no thing classes.
    """
    one_of("dataset", dataset, DatasetCatalog)
    if not hasattr(MetadataCatalog.get(dataset), "thing_classes"):
        DatasetCatalog.get(dataset)  # detectron2's own registration sets the classes on loading
    if not hasattr(MetadataCatalog.get(dataset), "thing_classes"):
        raise ValueError(f"dataset '{dataset}' has no thing classes: it is not for detection.")
    return len(MetadataCatalog.get(dataset).thing_classes)


class CheckedDatasetMapper(DatasetMapper):
    """detectron2's `DatasetMapper`, with errors that name the file that could not be read.

    It takes the same arguments: in a LazyConfig, set `mapper._target_ = CheckedDatasetMapper`.
    """

    def __call__(self, dataset_dict: dict) -> dict:
        """Map one dataset dict as detectron2's `DatasetMapper` does.

        Args:
            dataset_dict: one image in detectron2's dataset format.

        Returns:
            The model's input, with `image` of shape (C, H, W).

        Raises:
            OSError: if the image or its label map cannot be read or decoded.
            SizeMismatchError: if the image has not the size that the dataset states; a ValueError.
        """
        file = dataset_dict["file_name"]
        try:
            return super().__call__(dataset_dict)
        except SizeMismatchError as error:
            height, width = read_image(file).shape[:2]
            raise SizeMismatchError(
                f"image '{file}' has {width}x{height} pixels, but the dataset states "
                f"{dataset_dict.get('width')}x{dataset_dict.get('height')} (width x height)."
            ) from error
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            label = dataset_dict.get("sem_seg_file_name")
            files = f"image '{file}'" + (f" or its label map '{label}'" if label else "")
            raise OSError(f"{files} cannot be read: {error}.") from error


def is_registered(name: str, version: object) -> bool:
    return name in DatasetCatalog and _versions.get(name) == version


def register(name: str, version: object, load: Callable[[], list[dict]], **metadata) -> None:
    # Metadata refuses to be changed: a dataset whose files have changed starts anew.
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)
    _versions[name] = version


def dataset_name(path: Path, other: Path) -> str:
    digest = hashlib.sha1(f"{path}|{other}".encode()).hexdigest()[:8]
    return re.sub(r"[\W_]+", "_", f"{path.parent.name}_{path.stem}_{digest}")


def existing(parameter: str, path: str, exists: Callable[[str], bool], what: str) -> Path:
    if not path:
        raise ValueError(f"{parameter} is empty; set it to {what}.")
    if not exists(path):
        folder, word = os.path.split(os.path.abspath(path))
        near = difflib.get_close_matches(word, os.listdir(folder) if os.path.isdir(folder) else ())
        hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
        raise FileNotFoundError(f"{parameter} '{path}' does not exist{hint}; set it to {what}.")
    return Path(path).resolve()


def few(items: Collection) -> str:
    shown = [repr(i) for i in items][:10]
    return ", ".join(shown) + (", ..." if len(items) > len(shown) else "")


def _check_coco(json_file: Path, image_root: Path, mask_format: str | None) -> tuple[dict, int]:
    """Return the categories by id and the number of boxes to clip."""
    try:
        data = json.loads(json_file.read_bytes())
    except ValueError as error:
        raise ValueError(f"'{json_file}' is not JSON: {error}.") from error
    categories, images, annotations = (_by_id(json_file, data, s) for s in _COCO_KEYS)

    for key, image in images.items():
        for side in ("width", "height"):
            if not isinstance(image[side], (int, float)) or image[side] <= 0:
                raise ValueError(f"'{json_file}': image {key} has {side} {image[side]!r}.")
    missing = [
        i["file_name"] for i in images.values() if not (image_root / i["file_name"]).exists()
    ]
    if missing:
        raise FileNotFoundError(
            f"'{json_file}': image '{missing[0]}' is not in image_root '{image_root}' "
            f"({len(missing)} of {len(images)} are missing)."
        )

    num_clipped = 0
    for key, annotation in annotations.items():
        where, box = f"'{json_file}': annotation {key}", annotation["bbox"]
        if annotation["image_id"] not in images:
            raise ValueError(f"{where} has image_id {annotation['image_id']!r}, not in images.")
        if annotation["category_id"] not in categories:
            raise ValueError(
                f"{where} has category_id {annotation['category_id']!r}; "
                f"categories has {few(sorted(categories))}."
            )
        if annotation.get("ignore"):
            raise ValueError(f"{where} has 'ignore', which detectron2 lacks; use 'iscrowd'.")
        if not _is_box(box):
            raise ValueError(f"{where} has bbox {box!r}; it must be [x, y, width, height].")
        image = images[annotation["image_id"]]
        clipped = _clip(box, image["width"], image["height"])
        if min(clipped[2:]) <= 0:
            raise ValueError(
                f"{where} of image '{image['file_name']}' ({image['width']}x{image['height']}) "
                f"has bbox {box}, which has no area inside the image."
            )
        num_clipped += clipped is not box
        mask = annotation.get("segmentation")
        if mask_format and not mask:
            raise ValueError(f"{where} has no 'segmentation', and the model needs instance masks.")
        if mask_format == "polygon" and isinstance(mask, dict) and not annotation["iscrowd"]:
            raise ValueError(
                f"{where} has RLE: set dataloader.train.mapper.instance_mask_format=bitmask."
            )
    return categories, num_clipped


def _by_id(json_file: Path, data: object, section: str) -> dict:
    found = isinstance(data, dict) and isinstance(data.get(section), list)
    if not found:
        raise ValueError(f"'{json_file}' is not a COCO file: it has no list '{section}'.")
    records = data[section]
    if not records:
        raise ValueError(f"'{json_file}' has no {section}: the list is empty.")
    by_id = {}
    for i, record in enumerate(records):
        for key in _COCO_KEYS[section]:
            if not isinstance(record, dict) or key not in record:
                raise ValueError(f"'{json_file}': {section}[{i}] has no '{key}'.")
        by_id[record["id"]] = record
    if len(by_id) < len(records):
        seen = set()
        twice = next(r["id"] for r in records if r["id"] in seen or seen.add(r["id"]))
        raise ValueError(f"'{json_file}': id {twice!r} appears more than once in {section}.")
    return by_id


def _is_box(box: object) -> bool:
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
    dicts = load_coco_json(str(json_file), str(image_root), name)
    for image in dicts:
        for annotation in image["annotations"]:
            annotation["bbox"] = _clip(annotation["bbox"], image["width"], image["height"])
    return dicts
