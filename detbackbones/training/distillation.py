"""Feature distillation: a backbone learns to give what another gives, from images alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.evaluation import DatasetEvaluator
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.utils import comm
from torch import nn

from ..backbones.feature_backbone import FeatureBackbone
from ..detr.images import NormalizesImages

COSINE, SMOOTH_L1 = 0.9, 0.1  # weights of the two parts of the loss, as in AM-RADIO


class FeatureDistiller(NormalizesImages):
    """A backbone, the student, and another that it learns from, the teacher.

    Each level of the teacher is computed from that level of the student whose stride is nearest, by
    a 1x1 convolution, and resized; a level of the student that none is computed from gives that of
    the nearest stride, too, so that all of it learns. The teacher's maps are standardised by
    channel, so that all channels count; the loss is that of AM-RADIO (arXiv 2312.06709): of the
    cosine between both maps at each place, and of their difference.

    Attributes:
        pairs: of each loss the level of the teacher and that of the student.
    """

    def __init__(self, *, backbone: FeatureBackbone, teacher: FeatureBackbone):
        """
        Args:
            backbone: the student.
            teacher: all frozen.

        Raises:
            ValueError: if the teacher learns.
        """
        super().__init__(backbone, None, None)
        if any(p.requires_grad for p in teacher.parameters()):
            raise ValueError("teacher must have freeze_at=5, for it does not learn")
        self.teacher = teacher
        for key in ("pixel_mean", "pixel_std"):
            pixels = torch.tensor(getattr(teacher, key)).view(-1, 1, 1)
            self.register_buffer(f"teacher_{key}", pixels, persistent=False)
        own, theirs = backbone.output_shape(), teacher.output_shape()
        self.pairs = {name: (name, _nearest(shape, own)) for name, shape in theirs.items()}
        for name in own.keys() - {name for _, name in self.pairs.values()}:
            other = _nearest(own[name], theirs)
            self.pairs[f"{other}_from_{name}"] = (other, name)
        self.projections = nn.ModuleDict(
            {k: Conv2d(own[b].channels, theirs[a].channels, 1) for k, (a, b) in self.pairs.items()}
        )
        self.standards = nn.ModuleDict(
            {
                name: nn.BatchNorm2d(shape.channels, affine=False, momentum=None)
                for name, shape in theirs.items()
            }
        )

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: for each image a dict with ``image``, an RGB tensor (C, H, W) of 0 to
                255.

        Returns:
            in training a dict of losses; else for each image a dict with ``similarity``, the mean
            cosine of each level of the teacher.
        """
        if not self.training:
            return [{"similarity": self._similarity(each)} for each in batched_inputs]
        losses = {}
        for key, (found, target) in self._maps(batched_inputs).items():
            cosine = F.cosine_similarity(found, target, dim=1).mean()
            difference = F.smooth_l1_loss(found, target)
            losses[f"loss_{key}"] = COSINE * (1 - cosine) + SMOOTH_L1 * difference
        return losses

    def _similarity(self, image: dict[str, Any]) -> dict[str, float]:
        maps = self._maps([image])
        return {key: float(F.cosine_similarity(*pair, dim=1).mean()) for key, pair in maps.items()}

    def _maps(
        self, batched_inputs: list[dict[str, Any]]
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Of each pair of levels what is computed of the student's, and the teacher's."""
        images = self.preprocess_image(batched_inputs).tensor
        with torch.no_grad():
            pixels = images * self.pixel_std + self.pixel_mean
            theirs = self.teacher((pixels - self.teacher_pixel_mean) / self.teacher_pixel_std)
            theirs = {key: self.standards[key](level.float()) for key, level in theirs.items()}
        own, maps = self.backbone(images), {}
        for key, (name, source) in self.pairs.items():
            found = self.projections[key](own[source]).float()
            size = theirs[name].shape[-2:]
            maps[key] = F.interpolate(found, size=size, mode="bilinear"), theirs[name]
        return maps


def _nearest(shape: ShapeSpec, levels: Mapping[str, ShapeSpec]) -> str:
    """The level of the nearest stride."""
    return min(levels, key=lambda name: abs(math.log2(levels[name].stride / shape.stride)))


class SimilarityEvaluator(DatasetEvaluator):
    """The mean cosine between a student's maps and the teacher's, in percent."""

    def reset(self) -> None:
        """Forget all images."""
        self._found: list[dict[str, float]] = []

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict[str, Any]]) -> None:
        """Take what a :class:`FeatureDistiller` gives for some images."""
        self._found += [output["similarity"] for output in outputs]

    def evaluate(self) -> dict[str, dict[str, float]] | None:
        """Of all levels, and of each; None in a process that is not the main one."""
        found = [each for part in comm.gather(self._found) for each in part]
        if not comm.is_main_process():
            return None
        levels = {
            f"cosine-{name}": 100 * sum(each[name] for each in found) / len(found)
            for name in found[0]
        }
        return {"similarity": {"cosine": sum(levels.values()) / len(levels), **levels}}
