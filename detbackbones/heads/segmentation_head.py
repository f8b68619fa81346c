"""What the heads for semantic segmentation have in common: detectron2's protocol for them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from torch import nn

from ..measure.levels import select_levels
from ..messages import whole_number


def upsample(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Resize maps, with each pixel staying where it is in the image.

    Args:
        x: (N, C, h, w).
        factor: by which h and w grow, or shrink if it is below 1.

    Returns:
        (N, C, factor h, factor w), the sizes rounded.
    """
    size = [round(n * factor) for n in x.shape[-2:]]
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class SegmentationHead(nn.Module):
    """A head as detectron2's SemanticSegmentor and PanopticFPN call it.

    A subclass has ``layers``, from feature maps to logits, and sets ``stride``, that of the logits.

    Attributes:
        in_features: the levels that are used, fine to coarse.
        ignore_value: what SemanticSegmentor pads label maps with.
    """

    stride: float

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        in_features: Sequence[str] | None,
        num_classes: int,
        loss_weight: float,
        ignore_value: int,
    ):
        """
        Args:
            input_shape: the backbone's ``output_shape()``.
            in_features: names of the levels to use; all if None.
            num_classes: number of classes.
            loss_weight: the loss is multiplied by it.
            ignore_value: value of the pixels of a label map that are in no class.

        Raises:
            ValueError: if a level is unknown, ``num_classes`` is no whole number from 1, or
                ``ignore_value`` is a class.
        """
        super().__init__()
        whole_number("num_classes", num_classes)
        if ignore_value in range(num_classes):
            raise ValueError(
                f"ignore_value={ignore_value} must be none of the classes 0 to {num_classes - 1}, "
                "but the value that the label maps have for no class"
            )
        names = list(input_shape)
        names = names if in_features is None else select_levels(in_features, names, "in_features")
        self.in_features = sorted(names, key=lambda name: input_shape[name].stride)
        self.loss_weight, self.ignore_value = loss_weight, ignore_value

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Arguments from the yacs keys under MODEL.SEM_SEG_HEAD."""
        return {
            "input_shape": input_shape,
            "num_classes": cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES,
            "in_features": cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES or None,
            "loss_weight": cfg.MODEL.SEM_SEG_HEAD.LOSS_WEIGHT,
            "ignore_value": cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
        }

    def forward(
        self, features: Mapping[str, torch.Tensor], targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """
        Args:
            features: the backbone's feature maps, (N, C, H / stride, W / stride) each.
            targets: the class of each pixel, (N, H, W); needed in training.

        Returns:
            None and the losses in training, else logits (N, num_classes, H, W) and no losses.
        """
        logits = self.layers(features)
        if self.training:
            return None, self.losses(logits, targets)
        return upsample(logits, self.stride), {}

    def layers(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits (N, num_classes, H / stride, W / stride) of ``features``, see :meth:`forward`."""
        raise NotImplementedError

    def losses(self, predictions: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """The mean cross entropy of the pixels that are in a class; 0 where none is.

        Args:
            predictions: what :meth:`layers` returned.
            targets: the class of each pixel, (N, H, W).

        Returns:
            the loss, a scalar, by its name.
        """
        height, width = targets.shape[-2:]
        # Levels whose size was rounded up reach beyond the image.
        logits = upsample(predictions.float(), self.stride)[..., :height, :width]
        loss = F.cross_entropy(logits, targets, ignore_index=self.ignore_value, reduction="sum")
        count = (targets != self.ignore_value).sum().clamp(min=1)
        return {"loss_sem_seg": self.loss_weight * loss / count}
