"""LinearHead: a linear classifier of pixels."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from detectron2.utils.comm import get_world_size
from torch import nn

from .segmentation_head import SegmentationHead, upsample


@SEM_SEG_HEADS_REGISTRY.register()
class LinearHead(SegmentationHead):
    """A 1x1 convolution on one level, or on several that are resized to the finest and joined.

    The features are standardised before it, as DINOv2's linear evaluation does by batch norm
    (https://arxiv.org/abs/2304.07193): the scales of frozen features differ by orders of magnitude
    between models, levels and channels, and without it each would need its own learning rate.
    """

    @configurable
    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        num_classes: int,
        in_features: Sequence[str] | None = None,
        loss_weight: float = 1.0,
        ignore_value: int = 255,
    ):
        """
        Args:
            input_shape: the backbone's ``output_shape()``.
            num_classes: number of classes.
            in_features: names of the levels to use; all if None.
            loss_weight: the loss is multiplied by it.
            ignore_value: value of the pixels of a label map that are in no class.

        Raises:
            ValueError: see :class:`SegmentationHead`.
        """
        super().__init__(input_shape, in_features, num_classes, loss_weight, ignore_value)
        strides = [input_shape[name].stride for name in self.in_features]
        self.stride = strides[0]
        self._factors = [stride / self.stride for stride in strides]
        # Resizing and a 1x1 convolution may change places: the sum of the resized logits of each
        # level is what one convolution of the resized and joined levels gives.
        self.classifiers = nn.ModuleList()
        for name in self.in_features:
            channels = input_shape[name].channels
            conv = nn.Conv2d(channels, num_classes, 1, bias=name == self.in_features[0])
            nn.init.normal_(conv.weight, std=0.01)
            self.classifiers.append(nn.Sequential(Standardise(channels), conv))
        nn.init.zeros_(self.classifiers[0][1].bias)

    def layers(self, features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits (N, num_classes, h, w) of the size of the finest level used."""
        logits = 0
        height, width = features[self.in_features[0]].shape[-2:]
        for name, factor, classifier in zip(self.in_features, self._factors, self.classifiers):
            level = upsample(classifier(features[name]), factor)
            logits = logits + level[..., :height, :width]
        return logits


class Standardise(nn.Module):
    """Batch norm by the mean and variance of all batches so far, in training too.

    By those of the batch alone, as batch norm does in training, the same pixel would have other
    values in training than in evaluation, and much so if a batch has few different images. Each
    batch of each process counts as much as any other.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.register_buffer("num_batches", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) with about zero mean and unit variance in each channel."""
        if self.training:
            self._update(x)
        return F.batch_norm(x, self.mean, self.var)

    @torch.no_grad()
    def _update(self, x: torch.Tensor) -> None:
        here = torch.stack(torch.var_mean(x.float(), (0, 2, 3), correction=0))
        batches = [here]
        if (processes := get_world_size()) > 1:
            batches = [torch.empty_like(here) for _ in range(processes)]
            dist.all_gather(batches, here)
        for var, mean in batches:
            self.num_batches += 1
            weight, step = 1 / self.num_batches, mean - self.mean
            self.mean += weight * step
            self.var.lerp_(var, weight).add_(weight * (1 - weight) * step**2)
