"""Mask2Former's loss with true masks as bits, of which a few are floats at a time."""

import torch
from scipy.optimize import linear_sum_assignment
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerHungarianMatcher,
    Mask2FormerLoss,
    dice_loss,
    pair_wise_dice_loss,
    pair_wise_sigmoid_cross_entropy_loss,
    sample_point,
    sigmoid_cross_entropy_loss,
)

from .processes import mean_per_process

_AT_A_TIME = 16  # masks of an image that are floats
Indices = list[tuple[torch.Tensor, torch.Tensor]]


class PointMatcher(Mask2FormerHungarianMatcher):
    """Transformers' matcher, with the true masks as bits."""

    @torch.no_grad()
    def forward(
        self,
        masks_queries_logits: torch.Tensor,
        class_queries_logits: torch.Tensor,
        mask_labels: list[torch.Tensor],
        class_labels: list[torch.Tensor],
    ) -> Indices:
        """
        Args:
            masks_queries_logits: (N, queries, h, w).
            class_queries_logits: (N, queries, classes + 1).
            mask_labels: for each image bits (n, H, W).
            class_labels: for each image (n,).

        Returns:
            for each image the queries that have a mask, and which one.
        """
        images = zip(
            class_queries_logits.float(), masks_queries_logits.float(), mask_labels, class_labels
        )
        with torch.autocast(masks_queries_logits.device.type, enabled=False):
            return [self._match(*image) for image in images]

    def _match(
        self,
        logits: torch.Tensor,
        masks: torch.Tensor,
        true_masks: torch.Tensor,
        classes: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Match the masks of one image."""
        points = torch.rand(1, self.num_points, 2, device=masks.device)
        truth = read_bits(true_masks, points)
        found = sample_point(masks[None], points, align_corners=False)[0]
        costs = self.cost_class * -logits.softmax(-1)[:, classes]
        costs = costs + self.cost_mask * pair_wise_sigmoid_cross_entropy_loss(found, truth)
        costs = costs + self.cost_dice * pair_wise_dice_loss(found, truth)
        most = torch.finfo(costs.dtype).max
        costs = costs.nan_to_num(nan=most, posinf=most, neginf=most)
        return tuple(map(torch.as_tensor, linear_sum_assignment(costs.cpu())))


class PointLoss(Mask2FormerLoss):
    """Transformers' loss, with the true masks as bits."""

    def __init__(self, config: Mask2FormerConfig, weight_dict: dict[str, float]):
        """
        Args:
            config: of the model.
            weight_dict: of the three losses.
        """
        super().__init__(config, weight_dict)
        matcher = self.matcher
        costs = (matcher.cost_class, matcher.cost_mask, matcher.cost_dice)
        self.matcher = PointMatcher(*costs, matcher.num_points)

    def loss_masks(
        self,
        masks_queries_logits: torch.Tensor,
        mask_labels: list[torch.Tensor],
        indices: Indices,
        num_masks: float,
    ) -> dict[str, torch.Tensor]:
        """Cross entropy and dice loss at points, most of them where the mask is uncertain.

        Args:
            masks_queries_logits: (N, queries, h, w).
            mask_labels: for each image bits (n, H, W).
            indices: see :class:`PointMatcher`.
            num_masks: to divide by.
        """
        found = masks_queries_logits[self._get_predictions_permutation_indices(indices)][:, None]
        found = found.float()
        with torch.no_grad():
            points = self.sample_points_using_uncertainty(
                found,
                self.calculate_uncertainty,
                self.num_points,
                self.oversample_ratio,
                self.importance_sample_ratio,
            )
            counts = [len(query) for query, _ in indices]
            truth = torch.cat(
                [
                    read_bits(masks, at, which)
                    for masks, at, (_, which) in zip(mask_labels, points.split(counts), indices)
                ]
            )
        logits = sample_point(found, points, align_corners=False).squeeze(1)
        return {
            "loss_mask": sigmoid_cross_entropy_loss(logits, truth, num_masks),
            "loss_dice": dice_loss(logits, truth, num_masks),
        }

    def get_num_masks(self, class_labels: list[torch.Tensor], device: torch.device) -> float:
        """What the losses are divided by."""
        return mean_per_process(sum(map(len, class_labels)))


def read_bits(
    masks: torch.Tensor, points: torch.Tensor, which: torch.Tensor | None = None
) -> torch.Tensor:
    """Masks at points between their pixels; a few of the masks are floats at a time.

    Args:
        masks: bits (n, H, W).
        points: (m, P, 2), x and y from 0 to 1; m may be 1, for the same points in all masks.
        which: of the masks, (m,); None is for all.

    Returns:
        values from 0 to 1, (m, P).
    """
    which = torch.arange(len(masks)) if which is None else which
    if not len(which):
        return points.new_zeros(0, points.shape[1])
    parts = which.split(_AT_A_TIME)
    if len(points) == 1:
        return torch.cat(
            [sample_point(masks[i][None].float(), points, align_corners=False)[0] for i in parts]
        )
    return torch.cat(
        [
            sample_point(masks[i][:, None].float(), at, align_corners=False).squeeze(1)
            for i, at in zip(parts, points.split(_AT_A_TIME))
        ]
    )
