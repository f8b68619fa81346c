"""Whether the data, the model and the weights of a training go together."""

from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ..backbones.feature_backbone import FeatureBackbone
from ..weights import find_part, fitting, read_tensors, unloaded


def check_classes(cfg: DictConfig) -> None:
    """Refuse a model with another number of classes than the training data.

    With fewer, objects of the last classes would be background; with more, or none, an index would
    be out of range somewhere.

    Args:
        cfg: whose ``model`` says ``num_classes`` at some places, and whose dataset is registered.

    Raises:
        ValueError: if one of them is another; names its key.
    """
    names = instantiate(OmegaConf.select(cfg, "dataloader.train.dataset.names"))
    name = names if isinstance(names, str) or not names else names[0]
    if not isinstance(name, str) or name not in DatasetCatalog:
        return
    metadata = MetadataCatalog.get(name)
    things, stuff = (len(metadata.get(f"{kind}_classes") or ()) for kind in ("thing", "stuff"))
    task = cfg.model.get("task")
    if task == "panoptic" and not stuff:
        raise ValueError(
            "model.task='panoptic' must have stuff in the training data: there is none"
        )
    counts = [*_class_counts(cfg.model, "model")]
    if task == "panoptic":
        counts.append(("model.num_things", cfg.model.get("num_things")))
    for key, value in counts:
        if value == 1 and ".mask_head." in key:  # one mask for all classes
            continue
        wanted = stuff if task == "semantic" or ".sem_seg_head." in key else things
        if task == "panoptic" and key == "model.num_classes":
            wanted = things + stuff - 1  # the first kind of stuff is all things
        if wanted and value != wanted:
            raise ValueError(
                f"{key}={value} must be {wanted}, the number of classes of the training data"
            )


def _class_counts(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The values of ``num_classes`` in a config but for backbones, with their keys."""
    for key in node:
        if OmegaConf.is_missing(node, key) or key == "backbone":
            continue
        value = node[key]
        if key == "num_classes":
            yield f"{path}.{key}", instantiate(value) if isinstance(value, DictConfig) else value
        elif isinstance(value, DictConfig):
            yield from _class_counts(value, f"{path}.{key}")
        elif OmegaConf.is_list(value):
            for i, item in enumerate(value):
                if isinstance(item, DictConfig):
                    yield from _class_counts(item, f"{path}.{key}.{i}")


def check_pixels(cfg: DictConfig) -> None:
    """Refuse ``pixel_mean`` and ``pixel_std`` of other channels; broadcasting would hide it.

    Args:
        cfg: whose data loader's mapper gives the images.

    Raises:
        ValueError: if one of them is not for as many channels as the images have.
    """
    channels = _channels(cfg)
    for key in ("pixel_mean", "pixel_std"):
        values = cfg.model.get(key)
        values = instantiate(values) if isinstance(values, DictConfig) else values
        if values is not None and len(values) != channels:
            raise ValueError(
                f"model.{key} has {len(values)} values, and must have one for each of the images' "
                f"{channels} channels (dataset.channels)"
            )


def check_channels(model: nn.Module, cfg: DictConfig) -> None:
    """Refuse a backbone for images of other channels.

    Args:
        model: the detector.
        cfg: whose data loader's mapper gives the images.

    Raises:
        ValueError: if it is for others than the images have.
    """
    channels = _channels(cfg)
    for backbone in model.modules():
        if isinstance(backbone, FeatureBackbone) and backbone.source.in_channels != channels:
            raise ValueError(
                f"in_channels={backbone.source.in_channels} of the backbone must be {channels}, "
                "the channels of the images (dataset.channels)"
            )


def _channels(cfg: DictConfig) -> int:
    return OmegaConf.select(cfg, "dataloader.train.mapper.channels", default=3)


def check_fit(model: nn.Module, file: str) -> None:
    """Refuse a checkpoint that leaves weights of the model as they were drawn.

    Raises:
        ValueError: if a tensor of the model is missing in the file or has another shape there.
    """
    own = model.state_dict()
    tensors, within = read_tensors(file)
    loaded = fitting(find_part(tensors, own, within=within).state, own)
    refuse_missing(file, unloaded(own, loaded), len(own))


def refuse_missing(file: str, missing: Sequence[str], count: int) -> None:
    """Refuse a checkpoint without all of a model.

    Args:
        file: the checkpoint.
        missing: names of the model's tensors that it cannot load.
        count: of the model's tensors.

    Raises:
        ValueError: if any is missing.
    """
    if missing:
        raise ValueError(
            f"checkpoint {file!r} is not of this model: {len(missing)} of the model's {count} "
            f"tensors are missing in it or of another shape ({missing[0]}, ...)"
        )


def frozen_at_random(cfg: DictConfig) -> str:
    """What is wrong with a backbone that keeps random weights as they are; empty if nothing is.

    Args:
        cfg: of a training that starts from no checkpoint.
    """
    backbone = cfg.model.get("backbone") or {}
    backbone = backbone.get("bottom_up") or backbone
    given = [backbone.get(key) for key in ("pretrained", "checkpoint_path")]
    given += [backbone.get("weights")] if backbone.get("pretrained") is not False else []
    if not {"pretrained", "weights"} & set(backbone) or any(given):
        return ""
    kept = [f"freeze_at={backbone.freeze_at}"] if backbone.get("freeze_at") else []
    kept += ["norm=FrozenBN"] if backbone.get("norm") == "FrozenBN" else []
    kept += [f"lora_rank={backbone.lora_rank}"] if backbone.get("lora_rank") else []
    if not kept:
        return ""
    return (
        f"the backbone starts from random weights, and {' and '.join(kept)} keep a part of them as "
        "they are: give it weights, or norm=BN, freeze_at=0 and lora_rank=0"
    )
