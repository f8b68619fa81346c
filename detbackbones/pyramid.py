"""build_pyramid: p2 to p6 (or p7) on any backbone, for detectron2's heads."""

import math
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone import SimpleFeaturePyramid as _SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from .feature_backbone import select_levels


class SimpleFeaturePyramid(_SimpleFeaturePyramid):
    """detectron2's SimpleFeaturePyramid, with the size rule that its levels need.

    Upstream misspells the key ``size_divisibility`` in its padding constraints, so that images are
    not padded to whole feature maps.
    """

    @property
    def size_divisibility(self) -> int:
        """Height and width of the input must be multiples of this."""
        return math.lcm(self._size_divisibility, self.net.size_divisibility)

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The net's own constraints and ``size_divisibility``."""
        return {**self.net.padding_constraints, "size_divisibility": self.size_divisibility}


def build_pyramid(
    bottom_up: Backbone,
    out_channels: int = 256,
    *,
    in_features: Sequence[str] | None = None,
    min_level: int = 2,
    norm: str | None = None,
    top_block: nn.Module | None = None,
    fuse_type: str = "sum",
) -> Backbone:
    """A feature pyramid over the levels that a backbone has.

    detectron2's FPN (https://arxiv.org/abs/1612.03144) where there are several strides, its
    SimpleFeaturePyramid (https://arxiv.org/abs/2203.16527) where there is one, as in a plain ViT.

    Args:
        bottom_up: any backbone whose ``output_shape()`` is right.
        out_channels: channels of every level of the pyramid.
        in_features: levels of ``bottom_up`` to use; by default all of stride 2^min_level or more.
        min_level: the finest level of the pyramid, 2 for p2 (stride 4).
        norm: norm of the pyramid's convolutions, by default none for the FPN and "LN" for the
            SimpleFeaturePyramid, as in their papers.
        top_block: makes p6 (and p7) from p5: detectron2's LastLevelMaxPool or LastLevelP6P7.
        fuse_type: "sum" or "avg", how the FPN adds the coarser level.

    Returns:
        the pyramid, levels ``p2`` to ``p5`` and those of the top block.

    Raises:
        ValueError: if a level is unknown or no pyramid can stand on these strides.
    """
    shapes = bottom_up.output_shape()
    if in_features is not None:
        in_features = select_levels(in_features, list(shapes))
    else:
        in_features = [n for n, shape in shapes.items() if shape.stride >= 2**min_level]
    if not in_features:
        raise ValueError(
            f"min_level={min_level} needs a level of stride {2**min_level} or more, and the "
            f"backbone has strides {[shape.stride for shape in shapes.values()]}"
        )
    strides = [shapes[name].stride for name in in_features]
    for name, stride in zip(in_features, strides):
        if stride & (stride - 1):
            raise ValueError(
                f"level {name} has stride {stride}, and a pyramid needs powers of two: for a "
                "patch-14 ViT give model_kwargs={'patch_size': 16, 'img_size': 224}"
            )
    if len(set(strides)) == 1:
        factors = [f for f in (4.0, 2.0, 1.0, 0.5) if strides[-1] / f >= 2**min_level]
        return SimpleFeaturePyramid(
            bottom_up,
            in_features[-1],
            out_channels,
            scale_factors=factors,
            top_block=top_block,
            norm="LN" if norm is None else norm,
        )
    if strides != [strides[0] * 2**i for i in range(len(strides))]:
        raise ValueError(
            f"in_features={in_features} have strides {strides}, and an FPN needs each to be twice "
            "the one before"
        )
    return FPN(
        bottom_up,
        in_features,
        out_channels,
        norm=norm or "",
        top_block=top_block,
        fuse_type=fuse_type,
    )


def build_yacs_pyramid(cfg: CfgNode, bottom_up: Backbone, *, retinanet: bool = False) -> Backbone:
    """The pyramid that the yacs keys under MODEL.FPN describe.

    Args:
        cfg: detectron2's config.
        bottom_up: the backbone under it.
        retinanet: p3 to p7 (p6 and p7 by convolutions from p5) instead of p2 to p6.
    """
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return build_pyramid(
        bottom_up,
        channels,
        in_features=cfg.MODEL.FPN.IN_FEATURES or None,
        min_level=3 if retinanet else 2,
        norm=cfg.MODEL.FPN.NORM or None,
        top_block=LastLevelP6P7(channels, channels, "p5") if retinanet else LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
