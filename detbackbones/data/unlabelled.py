"""A folder of images that nothing is said of as a detectron2 dataset."""

import os
from pathlib import Path

from ..messages import one_of
from .images import list_images
from .registry import dataset_name, is_registered, register

EVERY = 10  # each tenth image is for validation


def register_images(image_root: str, part: str = "all") -> str:
    """Register images without annotations with detectron2.

    Args:
        image_root: a folder, a pattern such as ``images/train_*.jpg``, or a text file of paths, one
            a line.
        part: "all"; "val" is each tenth image, in the order of their names, and "train" the others.

    Returns:
        the dataset's name, for ``get_detection_dataset_dicts``.

    Raises:
        FileNotFoundError: if there are no images.
        ValueError: if an argument is wrong, or a single image is to be divided.
    """
    one_of("part", part, ("all", "train", "val"))
    files = list_images(image_root, "image_root")
    if part != "all":
        if len(files) < 2:
            raise ValueError(f"image_root={image_root!r} must have at least 2 images, and has 1")
        files = [file for i, file in enumerate(files) if (i % EVERY == 0) == (part == "val")]
    name = f"{dataset_name(Path(os.path.abspath(image_root)), Path())}_{part}"
    if not is_registered(name, files):
        dicts = [{"file_name": str(file), "image_id": i} for i, file in enumerate(files)]
        register(name, files, lambda: [dict(d) for d in dicts])
    return name
