"""A user's own COCO data as a detectron2 dataset: checked early, then loaded by it."""

import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from detectron2.data.datasets import load_coco_json

from ..messages import few, nearest, one_of
from .coco_file import CocoFile, clip, paused_collector, read_coco, refuse
from .files import existing
from .memory import recall, remember
from .registry import class_names, dataset_name, is_registered, register

logger = logging.getLogger(__name__)

LARGE = 10e6  # bytes of a file of which it is remembered that it was right
MEMORY = "coco_files"


def register_coco(
    json_file: str,
    image_root: str,
    mask_format: str | None = None,
    *,
    classes: Sequence[str] | None = None,
    like: str | Sequence[str] | None = None,
) -> str:
    """Check a COCO detection dataset and register it with detectron2 under a name of its own.

    The same files give the same name and are read again only if the JSON file has changed. Boxes
    that stick out of their image are clipped to it when the dataset is loaded. What is merely odd
    (annotations of id 0 or without ``area`` or ``iscrowd``, classes numbered otherwise than in
    training) is mended in a copy of the file, which lasts as long as the process, with a warning.
    That a file of more than 10 MB is right as it is, is remembered for the next process.

    Args:
        json_file: path of the annotations, in COCO's format for instances.
        image_root: folder that the ``file_name`` of each image is relative to.
        mask_format: the mapper's ``instance_mask_format`` if instance masks are needed: "polygon",
            or "bitmask", which takes RLE too. None if the model needs boxes alone.
        classes: names of the classes to take; all of the file, in the order of their ids, if not
            given.
        like: a registered dataset whose classes these must be, such as that of the training, or
            their names. They are matched by their names.

    Returns:
        the dataset's name, for ``get_detection_dataset_dicts`` and ``COCOEvaluator``.

    Raises:
        FileNotFoundError: if the JSON file, the folder or an image is missing.
        ValueError: if a path is empty, the JSON file is not COCO's format or has wrong entries, or
            its classes are others.
    """
    if mask_format is not None:
        one_of("mask_format", mask_format, ("polygon", "bitmask"))
    json_path = existing("json_file", json_file, os.path.isfile, "the path of a COCO JSON file")
    image_path = existing("image_root", image_root, os.path.isdir, "the folder of the images")
    name = dataset_name(json_path, image_path)
    stat = json_path.stat()
    wanted = tuple(class_names(like) if isinstance(like, str) else like) if like else None
    chosen = tuple(classes) if classes else None
    version = (stat.st_mtime_ns, stat.st_size, mask_format, chosen, wanted)
    if is_registered(name, version):
        return name

    checked = _recalled(json_path, version) if stat.st_size > LARGE else None
    recalled = checked is not None
    if not recalled:
        checked = _check(json_path, image_path, mask_format, chosen, wanted, name)
        if stat.st_size > LARGE and checked["file"] == str(json_path):
            _remember(json_path, version, checked)  # a mended copy goes with the process
    if checked["odd"]:
        logger.warning("'%s': %s", json_path, "; ".join(checked["odd"]))
    register(
        name,
        version,
        lambda: _load_coco(Path(checked["file"]), image_path, name, check_images=recalled),
        json_file=checked["file"],
        image_root=str(image_path),
        evaluator_type="coco",
        thing_classes=checked["names"],
        thing_dataset_id_to_contiguous_id={k: i for i, k in enumerate(checked["ids"])},
        category_ids=checked["category_ids"],  # of the user's own file; -1 is for one not in it
    )
    return name


def _recalled(json_path: Path, version: tuple) -> dict[str, Any] | None:
    """What another process has found of a file, if it and this package are the same."""
    key, state = _key_and_state(json_path, version)
    known = recall(MEMORY).get(key, {})
    return known["checked"] if known.get("state") == state else None


def _remember(json_path: Path, version: tuple, checked: dict[str, Any]) -> None:
    key, state = _key_and_state(json_path, version)
    remember(MEMORY, {**recall(MEMORY), key: {"state": state, "checked": checked}})


def _key_and_state(json_path: Path, version: tuple) -> tuple[str, list]:
    return json.dumps([str(json_path), *version[2:]]), [*version[:2], version_of("detbackbones")]


def _check(
    json_path: Path,
    image_path: Path,
    mask_format: str | None,
    chosen: Sequence[str] | None,
    wanted: Sequence[str] | None,
    name: str,
) -> dict[str, Any]:
    """Check a file; gives the one to take, the names and ids of its classes, and what is odd."""
    coco = read_coco(json_path, mask_format)
    _check_files({i: m["file_name"] for i, m in coco.images.items()}, image_path, coco.path)
    if chosen:
        _choose_classes(coco, chosen)
    names = list(wanted or chosen or [coco.categories[i]["name"] for i in sorted(coco.categories)])
    if wanted:
        _check_classes(coco, wanted)
    ids = {category["name"]: key for key, category in coco.categories.items()}
    coco.number_classes(names)
    if not coco.annotations:
        raise ValueError(f"'{json_path}': annotations must have one of the classes {names}")
    file = _clean_file(coco, name) if coco.mended else json_path
    odd = [*coco.mended]
    if coco.num_clipped:
        odd.append(f"{coco.num_clipped} boxes stick out of their images: clipped")
    if coco.num_flat:
        odd.append(f"{coco.num_flat} boxes have no width or height: they are not learned")
    own = [ids.get(name, -1) for name in names]
    return {
        **{"file": str(file), "names": names, "odd": odd},
        **{"ids": sorted(coco.categories), "category_ids": own},
    }


def _check_files(names: Mapping[Any, str], image_root: Path, json_path: Path) -> None:
    """Refuse a dataset of which images are missing; ``names`` are their files by the ids."""
    missing = [key for key, name in names.items() if not os.path.isfile(image_root / name)]
    if missing:
        raise FileNotFoundError(
            f"'{json_path}': image {missing[0]}: file_name={names[missing[0]]!r} must be in "
            f"image_root='{image_root}' ({len(missing)} of {len(names)} are missing)"
        )


def _choose_classes(coco: CocoFile, chosen: Sequence[str]) -> None:
    names = [category["name"] for category in coco.categories.values()]
    for name in chosen:
        if name not in names or chosen.count(name) > 1:
            raise ValueError(
                f"classes={list(chosen)} must be different classes of '{coco.path}': "
                f"{nearest(name, names)}"
            )
    coco.take_classes(chosen)


def _check_classes(coco: CocoFile, wanted: Sequence[str]) -> None:
    """Refuse annotations of classes that another dataset does not have; leave out unused ones."""
    used = {annotation["category_id"] for annotation in coco.annotations}
    for key, category in coco.categories.items():
        if category["name"] not in wanted and key in used:
            names = [c["name"] for c in coco.categories.values()]
            must = f"be a class of the training data, {few(wanted)}; those here are {few(names)}"
            refuse(coco.path, f"category {key}", "name", category["name"], must)
    coco.take_classes(wanted)


@cache
def _folder() -> tempfile.TemporaryDirectory:
    """Of the files that :func:`_clean_file` writes; it goes with the process."""
    return tempfile.TemporaryDirectory(prefix="detbackbones_")


def _clean_file(coco: CocoFile, name: str) -> Path:
    """Write what was mended: detectron2's loader and evaluator read COCO's format from a file."""
    path = Path(_folder().name, f"{name}.json")
    path.write_text(json.dumps(coco.content()))
    return path


def _load_coco(json_file: Path, image_root: Path, name: str, *, check_images: bool) -> list[dict]:
    """detectron2's dataset dicts, with the boxes clipped to their images."""
    with paused_collector():
        dicts = load_coco_json(str(json_file), str(image_root), name)
    if check_images:
        names = {d["image_id"]: os.path.relpath(d["file_name"], image_root) for d in dicts}
        _check_files(names, image_root, json_file)
    for image in dicts:
        for annotation in image["annotations"]:
            annotation["bbox"] = clip(annotation["bbox"], image["width"], image["height"])
    return dicts
