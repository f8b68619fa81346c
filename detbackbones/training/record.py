"""What a checkpoint holds besides weights, so that it can be used without the files of its run."""

import copy
import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..config import without_weights
from ..detr.detector import TransformersDetector
from ..messages import first_line
from ..untrusted import check_calls
from ..weights import read_checkpoint

KEY = "detector"  # of the record in a checkpoint
CONFIG = "config.json"  # beside a .safetensors file, which holds tensors alone
CLASSES = ("thing_classes", "stuff_classes")
PACKAGES = ("detbackbones", "detectron2", "timm", "torch", "torchvision", "transformers")
_COMPUTED = ("num_classes", "num_things", "pixel_mean", "pixel_std")


def make_record(cfg: DictConfig, model: nn.Module | None = None) -> dict[str, Any]:
    """What a detector is: enough to build it and to give it images, without data or weights.

    Args:
        cfg: the config of its training, whose data are registered.
        model: the detector, which knows what one that it started from was.

    Returns:
        plain values: the config of the ``model``, whose numbers of classes and means are numbers;
        that of the ``mapper`` of the test images; the names of the classes as ``thing_classes``
        and ``stuff_classes``; ``categories``, the id of each thing in the JSON file; ``versions``
        of packages.

    Raises:
        ValueError: if the config has more than plain values, or no data.
    """
    names = OmegaConf.select(cfg, "dataloader.train.dataset.names")
    mapper = OmegaConf.select(cfg, "dataloader.test.mapper")
    if not (names and mapper):
        raise ValueError(
            "the config must have dataloader.train.dataset.names and dataloader.test.mapper"
        )
    node = copy.deepcopy(cfg.model)
    for _, parent, key in _computed(node):
        parent[key] = instantiate(parent[key])
    if "backbone" in node:
        node.backbone = without_weights(node.backbone)
    try:
        record = {"model": _plain(node), "mapper": _plain(mapper)}
        if isinstance(model, TransformersDetector) and record["model"].get("pretrained_detector"):
            record["model"]["pretrained_detector"] = model.detr.config.to_dict()
        return json.loads(json.dumps(record | _classes(names) | {"versions": versions()}))
    except (TypeError, AttributeError) as error:
        raise ValueError(f"the config must have plain values alone: {error}") from error


def of_record(record: dict[str, Any] | None) -> dict[str, Any]:
    """The entry of a checkpoint that holds a record, if there is one."""
    return {KEY: record} if record else {}


def read_record(file: str, *, trust: bool = False) -> dict[str, Any] | None:
    """The record in a checkpoint; None if it has none, as that of an older run or of others.

    Args:
        file: the checkpoint.
        trust: whether it may call anything, see :func:`detbackbones.load_config`.

    Raises:
        FileNotFoundError: if it does not exist.
        ValueError: if it is damaged, or must be trusted.
    """
    if "://" in file or not file.endswith((".pth", ".pt", ".safetensors")):
        return None
    content = _config_beside(file) if file.endswith(".safetensors") else read_checkpoint(file)
    record = content.get(KEY) if isinstance(content, dict) else None
    if not _is_record(record):
        return None
    if not trust:
        check_calls(file, record)
        if "${" in json.dumps(record):
            raise ValueError(f"{file}: {KEY} must have no interpolations")
    return record


def _config_beside(file: str) -> Any:
    """What ``config.json`` beside a checkpoint says; None if there is none."""
    config = Path(file).with_name(CONFIG)
    try:
        return json.loads(config.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"'{config}' must be JSON: {first_line(error)}") from error


def _is_record(record: Any) -> bool:
    """Whether a value has the form of a record: what it calls is in ``model`` and ``mapper``."""
    if not isinstance(record, dict):
        return False
    return (
        all(isinstance(record.get(key), dict) for key in ("model", "mapper", "versions"))
        and all(isinstance(record.get(key), list) for key in (*CLASSES, "categories"))
        and all(isinstance(name, str) for key in CLASSES for name in record[key])
        and all(isinstance(key, int | str) for key in record["categories"])
    )


def fill_config(cfg: DictConfig, record: dict[str, Any]) -> None:
    """Give a config what its training data would say, from a record, of which nothing is called.

    Classes of the test data are matched by their names.

    Args:
        cfg: changed in place.
        record: of the detector.
    """
    for path, parent, key in _computed(cfg.model):
        value: Any = record["model"]
        for part in path.split("."):
            if isinstance(value, list):
                value = value[int(part)] if part.isdigit() and int(part) < len(value) else None
            else:
                value = value.get(part) if isinstance(value, dict) else None
        numbers = value if isinstance(value, list) else [value]
        if numbers and all(type(number) in (int, float) for number in numbers):
            parent[key] = value
    names = OmegaConf.select(cfg, "dataloader.test.dataset.names")
    for part in names if OmegaConf.is_list(names) else [names]:
        if isinstance(part, DictConfig) and "like" in part and record["thing_classes"]:
            part.like = record["thing_classes"]


def _computed(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig, str]]:
    """Where a config computes numbers of classes or means: the path, and the node with its key."""
    if not OmegaConf.is_config(node):
        return
    for key in range(len(node)) if OmegaConf.is_list(node) else [*node]:
        if OmegaConf.is_missing(node, key):
            continue
        if key in _COMPUTED and isinstance(node[key], DictConfig):
            yield f"{path}{key}", node, key
        else:
            yield from _computed(node[key], f"{path}{key}.")


def _plain(node: DictConfig) -> Any:
    """Plain values of a config, with the names of what it calls."""

    def named(value: Any, key: object = None) -> Any:
        if isinstance(value, dict):
            return {key: named(item, key) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [named(item) for item in value]
        if key == "_target_" and callable(value):
            return f"{value.__module__}.{value.__qualname__}"
        return value

    return named(OmegaConf.to_container(node, resolve=True))


def _classes(names: Any) -> dict[str, Any]:
    """The classes of a data set by its names, as a config has them."""
    names = instantiate(names)
    name = names if isinstance(names, str) else names[0]
    if not any(MetadataCatalog.get(name).get(key) for key in CLASSES):
        DatasetCatalog.get(name)  # detectron2's own registration sets the classes on loading
    metadata = MetadataCatalog.get(name)
    found = {key: list(metadata.get(key) or []) for key in CLASSES}
    if (metadata.get("evaluator_type") or "").endswith("sem_seg"):
        found["thing_classes"] = []  # which label maps may know of, too
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    ids = metadata.get("category_ids") or sorted(ids, key=ids.get)
    return {**found, "categories": ids if found["thing_classes"] else []}


def versions() -> dict[str, str]:
    """Versions of the packages that a detector is made of."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
