"""DPTHead: the decoder of dense prediction transformers."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import nn

from ..backbones.timm_source import TimmSource
from .segmentation_head import SegmentationHead, upsample

DEPTHS = 4  # of a plain ViT: their maps become a pyramid by these factors
FACTORS = (4, 2, 1, 0.5)


@SEM_SEG_HEADS_REGISTRY.register()
class DPTHead(SegmentationHead):
    """Levels are made a pyramid and fused from coarse to fine.

    The head of https://arxiv.org/abs/2103.13413 for segmentation. Four levels of one stride, as a
    plain ViT has them at four depths, become levels of 1/4, 1/2, 1 and 2 times that stride, the
    shallowest the finest; the levels of a pyramid keep their strides. Two things differ from the
    paper. The norm is group norm, as in detectron2's SemSegFPNHead, for batch norm is unreliable
    with small batches. And the projection of each level has a norm too, for the scales of frozen
    features differ much between levels.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int,
        in_features: Sequence[str] | None = None,
        conv_dims: int = 256,
        norm: str = "GN",
        loss_weight: float = 1.0,
        ignore_value: int = 255,
    ):
        """
        Args:
            input_shape: the backbone's ``output_shape()``.
            num_classes: number of classes.
            in_features: names of the levels to use; all if None.
            conv_dims: channels of all convolutions, a multiple of 32 for group norm.
            norm: of the convolutions, one of detectron2's names; "" is none.
            loss_weight: the loss is multiplied by it.
            ignore_value: value of the pixels of a label map that are in no class.

        Raises:
            ValueError: if the levels are neither four of one stride nor two or more of which each
                has twice the stride of the one before; also see :class:`SegmentationHead`.
        """
        super().__init__(input_shape, in_features, num_classes, loss_weight, ignore_value)
        strides = [input_shape[name].stride for name in self.in_features]
        factors = _factors(strides)
        self.reassemble = nn.ModuleList(
            _reassemble(input_shape[name].channels, conv_dims, factor, norm)
            for name, factor in zip(self.in_features, factors)
        )
        coarsest = len(strides) - 1
        self.fuse = nn.ModuleList(
            Fusion(conv_dims, norm, alone=i == coarsest) for i in range(coarsest + 1)
        )
        self.predictor = nn.Sequential(
            _conv(conv_dims, conv_dims, 3, norm, activation=F.relu),
            nn.Dropout(0.1),
            nn.Conv2d(conv_dims, num_classes, 1),
        )
        self.stride = strides[0] / factors[0] / 2  # the last fusion doubles the size too

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Arguments from the yacs keys under MODEL.SEM_SEG_HEAD."""
        return {
            **super().from_config(cfg, input_shape),
            "conv_dims": cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM,
            "norm": cfg.MODEL.SEM_SEG_HEAD.NORM,
        }

    def layers(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits (N, num_classes, 2 h, 2 w) for the finest level (N, C, h, w) of the pyramid."""
        maps = [layer(features[name]) for name, layer in zip(self.in_features, self.reassemble)]
        fused = None
        for level, fusion in zip(reversed(maps), reversed(self.fuse)):
            fused = fusion(level, fused)
        return self.predictor(fused)


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions, each after a ReLU, beside an identity."""

    def __init__(self, channels: int, norm: str):
        super().__init__()
        self.convs = nn.ModuleList(_conv(channels, channels, 3, norm) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.convs
        return x + second(F.relu(first(F.relu(x))))


class Fusion(nn.Module):
    """Adds a level to the fused coarser ones, refines the sum and doubles its size."""

    def __init__(self, channels: int, norm: str, alone: bool):
        """
        Args:
            channels: of all maps.
            norm: of the convolutions.
            alone: whether there is nothing coarser.
        """
        super().__init__()
        self.skip = None if alone else ResidualUnit(channels, norm)
        self.refine = ResidualUnit(channels, norm)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, level: torch.Tensor, coarser: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            level: (N, C, h, w).
            coarser: the fused coarser levels, of the same size, or larger where a size was odd.

        Returns:
            (N, C, 2 h, 2 w).
        """
        if coarser is not None:
            level = self.skip(level) + coarser[..., : level.shape[-2], : level.shape[-1]]
        return upsample(self.project(self.refine(level)), 2)


def _factors(strides: Sequence[int]) -> Sequence[float]:
    """By how much each level is made larger."""
    if len(strides) == DEPTHS and len(set(strides)) == 1:
        return FACTORS
    if len(strides) > 1 and all(2 * fine == coarse for fine, coarse in zip(strides, strides[1:])):
        return [1] * len(strides)
    raise ValueError(
        f"input_shape with strides {', '.join(map(str, strides))} must be {DEPTHS} levels of one "
        "stride, as out_indices=(2, 5, 8, 11) gives them of a ViT with 12 blocks, or a pyramid in "
        "which each stride is twice the one before"
    )


def _conv(inputs: int, outputs: int, size: int, norm: str, **kwargs: Any) -> Conv2d:
    """detectron2's convolution, which keeps the size, with a norm."""
    kwargs = {"padding": size // 2, "norm": get_norm(norm, outputs), **kwargs}
    return Conv2d(inputs, outputs, size, bias=not norm, **kwargs)


def _reassemble(inputs: int, channels: int, factor: float, norm: str) -> nn.Sequential:
    """Layers that project a level to ``channels`` and make it larger by ``factor``."""
    layers = [_conv(inputs, channels, 1, norm)]
    if factor > 1:
        layers.append(nn.ConvTranspose2d(channels, channels, factor, stride=factor))
    elif factor < 1:
        layers.append(nn.Conv2d(channels, channels, 3, stride=round(1 / factor), padding=1))
    return nn.Sequential(*layers)


def dpt_indices(model_name: str) -> list[int] | None:
    """``out_indices`` of a timm model for DPTHead, for a config that takes any model.

    Args:
        model_name: as TimmBackbone takes it.

    Returns:
        four depths of a model whose levels all have one stride, the last of each quarter, as
        https://arxiv.org/abs/2103.13413 has them: (2, 5, 8, 11) of 12. None for a pyramid.

    Raises:
        ValueError: if the model is unknown or has no feature maps.
    """
    source = TimmSource(model_name)
    indices = source.level_keys
    if len({level.stride for level in source.trace.levels}) > 1 or len(indices) < DEPTHS:
        return None
    return [indices[len(indices) * n // DEPTHS - 1] for n in range(1, DEPTHS + 1)]
