"""build_pyramid: p2 to p6 (or p7) on any backbone, for detectron2's heads."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone import SimpleFeaturePyramid as _SimpleFeaturePyramid
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from ..measure.levels import is_power_of_two, select_levels

COARSEST = 5  # p5, stride 32: what is coarser comes from the top block
SCALE_FACTORS = (4.0, 2.0, 1.0, 0.5)  # those that detectron2's SimpleFeaturePyramid has


class _Pyramid(Backbone):
    """What both of detectron2's pyramids lack: the size rules of the bottom-up, levels for images
    of any size, and a top block that finds p5 where the bottom-up has a level of that name.
    """

    def _add_size_rules(self, bottom_up: Backbone) -> None:
        constraints = bottom_up.padding_constraints
        divisor = constraints.get("size_divisibility", bottom_up.size_divisibility) or 1
        only = getattr(bottom_up, "img_size", None)
        self._size_divisibility = only or math.lcm(self._size_divisibility, divisor)
        self._padding_constraints = {**constraints, "size_divisibility": self._size_divisibility}

    @property
    def size_divisibility(self) -> int:
        """Height and width of the input must be multiples of this."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """The bottom-up's own constraints and ``size_divisibility``."""
        return self._padding_constraints

    def _finish(self, results: list[torch.Tensor], levels: dict, x: torch.Tensor) -> dict:
        h, w = x.shape[-2:]
        results = [
            # A level made by doubling one whose size was rounded up is larger than the image.
            level[..., : -(-h // stride), : -(-w // stride)]
            for level, stride in zip(results, self._out_feature_strides.values())
        ]
        if self.top_block is not None:
            # Upstream looks into the bottom-up first, where p5 may be the output of index 5.
            sources = {**levels, **dict(zip(self._out_features, results))}
            results = [*results, *self.top_block(sources[self.top_block.in_feature])]
        return dict(zip(self._out_features, results))


class SimpleFeaturePyramid(_Pyramid, _SimpleFeaturePyramid):
    """detectron2's SimpleFeaturePyramid, with images padded to what its levels and its net need.

    Upstream misspells the key ``size_divisibility`` in its padding constraints.
    """

    def __init__(self, net: Backbone, *args: Any, **kwargs: Any):
        """Arguments as upstream; ``net`` is the backbone."""
        super().__init__(net, *args, **kwargs)
        self._add_size_rules(net)
        for stage in self.stages:
            if isinstance(stage[0], nn.MaxPool2d):
                stage[0].ceil_mode = True  # a net may take one size alone, such as 240

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: images (N, C, H, W); H and W are multiples of ``size_divisibility``.

        Returns:
            each level, (N, out_channels, ceil(H / stride), ceil(W / stride)), fine to coarse.
        """
        levels = self.net(x)
        results = [stage(levels[self.in_feature]) for stage in self.stages]
        return self._finish(results, levels, x)


class CompletedLevels(Backbone):
    """The levels up to ``res5`` that an FPN needs, made where a backbone lacks them.

    A level finer than all of the backbone's is made from the finest of them in ViTDet's way
    (https://arxiv.org/abs/2203.16527), any other by 2x2 max pooling of the level before it.
    """

    def __init__(self, shapes: Mapping[str, ShapeSpec], levels: Mapping[int, str], min_level: int):
        """
        Args:
            shapes: the backbone's ``output_shape()``.
            levels: n to the name of the backbone's level of stride 2^n, for those to use.
            min_level: n of the finest level needed.
        """
        super().__init__()
        self.names = {f"res{n}": name for n, name in levels.items()}
        first = min(levels)
        self.source = levels[first]
        self.finer = nn.ModuleDict()
        self._shapes = {}
        for n in range(min(min_level, first), COARSEST + 1):
            if n < first:
                layers = _upsampling(shapes[self.source].channels, first - n)
                self.finer[f"res{n}"] = layers
                channels = layers[-1].out_channels
            elif n in levels:
                channels = shapes[levels[n]].channels
            self._shapes[f"res{n}"] = ShapeSpec(channels=channels, stride=2**n)

    def forward(self, levels: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """
        Args:
            levels: the backbone's feature maps, (N, C, h, w).

        Returns:
            a feature map for each level of ``output_shape()``.
        """
        completed = {}
        for name in self._shapes:
            if name in self.finer:
                level = self.finer[name](levels[self.source])
            elif name in self.names:
                level = levels[self.names[name]]
            else:
                level = F.max_pool2d(level, 2, ceil_mode=True)
            completed[name] = level
        return completed

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each level, fine to coarse."""
        return self._shapes


def _upsampling(channels: int, times: int) -> nn.Sequential:
    """SimpleFeaturePyramid's layers that double the size ``times`` times, halving the channels."""
    layers = []
    for _ in range(times):
        half = max(channels // 2, 1)
        layers += [nn.ConvTranspose2d(channels, half, 2, stride=2), get_norm("LN", half), nn.GELU()]
        channels = half
    return nn.Sequential(*layers[:-2])


class FeaturePyramid(_Pyramid, FPN):
    """detectron2's FPN over completed levels.

    Its state dict has FPN's keys, and under ``completed.`` those of the levels made.
    """

    def __init__(
        self, bottom_up: Backbone, levels: Mapping[int, str], min_level: int, **kwargs: Any
    ):
        """
        Args:
            bottom_up: the backbone.
            levels, min_level: see :class:`CompletedLevels`.
            kwargs: as upstream.
        """
        completed = CompletedLevels(bottom_up.output_shape(), levels, min_level)
        in_features = [f"res{n}" for n in range(min_level, COARSEST + 1)]
        super().__init__(completed, in_features, **kwargs)
        self.completed, self.bottom_up = completed, bottom_up
        self._add_size_rules(bottom_up)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """As :meth:`SimpleFeaturePyramid.forward`."""
        levels = self.bottom_up(x)
        levels = {**levels, **self.completed(levels)}
        fused, results = None, []
        for name, lateral, output in zip(
            reversed(self.in_features), self.lateral_convs, self.output_convs
        ):
            level = lateral(levels[name])
            if fused is not None:
                # Upstream doubles the size, which is one too much where a size was rounded up.
                level = level + F.interpolate(fused, size=level.shape[-2:], mode="nearest")
                if self._fuse_type == "avg":
                    level = level / 2
            fused = level
            results.insert(0, output(fused))
        return self._finish(results, levels, x)


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
    """A feature pyramid from p2 (stride 4) to p5 (stride 32) on any backbone.

    detectron2's SimpleFeaturePyramid (https://arxiv.org/abs/2203.16527) where there is one stride
    of which it can make all levels, as in a plain ViT of patch 16. Otherwise its FPN
    (https://arxiv.org/abs/1612.03144), over levels that are completed where some are missing: see
    :class:`CompletedLevels`. Of several levels with the same stride the last is taken.

    Args:
        bottom_up: any backbone whose ``output_shape()`` is right; if it has an ``img_size`` other
            than None, it takes images of that height and width alone.
        out_channels: channels of every level of the pyramid.
        in_features: levels of ``bottom_up`` to use, by default those of strides 2^min_level to 32,
            or the nearest if there is none. A finer one that is given lowers ``min_level``, a
            coarser one is left to the top block.
        min_level: the finest level of the pyramid, 2 for p2 (stride 4).
        norm: norm of the pyramid's convolutions, by default none for the FPN and "LN" for the
            SimpleFeaturePyramid, as in their papers.
        top_block: makes p6 (and p7) from p5: detectron2's LastLevelMaxPool or LastLevelP6P7.
        fuse_type: "sum" or "avg", how the FPN adds the coarser level.

    Returns:
        the pyramid, levels ``p{min_level}`` to ``p5`` and those of the top block.

    Raises:
        ValueError: if a level is unknown, ``min_level`` is out of range or a stride is no power of
            two.
    """
    if min_level not in range(COARSEST + 1):
        raise ValueError(f"min_level={min_level!r} must be a whole number from 0 to {COARSEST}")
    shapes = bottom_up.output_shape()
    if in_features is not None:
        names = select_levels(in_features, list(shapes), "in_features")
    else:
        inside = [n for n, s in shapes.items() if 2**min_level <= s.stride <= 2**COARSEST]
        names = inside or list(shapes)
    for name in names:
        stride = shapes[name].stride
        if not is_power_of_two(stride):
            raise ValueError(
                f"level {name} has stride {stride}, and a pyramid needs powers of two: for a "
                "patch-14 ViT give patch_size=16"
            )
    levels = {shapes[name].stride.bit_length() - 1: name for name in names}
    if in_features is not None:
        min_level = min(min_level, *levels)
    wanted = range(min_level, COARSEST + 1)
    nearest = min(levels, key=lambda n: (n not in wanted, abs(n - min_level)))
    levels = {n: levels[n] for n in levels if n in wanted or n == nearest}
    factors = [2.0 ** (nearest - n) for n in wanted]
    if len(levels) == 1 and set(factors) <= set(SCALE_FACTORS):
        return SimpleFeaturePyramid(
            bottom_up,
            levels[nearest],
            out_channels,
            scale_factors=factors,
            top_block=top_block,
            norm="LN" if norm is None else norm,
        )
    return FeaturePyramid(
        bottom_up,
        levels,
        min_level,
        out_channels=out_channels,
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
