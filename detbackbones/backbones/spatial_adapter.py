"""SpatialTuningAdapter: levels of strides 8, 16 and 32 on a plain ViT."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import Backbone
from torch import nn

from ..measure.levels import select_levels
from ..messages import one_of, whole_number

NORMS = ("BN", "SyncBN", "FrozenBN", "GN", "LN", "")  # detectron2's
STRIDES = {"res3": 8, "res4": 16, "res5": 32}


class SpatialTuningAdapter(Backbone):
    """A plain ViT and a small convolution branch beside it, which sees what patches are too coarse
    for (DEIMv2, arXiv 2509.20787).

    Each level is a map of the ViT, resized bilinearly, joined with the map of the branch of that
    stride by a 1x1 convolution. Of three maps of the ViT the earliest goes to the finest level; of
    one map all levels are made. It is a backbone as any: ``bottom_up`` of a pyramid, and the
    backbone of a DETR or of Mask2Former.

    Example::

        vit = TimmBackbone("vit_small_patch16_dinov3", out_indices=[5, 8, 11])
        backbone = SpatialTuningAdapter(vit)  # res3, res4, res5
    """

    def __init__(
        self,
        net: Backbone,
        out_channels: int = 256,
        *,
        in_features: Sequence[str] | None = None,
        in_channels: int = 3,
        branch_channels: int = 16,
        norm: str = "BN",
    ):
        """
        Args:
            net: the ViT; any backbone whose levels have one stride.
            out_channels: of each level.
            in_features: its levels to take, one or three; by default all.
            in_channels: of the images.
            branch_channels: of the first convolution of the branch; the others have 2 and 4 times
                as many.
            norm: after each convolution: "BN", "SyncBN", "FrozenBN", "GN", "LN", or "" for none.

        Raises:
            ValueError: if an argument is wrong, or the levels are not one or three of one stride.
        """
        super().__init__()
        counts = {"out_channels": out_channels, "in_channels": in_channels}
        for key, value in (counts | {"branch_channels": branch_channels}).items():
            whole_number(key, value)
        one_of("norm", norm, NORMS)
        shapes = net.output_shape()
        names = list(shapes)
        if in_features is not None:
            names = select_levels(in_features, names, "in_features")
        if len(names) not in (1, 3) or len({shapes[name].stride for name in names}) > 1:
            found = ", ".join(f"{name} of stride {shapes[name].stride}" for name in names)
            raise ValueError(
                f"in_features must be one or three levels of one stride, as a plain ViT has them, "
                f"and are {found}: out_indices of the backbone chooses them"
            )
        self.net = net
        self.in_features = names if len(names) == 3 else names * 3
        c = branch_channels
        self.stem = nn.Sequential(
            _convolution(in_channels, c, norm), nn.GELU(), nn.MaxPool2d(3, 2, 1)
        )
        self.branch = nn.ModuleList(
            [_convolution(a * c, b * c, norm) for a, b in ((1, 2), (2, 4), (4, 4))]
        )
        self.fusion = nn.ModuleList(
            Conv2d(
                shapes[name].channels + detail.out_channels,
                out_channels,
                1,
                bias=False,
                norm=get_norm(norm, out_channels),
            )
            for name, detail in zip(self.in_features, self.branch)
        )
        self._shapes = {
            name: ShapeSpec(channels=out_channels, stride=stride)
            for name, stride in STRIDES.items()
        }

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Args:
            x: images (N, C, H, W), of a size that the ViT takes.

        Returns:
            each level, (N, out_channels, ceil(H / stride), ceil(W / stride)), fine to coarse.
        """
        maps = self.net(x)
        detail, levels = self.stem(x), {}
        for i, (name, source) in enumerate(zip(STRIDES, self.in_features)):
            detail = self.branch[i](detail if i == 0 else F.gelu(detail))
            semantic = F.interpolate(maps[source], size=detail.shape[-2:], mode="bilinear")
            levels[name] = self.fusion[i](torch.cat([semantic, detail], dim=1))
        return levels

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each level, fine to coarse."""
        return self._shapes

    @property
    def img_size(self) -> int | None:
        """N if the ViT takes images of N x N only."""
        return getattr(self.net, "img_size", None)

    @property
    def size_divisibility(self) -> int:
        """Height and width of the input are to be multiples of this; of a patch-14 ViT 224, which
        ``patch_size=16`` makes 32.
        """
        return self.img_size or math.lcm(self.net.size_divisibility or 1, STRIDES["res5"])

    @property
    def padding_constraints(self) -> dict[str, int]:
        """Those of the ViT, and ``size_divisibility``."""
        return {**self.net.padding_constraints, "size_divisibility": self.size_divisibility}


def _convolution(in_channels: int, out_channels: int, norm: str) -> Conv2d:
    """A 3x3 convolution of stride 2."""
    return Conv2d(
        in_channels,
        out_channels,
        3,
        stride=2,
        padding=1,
        bias=False,
        norm=get_norm(norm, out_channels),
    )
