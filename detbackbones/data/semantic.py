"""A user's own label maps as a detectron2 dataset, and the evaluators that read label maps."""

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from detectron2.evaluation import SemSegEvaluator
from PIL import Image

from ..messages import few, first_line
from .files import existing
from .images import image_size, list_images, read_label_map
from .registry import dataset_name, is_registered, register

IGNORE_LABEL = 255  # of the pixels of a label map that are in no class, as in detectron2

logger = logging.getLogger(__name__)


def register_semantic(
    image_root: str,
    label_root: str,
    num_classes: int,
    class_names: Sequence[str] | None = None,
    *,
    partial: bool = False,
) -> str:
    """Check a dataset for semantic segmentation and register it with detectron2.

    The label map of ``image_root/a.jpg`` is ``label_root/a.png``: 8-bit grayscale, each pixel the
    index of its class or 255 where there is none. All label maps are read once, to check their
    values.

    Args:
        image_root: folder of images, a pattern such as ``images/train_*.jpg``, or a text file of
            paths, one a line.
        label_root: folder of the label maps, which may hold more than those of the images.
        num_classes: number of classes, 1 to 255.
        class_names: a name for each class; ``class_0``, ``class_1``, ... if not given.
        partial: whether classes may be absent, as in a small validation set.

    Returns:
        the dataset's name, for ``get_detection_dataset_dicts`` and ``SemSegEvaluator``.

    Raises:
        FileNotFoundError: if a folder, all images or a label map is missing.
        ValueError: if an argument is not valid, or a label map has a wrong format, size or value.
    """
    if not 1 <= num_classes <= IGNORE_LABEL:
        raise ValueError(f"num_classes={num_classes} must be from 1 to {IGNORE_LABEL}")
    names = [f"class_{i}" for i in range(num_classes)] if class_names is None else list(class_names)
    if len(names) != num_classes:
        raise ValueError(
            f"class_names={names} must have num_classes={num_classes} names, not {len(names)}"
        )
    label_path = existing("label_root", label_root, os.path.isdir, "the folder of the label maps")
    pairs = [(i, label_path / f"{i.stem}.png") for i in list_images(image_root, "image_root")]
    missing = [label.name for _, label in pairs if not label.is_file()]
    if missing:
        raise FileNotFoundError(
            f"label_root={label_root!r} must have a label map {missing[0]!r} "
            f"({len(missing)} of {len(pairs)} images have none)"
        )

    name = dataset_name(Path(os.path.abspath(image_root)), label_path)
    times = [(str(file), file.stat().st_mtime_ns) for pair in pairs for file in pair]
    version = (names, times)
    if is_registered(name, version):
        return name

    # Decoding releases the GIL, and is all the time there is.
    with ThreadPoolExecutor() as pool:
        read = list(pool.map(lambda pair: _semantic_dict(*pair, num_classes), pairs))
    dicts = [record for record, _ in read]
    if not partial:
        _check_classes(label_root, names, {value for _, values in read for value in values})
    register(
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


def sem_seg_evaluator(dataset_name: str) -> SemSegEvaluator:
    """detectron2's SemSegEvaluator, reading label maps in a way that NumPy 2 accepts.

    Args:
        dataset_name: a dataset that ``register_semantic`` or detectron2 registered.

    Returns:
        an evaluator for ``dataloader.evaluator``.
    """
    return SemSegEvaluator(dataset_name, sem_seg_loading_fn=read_label_map)


def _check_classes(label_root: str, names: Sequence[str], values: set[int]) -> None:
    """Refuse label maps that say nothing, and warn of classes that none of them has."""
    if values == {IGNORE_LABEL}:
        raise ValueError(
            f"label_root={label_root!r}: all pixels of all label maps are {IGNORE_LABEL}, and must "
            "have a class somewhere"
        )
    if values == {0, IGNORE_LABEL} and len(names) > 1:
        raise ValueError(
            f"label_root={label_root!r}: all pixels of all label maps are 0 or {IGNORE_LABEL}, of "
            f"which {IGNORE_LABEL} is no class: the {len(names)} classes must be 0 to "
            f"{len(names) - 1}"
        )
    absent = [name for i, name in enumerate(names) if i not in values]
    if absent:
        logger.warning("label_root=%r: no pixel is of the classes %s", label_root, few(absent))


def _semantic_dict(image_file: Path, label_file: Path, num_classes: int) -> tuple[dict, list[int]]:
    """The dataset dict of an image, whose label map is checked, and the values in that."""
    if image_file.resolve() == label_file.resolve():
        raise ValueError(
            f"label_root='{label_file.parent}' must be another folder than image_root: image "
            f"'{image_file}' would be its own label map"
        )
    try:
        width, height = image_size(str(image_file))
    except OSError as error:
        raise ValueError(str(error)) from error
    try:
        with Image.open(label_file) as label:
            mode, size = label.mode, label.size
            if size == (width, height):
                counts = label.histogram()
    except Exception as error:  # decoders raise all kinds
        raise ValueError(f"label map '{label_file}' cannot be read: {first_line(error)}") from error
    # A palette or 1-bit image may have its classes in any order, and one of colours has none.
    if mode != "L":
        raise ValueError(f"label map '{label_file}': mode={mode!r} must be 'L', 8-bit grayscale")
    if size != (width, height):
        raise ValueError(
            f"label map '{label_file}': size={size[0]}x{size[1]} must be {width}x{height}, that "
            "of its image"
        )
    values = [value for value, count in enumerate(counts) if count]
    wrong = [value for value in values if num_classes <= value < IGNORE_LABEL]
    if wrong:
        raise ValueError(
            f"label map '{label_file}': values={few(wrong)} must be from 0 to {num_classes - 1} "
            f"(num_classes={num_classes}), or {IGNORE_LABEL} for no class"
        )
    record = {
        "file_name": str(image_file),
        "sem_seg_file_name": str(label_file),
        "image_id": image_file.stem,
        "height": height,
        "width": width,
    }
    return record, values
