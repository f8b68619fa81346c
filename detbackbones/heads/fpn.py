"""detectron2's head of Panoptic FPN, whose loss is a number for every batch."""

import torch
from detectron2.modeling.meta_arch import semantic_seg


class SemSegFPNHead(semantic_seg.SemSegFPNHead):
    """detectron2's ``SemSegFPNHead``; a batch whose pixels are all in no class counts 0.

    The mean over no pixel, which detectron2's has there, is NaN and would end the training.
    """

    def losses(self, predictions: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """The mean cross entropy of the pixels that are in a class; 0 where none is.

        Args:
            predictions: logits (N, num_classes, H / common_stride, W / common_stride).
            targets: the class of each pixel, (N, H, W).

        Returns:
            the loss, a scalar, by its name.
        """
        if (targets == self.ignore_value).all():
            return {"loss_sem_seg": 0 * predictions.sum()}
        return super().losses(predictions, targets)
