"""What a checkpoint holds besides weights, so that it can be used without the files of its run."""

import copy
import json
import logging
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from ..config import without_weights
from ..detr.detector import TransformersDetector
from ..untrusted import check_calls
from ..weights import read_checkpoint

KEY = "detector"  # of the record in a checkpoint
CLASSES = ("thing_classes", "stuff_classes")
PACKAGES = ("detbackbones", "detectron2", "timm", "torch", "torchvision", "transformers")
_COMPUTED = ("num_classes", "num_things", "pixel_mean", "pixel_std")

logger = logging.getLogger(__name__)


def make_record(cfg: DictConfig, model: nn.Module | None = None) -> dict[str, Any] | None:
    """What a detector is: enough to build it and to give it images, without data or weights.

    Args:
        cfg: the config of its training, whose data are registered.
        model: the detector, which knows what one that it started from was.

    Returns:
        plain values: the config of the ``model``, whose numbers of classes and means are numbers;
        that of the ``mapper`` of the test images; the names of the classes as ``thing_classes``
        and ``stuff_classes``; ``categories``, the id of each thing in the JSON file; ``versions``
        of packages. None, with a warning, for a config that has more than plain values.
    """
    node = copy.deepcopy(cfg.model)
    for _, parent, key in _computed(node):
        parent[key] = instantiate(parent[key])
    record = {"model": _plain(node), "mapper": _plain(cfg.dataloader.test.mapper)}
    if isinstance(model, TransformersDetector) and record["model"].get("pretrained_detector"):
        record["model"]["pretrained_detector"] = model.detr.config.to_dict()
    record |= _classes(cfg) | {"versions": _versions()}
    try:
        return json.loads(json.dumps(record))
    except TypeError as error:
        logger.warning("the checkpoints do not hold the config of the detector: %s", error)
        return None


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
    if not file.endswith(".pth"):
        return None
    record = read_checkpoint(file).get(KEY)
    if not isinstance(record, dict):
        return None
    if not trust:
        check_calls(file, record)
    return record


def fill_config(cfg: DictConfig, record: dict[str, Any]) -> None:
    """Give a config what its training data would say, from a record.

    Classes of the test data are matched by their names.

    Args:
        cfg: changed in place.
        record: of the detector.
    """
    known = OmegaConf.create(record["model"])
    for path, parent, key in _computed(cfg.model):
        value = OmegaConf.select(known, path)
        if isinstance(value, int | ListConfig):  # and nothing that would be called
            parent[key] = value
    names = OmegaConf.select(cfg, "dataloader.test.dataset.names")
    if isinstance(names, DictConfig) and "like" in names and record.get("thing_classes"):
        names.like = record["thing_classes"]


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
    """Plain values of a config, with the names of what it calls; a backbone without weights."""
    node = copy.deepcopy(node)
    if "backbone" in node:
        node.backbone = without_weights(node.backbone)
    plain = OmegaConf.to_container(node, resolve=True)

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [named(item) for item in value]
        if callable(value):
            return f"{value.__module__}.{value.__qualname__}"
        return value

    return named(plain)


def _classes(cfg: DictConfig) -> dict[str, Any]:
    names = instantiate(cfg.dataloader.train.dataset.names)
    metadata = MetadataCatalog.get(names if isinstance(names, str) else names[0])
    found = {key: list(metadata.get(key) or []) for key in CLASSES}
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    return {**found, "categories": sorted(ids, key=ids.get)}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
