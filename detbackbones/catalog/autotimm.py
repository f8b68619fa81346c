"""The catalogue: find backbones by name, size and levels, and create them by AutoTimm's names.

Names, parameters and results are those of AutoTimm (https://github.com/theja-vanka/AutoTimm), but
for two: a plain name gives every level from stride 4 on, in a model of any depth, and
``get_backbone_out_features`` counts the features that come out where those that go into the head
are other ones (MobileNetV3).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..backbones.timm_backbone import TimmBackbone
from ..backbones.timm_source import TimmSource, create_model
from .listing import timm_name

_DEFAULT_INDICES = (1, 2, 3, 4)


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
        self.feature_info = backbone.extractor.feature_info.from_other(indices)
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
    name = timm_name(cfg.model_name)
    kwargs = _with_rates(name, cfg, {"num_classes": cfg.num_classes, **cfg.extra_kwargs})
    return create_model(name, cfg.pretrained, **kwargs)


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
    name = timm_name(cfg.model_name)
    extra = dict(cfg.extra_kwargs)
    own = {key: extra.pop(key) for key in ("checkpoint_path", "output_stride") if key in extra}
    in_channels = extra.pop("in_chans", 3)
    kwargs = _with_rates(name, cfg, extra)
    source = TimmSource(name, in_channels, **kwargs)
    indices = cfg.out_indices
    default = indices in (_DEFAULT_INDICES, [*_DEFAULT_INDICES])
    if every or default and not {*indices} <= {*source.level_keys}:
        levels = zip(source.level_keys, source.trace.levels)
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


def _with_rates(
    name: str, cfg: BackboneConfig | FeatureBackboneConfig, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments with the drop rates, but without one of 0 that a model has no argument for."""
    kwargs = dict(kwargs)
    for key in ("drop_rate", "drop_path_rate"):
        rate = getattr(cfg, key)
        try:
            if rate == 0:
                with torch.device("meta"):
                    create_model(name, **{key: rate, **kwargs})
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
