"""The registry of datasets: detectron2's catalogues, for files that may change."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from ..messages import one_of

_versions: dict[str, object] = {}


def num_classes(dataset: str) -> int:
    """The number of thing classes of a registered dataset, for configs that would repeat it.

    Args:
        dataset: name of the dataset, such as ``register_coco`` returns.

    Raises:
        ValueError: if there is no such dataset, or it has no thing classes.
    """
    return len(class_names(dataset))


def class_names(dataset: str) -> list[str]:
    """The names of the thing classes of a registered dataset, in order.

    Args:
        dataset: name of the dataset.

    Raises:
        ValueError: if there is no such dataset, or it has no thing classes.
    """
    one_of("dataset", dataset, DatasetCatalog)
    if not hasattr(MetadataCatalog.get(dataset), "thing_classes"):
        DatasetCatalog.get(dataset)  # detectron2's own registration sets the classes on loading
    if not hasattr(MetadataCatalog.get(dataset), "thing_classes"):
        raise ValueError(f"dataset={dataset!r} must have thing classes, as one for detection has")
    return list(MetadataCatalog.get(dataset).thing_classes)


def dataset_name(path: Path, other: Path) -> str:
    """The name of the dataset that two paths make up: readable, and another for other paths."""
    digest = hashlib.sha1(f"{path}|{other}".encode()).hexdigest()[:8]
    return re.sub(r"[\W_]+", "_", f"{path.parent.name}_{path.stem}_{digest}")


def is_registered(name: str, version: object) -> bool:
    """Whether a dataset is registered in this version of its files, see :func:`register`."""
    return name in DatasetCatalog and _versions.get(name) == version


def register(name: str, version: object, load: Callable[[], list[dict]], **metadata: Any) -> None:
    """Register a dataset with detectron2, in place of an older version of it.

    Args:
        name: of the dataset.
        version: what tells the state of its files, such as their times of modification.
        load: gives its dataset dicts.
        metadata: its entries in ``MetadataCatalog``.
    """
    # Metadata refuses to be changed: a dataset whose files have changed starts anew.
    DatasetCatalog.pop(name, None)
    MetadataCatalog.pop(name, None)
    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**metadata)
    _versions[name] = version
