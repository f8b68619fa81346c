"""Test-time augmentation: objects that are found in several views of an image."""

import copy
import math
from collections.abc import Sequence

import detectron2.data.transforms as T
import torch
from detectron2.structures import Boxes, Instances
from torchvision.ops import batched_nms

from ..data.transforms import resizing

SCALES = (1.0,)  # of the size that images of the validation set have
IOU = 0.5  # above which two boxes of a class are of one object


def scaled(augmentations: T.AugmentationList, scale: float) -> T.AugmentationList:
    """Augmentations that resize to another size.

    Args:
        augmentations: of a mapper for tests.
        scale: of the lengths that they give an image.

    Raises:
        ValueError: if one does not resize.
    """
    augmentations = copy.deepcopy(augmentations)

    def scaled_to(length: int) -> int:
        return max(round(scale * length), 1)

    for augmentation in resizing(augmentations):
        if isinstance(augmentation, T.ResizeShortestEdge):
            lengths = augmentation.short_edge_length
            augmentation.short_edge_length = [*map(scaled_to, lengths)]
            augmentation.max_size = scaled_to(augmentation.max_size)
        else:
            augmentation.shape = tuple(map(scaled_to, augmentation.shape))
    return augmentations


def check_scales(scales: Sequence[float]) -> None:
    """Refuse scales that are none.

    Raises:
        ValueError: if there is none, or one is no number above 0.
    """
    if not scales:
        raise ValueError("augment=[] must be numbers above 0, such as 1")
    for scale in scales:
        if not 0 < scale < math.inf:
            raise ValueError(f"augment={scale} must be a number above 0")


def flipped(found: Instances) -> Instances:
    """Objects of an image in its mirror image, left being right.

    Args:
        found: with boxes, and maybe masks (n, H, W).

    Raises:
        ValueError: if they have more that has a place, such as keypoints.
    """
    known = {"pred_boxes", "scores", "pred_classes", "pred_masks"}
    if more := {*found.get_fields()} - known:
        raise ValueError(f"objects with {', '.join(sorted(more))} must be found without flipping")
    fields = found.get_fields()
    x0, y0, x1, y1 = fields["pred_boxes"].tensor.unbind(1)
    width = found.image_size[1]
    boxes = Boxes(torch.stack([width - x1, y0, width - x0, y1], dim=1))
    masks = {"pred_masks": fields["pred_masks"].flip(-1)} if "pred_masks" in fields else {}
    return Instances(found.image_size, **fields | {"pred_boxes": boxes} | masks)


def merged(views: list[Instances], iou: float = IOU) -> Instances:
    """One object for all that the views have of it: the one with the best score.

    Args:
        views: objects of one image at its own size.
        iou: of the boxes of two objects of one class, above which they are one.

    Returns:
        no more objects than the view with most has, the best first.
    """
    found = Instances.cat(views)
    boxes, most = found.pred_boxes.tensor, max(map(len, views))
    return found[batched_nms(boxes, found.scores, found.pred_classes, iou)[:most]]
