"""The catalogue: find backbones by name, size and levels, and create them by AutoTimm's names.

Names, parameters and results are those of AutoTimm (https://github.com/theja-vanka/AutoTimm), but
for two: a plain name gives every level from stride 4 on, in a model of any depth, and
``get_backbone_out_features`` counts the features that come out where those that go into the head
are other ones (MobileNetV3).
"""

import functools
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
import torchvision
from torch import nn

from .checkpoint import downloading_from_hub
from .messages import one_of
from .timm_backbone import TimmBackbone
from .timm_models import all_levels, create

DATA = Path(__file__).parent / "catalog.json"  # written by tools/list_backbones.py --write
SOURCES = ("timm", "torchvision")
NECKS = ("fpn", "sfp")
_DEFAULT_INDICES = (1, 2, 3, 4)


class ModelSource(str, Enum):  # noqa: UP042 (Python 3.10 has no StrEnum)
    """Where a model comes from."""

    TIMM = "timm"
    HF_HUB = "hf_hub"
    TORCHVISION = "torchvision"


@dataclass
class BackboneConfig:
    """What :func:`create_backbone` creates.

    Attributes:
        model_name: a timm model with or without a tag, or ``hf-hub:...``.
        pretrained: download the pretrained weights.
        num_classes: 0 for no classifier.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth.
        extra_kwargs: further arguments for ``timm.create_model``.
    """

    model_name: str = "resnet50"
    pretrained: bool = True
    num_classes: int = 0
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    extra_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class FeatureBackboneConfig:
    """What :func:`create_feature_backbone` creates.

    Attributes:
        model_name, pretrained, drop_rate, drop_path_rate, extra_kwargs: as in
            :class:`BackboneConfig`.
        out_indices: timm's indices of the levels, which come in ascending order. In a model that
            has no level 4 (ConvNeXt, Swin) the default is for every level of stride 4 and more.
    """

    model_name: str = "resnet50"
    pretrained: bool = True
    out_indices: tuple[int, ...] = _DEFAULT_INDICES
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    extra_kwargs: dict[str, Any] = field(default_factory=dict)


class FeatureMaps(nn.Module):
    """A backbone that gives its levels as a list, as timm's extractors do.

    Attributes:
        feature_info: timm's, with channels and strides as they were measured.
    """

    def __init__(self, backbone: TimmBackbone):
        super().__init__()
        self.backbone = backbone
        self._names = sorted(backbone.indices, key=backbone.indices.get)
        indices = tuple(backbone.indices[name] for name in self._names)
        self.feature_info = backbone.model.feature_info.from_other(indices)
        for name, shape in backbone.output_shape().items():
            measured = {"num_chs": shape.channels, "reduction": shape.stride}
            self.feature_info.info[backbone.indices[name]].update(measured)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Images (N, C, H, W) to a map (N, channels, H / stride, W / stride) a level, by index."""
        levels = self.backbone(x)
        return [levels[name] for name in self._names]


def create_backbone(cfg: BackboneConfig | str) -> nn.Module:
    """Create a timm model without its classifier, which gives pooled features (N, features).

    Args:
        cfg: a config, or the name of a model, whose pretrained weights are then loaded.

    Raises:
        ValueError: if there is no such model, or it refuses its arguments.
        ConnectionError: if pretrained weights cannot be downloaded.
    """
    if isinstance(cfg, str):
        cfg = BackboneConfig(cfg)
    name = _timm_name(cfg.model_name)
    kwargs = _with_rates(name, cfg, {"num_classes": cfg.num_classes, **cfg.extra_kwargs})
    return create(name, None, pretrained=cfg.pretrained, **kwargs)


def create_feature_backbone(cfg: FeatureBackboneConfig | str) -> FeatureMaps:
    """Create a timm model that gives a list of feature maps (N, C, h, w), fine to coarse.

    Images must be padded to what the model takes: ``.backbone.size_divisibility`` and
    ``.backbone.padding_constraints`` of the result say to what.

    Args:
        cfg: a config, or the name of a model, whose pretrained weights are then loaded and whose
            every level of stride 4 and more is given.

    Raises:
        ValueError: if there is no such model, or it cannot give what is asked.
        ConnectionError: if pretrained weights cannot be downloaded.
    """
    every = isinstance(cfg, str)
    if every:
        cfg = FeatureBackboneConfig(cfg)
    name = _timm_name(cfg.model_name)
    extra = dict(cfg.extra_kwargs)
    own = {key: extra.pop(key) for key in ("checkpoint_path", "output_stride") if key in extra}
    in_channels = extra.pop("in_chans", 3)
    kwargs = _with_rates(name, cfg, extra)
    found = all_levels(name, in_chans=in_channels, **kwargs)
    indices = cfg.out_indices
    default = indices in (_DEFAULT_INDICES, [*_DEFAULT_INDICES])
    if every or default and not {*indices} <= {*found.indices}:
        levels = zip(found.indices, found.trace.levels)
        indices = [index for index, level in levels if level.stride >= 4]
    backbone = TimmBackbone(
        name,
        pretrained=cfg.pretrained,
        in_channels=in_channels,
        out_indices=indices,
        model_kwargs=kwargs,
        **own,
    )
    return FeatureMaps(backbone)


def _timm_name(model_name: str) -> str:
    """The name as timm has it now: ``timm/...`` and ``hf_hub:...`` are on the hub."""
    model_name = model_name.replace("hf_hub:", "hf-hub:", 1)
    return f"hf-hub:{model_name}" if model_name.startswith("timm/") else model_name


def _with_rates(
    name: str, cfg: BackboneConfig | FeatureBackboneConfig, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments with the drop rates, but without one of 0 that a model has no argument for."""
    kwargs = dict(kwargs)
    for key in ("drop_rate", "drop_path_rate"):
        rate = getattr(cfg, key)
        try:
            if rate == 0:
                create(name, "meta", **{key: rate, **kwargs})
        except ValueError:
            continue
        kwargs.setdefault(key, rate)
    return kwargs


def get_backbone_out_features(backbone: nn.Module) -> int:
    """The number of features that a backbone of :func:`create_backbone` gives.

    Raises:
        AttributeError: if it is no such backbone.
    """
    if not hasattr(backbone, "num_features"):
        raise AttributeError(
            f"{type(backbone).__name__} has no num_features: create_backbone makes a backbone that "
            "has; of a feature backbone take get_feature_channels"
        )
    # The features before the last layer of the head, where that is not just the pooling.
    return getattr(backbone, "head_hidden_size", backbone.num_features)


def get_feature_info(backbone: nn.Module) -> list[dict[str, Any]]:
    """Channels (``num_chs``), stride (``reduction``) and module of each level of a backbone.

    Args:
        backbone: of :func:`create_feature_backbone`, or a timm extractor.

    Raises:
        AttributeError: if it gives no feature maps.
    """
    info = getattr(backbone, "feature_info", None)
    if not hasattr(info, "get_dicts"):
        raise AttributeError(
            f"{type(backbone).__name__} has no feature_info: create_feature_backbone makes a "
            "feature backbone; those of detectron2 have output_shape()"
        )
    return info.get_dicts()


def get_feature_channels(backbone: nn.Module) -> list[int]:
    """Channels of each level; see :func:`get_feature_info`."""
    return [level["num_chs"] for level in get_feature_info(backbone)]


def get_feature_strides(backbone: nn.Module) -> list[int]:
    """Stride of each level; see :func:`get_feature_info`."""
    return [level["reduction"] for level in get_feature_info(backbone)]


def count_parameters(model: nn.Module, trainable_only: bool = True) -> int:
    """How many parameters a model has, or how many of them are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable_only)


@dataclass(frozen=True)
class Facts:
    """What was measured of a model as a backbone with default levels, on the meta device.

    Attributes:
        source: "timm" or "torchvision".
        params: parameters, without the classifier and what else no level needs.
        gmacs: 10^9 multiply-adds of one image, by fvcore.
        side: the height and width of that image: 224, or 224 padded to what the model takes.
        size: which images it takes: "any", "multiples of 64", "square 224 or img_size", ...
        levels: (channels, stride) of each level, fine to coarse, and True if it is resampled.
        batch_norm: classes of its batch norms.
    """

    source: str
    params: int
    gmacs: float
    side: int
    size: str
    levels: list[list]
    batch_norm: list[str]

    @property
    def channels(self) -> list[int]:
        return [level[0] for level in self.levels]

    @property
    def strides(self) -> list[int]:
        return [level[1] for level in self.levels]

    @property
    def neck(self) -> str | None:
        """What ``build_pyramid`` builds on it: "fpn", "sfp" (of one level), or None.

        On a ViT of timm with patches of 14 pixels it does so with ``patch_size=16``.
        """
        if any(stride & (stride - 1) for stride in self.strides):  # no power of two
            return "sfp" if self.source == "timm" else None
        return "sfp" if self.strides == [16] else "fpn"


@functools.cache
def facts(source: str) -> dict[str, Facts]:
    """Facts of the architectures of a source, by name, for the versions in the data file."""
    rows = json.loads(DATA.read_text())["models"][source]
    return {name: Facts(source, *row) for name, row in rows.items()}


def list_backbones(
    pattern: str = "",
    pretrained_only: bool = False,
    with_source: bool = False,
    *,
    source: str = "timm",
    max_params: float | None = None,
    max_gmacs: float | None = None,
    stride: int | None = None,
    necks: str | Collection[str] | None = None,
) -> list[str] | list[tuple[str, ModelSource]]:
    """List models that can be backbones; those of unknown size pass no filter but the first two.

    Args:
        pattern: of the names, with wildcards: ``"*resnet*"``.
        pretrained_only: only models with pretrained weights; timm's then have their tags.
        with_source: give pairs of name and :class:`ModelSource`.
        source: "timm" or "torchvision".
        max_params: the most parameters, such as 30e6.
        max_gmacs: the most multiply-adds for an image of 224 x 224 pixels, in 10^9.
        stride: of a level that the model must have.
        necks: kinds of pyramid one of which must stand on it, "fpn" or "sfp" (on the one level of
            a ViT with patches of 16 pixels, or of 14 and timm's ``patch_size=16``); see
            :func:`detbackbones.build_pyramid`.

    Raises:
        ValueError: if the source or a neck is unknown, or a filter fits no model of any source.
    """
    one_of("source", source, SOURCES)
    necks = {necks} if isinstance(necks, str) else necks
    for neck in necks or ():
        one_of("necks", neck, NECKS)
    if any(limit is not None for limit in (max_params, max_gmacs, stride)):
        everything = [known for name in SOURCES for known in facts(name).values()]
        if stride is not None:
            one_of("stride", stride, sorted({s for known in everything for s in known.strides}))
        for parameter, limit in (("params", max_params), ("gmacs", max_gmacs)):
            least = min(getattr(known, parameter) for known in everything)
            if limit is not None and not limit >= least:
                raise ValueError(f"max_{parameter}={limit} fits no model: the smallest has {least}")
    if source == "timm":
        names = timm.list_models(pattern or "*", pretrained=pretrained_only)
    else:  # all of these have weights
        names = torchvision.models.list_models(module=torchvision.models, include=pattern or "*")

    def fits(known: Facts | None) -> bool:
        return known is not None and (
            (max_params is None or known.params <= max_params)
            and (max_gmacs is None or known.gmacs <= max_gmacs)
            and (stride is None or stride in known.strides)
            and (necks is None or known.neck in necks)
        )

    if any(limit is not None for limit in (max_params, max_gmacs, stride, necks)):
        names = [name for name in names if fits(facts(source).get(name.partition(".")[0]))]
    return [(name, ModelSource(source)) for name in names] if with_source else names


def get_model_source(model_name: str) -> ModelSource:
    """The hub for ``hf-hub:``, ``hf_hub:`` and ``timm/`` before the name, else the library.

    Raises:
        ValueError: if neither timm nor torchvision has such a model.
    """
    if _timm_name(model_name).startswith("hf-hub:"):
        return ModelSource.HF_HUB
    name = model_name.partition(".")[0]
    if timm.is_model(name):  # resnet50 is a name of both: create_backbone creates timm's
        return ModelSource.TIMM
    ours = torchvision.models.list_models(module=torchvision.models)
    one_of("model_name", name, dict.fromkeys([*ours, *timm.list_models()]))
    return ModelSource.TORCHVISION


def list_hf_hub_backbones(
    author: str = "timm",
    model_name: str | None = None,
    limit: int = 50,
    with_source: bool = False,
) -> list[str] | list[tuple[str, ModelSource]]:
    """List timm's models on the Hugging Face hub, those of the most downloads first.

    Args:
        author: of the models, ``""`` for any.
        model_name: a part of their names.
        limit: the most names to list.
        with_source: give pairs of name and :class:`ModelSource`.

    Returns:
        names for :func:`create_backbone`, ``hf-hub:timm/resnet50.a1_in1k``.

    Raises:
        RuntimeError: if the hub does not answer.
    """
    try:
        with downloading_from_hub("list"):
            found = huggingface_hub.HfApi().list_models(
                filter="timm", author=author or None, search=model_name, sort="downloads",
                limit=limit,
            )  # fmt: skip
            names = [f"hf-hub:{model.id}" for model in found]
    except Exception as error:  # of the hub's client, of HTTP, of the system
        raise RuntimeError(
            f"the Hugging Face hub does not answer ({type(error).__name__}): "
            "list_backbones lists the models of timm without a network"
        ) from error
    return [(name, ModelSource.HF_HUB) for name in names] if with_source else names
