"""Feature distillation: a backbone learns to give what another gives, from images alone."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.evaluation import DatasetEvaluator
from detectron2.layers import Conv2d
from detectron2.utils import comm
from torch import nn

from ..backbones.feature_backbone import FeatureBackbone
from ..detr.images import NormalizesImages

COSINE, SMOOTH_L1 = 0.9, 0.1  # weights of the two parts of the loss, as in AM-RADIO


class FeatureDistiller(NormalizesImages):
    """A backbone, the student, and another that it learns from, the teacher.

    Each level of the teacher is computed from that level of the student whose stride is nearest, by
    a 1x1 convolution, and resized. The teacher's maps are standardised by channel, so that all
    channels count; the loss is that of AM-RADIO (arXiv 2312.06709, section 3.3): of the cosine
    between both maps at each place, and of their difference.
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
        own = backbone.output_shape()
        self.pairs = {
            name: min(own, key=lambda n: abs(math.log2(own[n].stride / shape.stride)))
            for name, shape in teacher.output_shape().items()
        }
        pairs = [(own[self.pairs[n]], shape) for n, shape in teacher.output_shape().items()]
        self.projections = nn.ModuleList(Conv2d(a.channels, b.channels, 1) for a, b in pairs)
        self.standards = nn.ModuleList(
            nn.BatchNorm2d(b.channels, affine=False, momentum=None) for _, b in pairs
        )

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """
        Args:
            batched_inputs: for each image a dict with ``image``, an RGB tensor (C, H, W) of 0 to
                255; in an evaluation one image at a time.

        Returns:
            in training a dict of losses, one for each level of the teacher; else for each image a
            dict with ``similarity``, the mean cosine of each level.
        """
        images = self.preprocess_image(batched_inputs).tensor
        with torch.no_grad():
            pixels = images * self.pixel_std + self.pixel_mean
            targets = self.teacher((pixels - self.teacher_pixel_mean) / self.teacher_pixel_std)
        levels = self.backbone(images)
        losses, similarity = {}, {}
        for (name, source), projection, standard in zip(
            self.pairs.items(), self.projections, self.standards
        ):
            target = standard(targets[name].float())
            found = projection(levels[source]).float()
            found = F.interpolate(found, size=target.shape[-2:], mode="bilinear")
            cosine = F.cosine_similarity(found, target, dim=1).mean()
            difference = F.smooth_l1_loss(found, target)
            losses[f"loss_{name}"] = COSINE * (1 - cosine) + SMOOTH_L1 * difference
            similarity[name] = float(cosine.detach())
        return losses if self.training else [{"similarity": similarity}] * len(batched_inputs)


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
