"""A user's own data as detectron2 datasets: checked once, early, and then loaded by detectron2.

A dataset is a COCO JSON file (`register_coco`) or a folder of label maps (`register_semantic`).
"""

import difflib
import glob
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.data.detection_utils import SizeMismatchError, read_image
from PIL import Image

from .messages import one_of

IGNORE_LABEL = 255
"""Value of the pixels of a label map that belong to no class (detectron2's convention)."""

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_COCO_KEYS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "width", "height"),
    # COCOEvaluator needs area and iscrowd, and would miss them only after the training.
    "annotations": ("id", "image_id", "category_id", "bbox", "area", "iscrowd"),
}

logger = logging.getLogger(__name__)
_versions: dict[str, object] = {}


def register_coco(json_file: str, image_root: str) -> str:
    """Check a COCO detection dataset and register it with detectron2 under a name of its own.

    The same files give the same name and are read again only if the JSON file has changed. Boxes
    that stick out of their image are clipped to it when the dataset is loaded.

    Args:
        json_file: path of the annotations, in COCO's format for instances.
        image_root: folder that the `file_name` of each image is relative to.

    Returns:
        The dataset's name, for `get_detection_dataset_dicts` and `COCOEvaluator`.

    Raises:
        FileNotFoundError: if the JSON file, the folder or an image is missing.
        ValueError: if a path is empty, or the JSON file is not COCO's format or has wrong entries.
    """
    json_path = _existing("json_file", json_file, os.path.isfile, "the path of a COCO JSON file")
    image_path = _existing("image_root", image_root, os.path.isdir, "the folder of the images")
    name = _name(json_path, image_path)
    stat = json_path.stat()
    version = (stat.st_mtime_ns, stat.st_size)
    if _is_registered(name, version):
        return name

    categories, num_clipped = _check_coco(json_path, image_path)
    if num_clipped:
        logger.warning("%s: %d boxes stick out of their image: clipped.", json_path, num_clipped)
    ids = sorted(categories)
    _register(
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


def register_semantic(
    image_root: str, label_root: str, num_classes: int, class_names: Sequence[str] | None = None
) -> str:
    """Check a dataset for semantic segmentation and register it with detectron2.

    The label map of `image_root/a.jpg` is `label_root/a.png`: 8-bit grayscale, each pixel the index
    of its class or 255 where there is none. All label maps are read once, to check their values.

    Args:
        image_root: folder of jpg and png images, or a pattern of them such as `images/train_*.jpg`.
        label_root: folder of the label maps, which may hold more than those of the images.
        num_classes: number of classes, 1 to 255.
        class_names: a name for each class; `class_0`, `class_1`, ... if not given.

    Returns:
        The dataset's name, for `get_detection_dataset_dicts` and `SemSegEvaluator`.

    Raises:
        FileNotFoundError: if a folder, all images or a label map is missing.
        ValueError: if an argument is not valid, or a label map has a wrong format, size or value.
    """
    if not 1 <= num_classes <= IGNORE_LABEL:
        raise ValueError(f"num_classes is {num_classes}; it must be in 1..{IGNORE_LABEL}.")
    names = [f"class_{i}" for i in range(num_classes)] if class_names is None else list(class_names)
    if len(names) != num_classes:
        raise ValueError(f"class_names has {len(names)} names; num_classes is {num_classes}.")
    label_path = _existing("label_root", label_root, os.path.isdir, "the folder of the label maps")
    pairs = [(i, label_path / f"{i.stem}.png") for i in _list_images(image_root)]
    missing = [label.name for _, label in pairs if not label.is_file()]
    if missing:
        raise FileNotFoundError(
            f"label_root '{label_root}' has no label map '{missing[0]}' "
            f"({len(missing)} of {len(pairs)} images have none)."
        )

    name = _name(Path(os.path.abspath(image_root)), label_path)
    times = [(str(file), file.stat().st_mtime_ns) for pair in pairs for file in pair]
    version = (names, times)
    if _is_registered(name, version):
        return name

    # Decoding releases the GIL, and is all the time there is.
    with ThreadPoolExecutor() as pool:
        dicts = list(pool.map(lambda pair: _semantic_dict(*pair, num_classes), pairs))
    _register(
        name,
        version,
        lambda: [dict(d) for d in dicts],
        image_root=os.path.abspath(image_root),
        sem_seg_root=str(label_path),
        evaluator_type="sem_seg",
        stuff_classes=names,
        ignore_label=IGNORE_LABEL,
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


def read_label_map(file_name: str, dtype: type | None = None) -> np.ndarray:
    """Read a label map for `SemSegEvaluator(sem_seg_loading_fn=...)`.

    detectron2's own default asks NumPy for no copy, which NumPy 2 refuses when it has to convert.

    Args:
        file_name: path of the label map.
        dtype: type of the array's elements; that of the file if not given.

    Returns:
        The class of each pixel, with shape (H, W).
    """
    with Image.open(file_name) as image:
        return np.array(image, dtype=dtype)


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


def _is_registered(name: str, version: object) -> bool:
    return name in DatasetCatalog and _versions.get(name) == version


def _register(name: str, version: object, load: Callable[[], list[dict]], **metadata) -> None:
    # Metadata refuses to be changed: a dataset whose files have changed starts anew.
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)
    _versions[name] = version


def _name(path: Path, other: Path) -> str:
    digest = hashlib.sha1(f"{path}|{other}".encode()).hexdigest()[:8]
    return re.sub(r"[\W_]+", "_", f"{path.parent.name}_{path.stem}_{digest}")


def _existing(parameter: str, path: str, exists: Callable[[str], bool], what: str) -> Path:
    if not path:
        raise ValueError(f"{parameter} is empty; set it to {what}.")
    if not exists(path):
        folder, word = os.path.split(os.path.abspath(path))
        near = difflib.get_close_matches(word, os.listdir(folder) if os.path.isdir(folder) else ())
        hint = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
        raise FileNotFoundError(f"{parameter} '{path}' does not exist{hint}; set it to {what}.")
    return Path(path).resolve()


def _few(items: Collection) -> str:
    shown = [repr(i) for i in items][:10]
    return ", ".join(shown) + (", ..." if len(items) > len(shown) else "")


def _check_coco(json_file: Path, image_root: Path) -> tuple[dict, int]:
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
                f"categories has {_few(sorted(categories))}."
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


def _list_images(image_root: str) -> list[Path]:
    if glob.has_magic(image_root) and not os.path.isdir(image_root):
        files = glob.glob(os.path.abspath(image_root))
    else:
        what = "the folder of the images or a pattern of them"
        files = _existing("image_root", image_root, os.path.isdir, what).iterdir()
    images = sorted(Path(f) for f in files if Path(f).suffix.lower() in _IMAGE_SUFFIXES)
    if not images:
        raise FileNotFoundError(f"image_root '{image_root}' has no {', '.join(_IMAGE_SUFFIXES)}.")
    return images


def _semantic_dict(image_file: Path, label_file: Path, num_classes: int) -> dict:
    if image_file.resolve() == label_file.resolve():
        raise ValueError(f"image '{image_file}' is its own label map; use a folder for each.")
    try:
        with Image.open(image_file) as image:
            width, height = image.size
            if image.getexif().get(0x0112, 1) >= 5:  # the EXIF orientation turns it by 90 degrees
                width, height = height, width
    except OSError as error:
        raise ValueError(f"image '{image_file}' cannot be read: {error}.") from error
    try:
        with Image.open(label_file) as label:
            mode, size, counts = label.mode, label.size, label.histogram()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"label map '{label_file}' cannot be read: {error}.") from error
    # detectron2 reads label maps as "L": a palette or 1-bit image would turn into other numbers.
    if mode != "L":
        raise ValueError(f"label map '{label_file}' has PIL mode {mode}; save it as 8-bit gray, L.")
    if size != (width, height):
        raise ValueError(
            f"label map '{label_file}' is {size[0]}x{size[1]} pixels; its image is {width}x{height}."
        )
    wrong = [value for value in range(num_classes, IGNORE_LABEL) if counts[value]]
    if wrong:
        raise ValueError(
            f"label map '{label_file}' has the values {_few(wrong)}; valid are "
            f"0..{num_classes - 1} (num_classes is {num_classes}) and {IGNORE_LABEL} to ignore."
        )
    return {
        "file_name": str(image_file),
        "sem_seg_file_name": str(label_file),
        "image_id": image_file.stem,
        "height": height,
        "width": width,
    }
