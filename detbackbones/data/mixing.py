"""Augmentations that make one image of several: mosaic, mixup and copy-paste."""

from collections.abc import Callable

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks

from ..messages import fraction
from .augmentation import GRAY
from .semantic import IGNORE_LABEL

Sample = dict
VISIBLE = 0.1  # of an object's box or mask, or it is left out


class Mixing:
    """Makes a sample of several that a mapper gives; in the last part of a training, of one alone.

    Boxes are cut off at the edges, objects of which less than a tenth is left are left out, and
    polygons become bits.
    """

    def __init__(
        self,
        *,
        mosaic: float = 0.0,
        mixup: float = 0.0,
        copy_paste: float = 0.0,
        until: float = 0.8,
        max_iter: int,
    ):
        """
        Args:
            mosaic: probability that four images meet at a point of the first (Bochkovskiy et al.,
                arXiv 2004.10934).
            mixup: probability that another image shines through, with its objects (Zhang et al.,
                arXiv 1710.09412; for detection arXiv 1902.04103).
            copy_paste: probability that half of the objects of another image are put on the image
                by their masks (Ghiasi et al., arXiv 2012.07177).
            until: the part of ``max_iter`` after which no images are mixed.
            max_iter: iterations of the training.

        Raises:
            ValueError: if a probability or ``until`` is no number from 0 to 1.
        """
        for name, value in (
            ("mosaic", mosaic),
            ("mixup", mixup),
            ("copy_paste", copy_paste),
            ("until", until),
        ):
            fraction(name, value)
        self.mosaic, self.mixup, self.copy_paste = mosaic, mixup, copy_paste
        self.iterations = int(until * max_iter)

    def __call__(self, sample: Sample, draw: Callable[[], Sample]) -> Sample:
        """Mix a sample with others; random numbers are those of NumPy.

        Args:
            sample: what a mapper gives.
            draw: gives another.
        """
        if np.random.rand() < self.mosaic:
            sample = mosaic([sample, draw(), draw(), draw()])
        if np.random.rand() < self.copy_paste:
            sample = copy_paste(sample, draw())
        if np.random.rand() < self.mixup:
            sample = mixup(sample, draw())
        return sample

    def check(self, *, label_maps: bool, masks: bool, keypoints: bool) -> None:
        """Refuse what the data do not allow.

        Args:
            label_maps: whether the images have label maps.
            masks: whether the objects have masks.
            keypoints: whether they have keypoints.

        Raises:
            ValueError: if label maps are to be mixed otherwise than by mosaic, objects without
                masks by copy-paste, or keypoints at all.
        """
        for name in ("mosaic", "mixup", "copy_paste"):
            value = getattr(self, name)
            if value and keypoints:
                raise ValueError(f"{name}={value} must be 0 where keypoints are learned")
            if value and label_maps and name != "mosaic":
                raise ValueError(f"{name}={value} must be 0 for label maps, which mosaic can mix")
        if self.copy_paste and not masks:
            raise ValueError(
                f"copy_paste={self.copy_paste} must be 0 where no masks are learned, by which it "
                "moves objects"
            )


def mosaic(samples: list[Sample]) -> Sample:
    """Four samples that meet at a random point in the middle of the first, in its size."""
    height, width = samples[0]["image"].shape[1:]
    y, x = (int(np.random.uniform(0.3, 0.7) * length) for length in (height, width))
    parts = []
    for sample, top, left in zip(samples, (True, True, False, False), (True, False, True, False)):
        rows, columns = sample["image"].shape[1:]
        high, wide = (y if top else height - y), (x if left else width - x)
        # the corner of the sample that is nearest to the point
        part = window(sample, rows - high if top else 0, columns - wide if left else 0, high, wide)
        parts.append(window(part, 0 if top else -y, 0 if left else -x, height, width))
    mixed = dict(parts[0])
    for key in ("image", "sem_seg"):
        if key in mixed:
            mixed[key] = mixed[key].clone()
            mixed[key][..., :y, x:] = parts[1][key][..., :y, x:]
            mixed[key][..., y:, :x] = parts[2][key][..., y:, :x]
            mixed[key][..., y:, x:] = parts[3][key][..., y:, x:]
    if "instances" in mixed:
        mixed["instances"] = Instances.cat([part["instances"] for part in parts])
    return mixed


def mixup(sample: Sample, other: Sample) -> Sample:
    """A sample through which another shines, with the objects of both."""
    other = window(other, 0, 0, *sample["image"].shape[1:])
    share = np.random.beta(8.0, 8.0)
    image = share * sample["image"].float() + (1 - share) * other["image"].float()
    instances = Instances.cat([with_bits(sample["instances"]), other["instances"]])
    return {**sample, "image": image.round().to(sample["image"].dtype), "instances": instances}


def copy_paste(sample: Sample, other: Sample) -> Sample:
    """A sample on which half of the objects of another are put."""
    other = window(other, 0, 0, *sample["image"].shape[1:])
    pasted = other["instances"]
    pasted = pasted[torch.as_tensor(np.random.rand(len(pasted)) < 0.5)]
    covered = pasted.gt_masks.tensor.any(0)
    image = torch.where(covered, other["image"], sample["image"])
    below = with_bits(sample["instances"])
    visible = below.gt_masks.tensor & ~covered
    changed = (visible != below.gt_masks.tensor).flatten(1).any(1)
    kept = visible.flatten(1).sum(1) > VISIBLE * below.gt_masks.tensor.flatten(1).sum(1)
    below.gt_masks = BitMasks(visible)
    boxes = below.gt_boxes.tensor.clone()
    boxes[changed] = below.gt_masks[changed].get_bounding_boxes().tensor
    below.gt_boxes = Boxes(boxes)
    return {**sample, "image": image, "instances": Instances.cat([below[kept], pasted])}


def window(sample: Sample, y: int, x: int, height: int, width: int) -> Sample:
    """What is seen of a sample through a window, which may reach beyond it.

    Args:
        sample: ``image`` (C, H, W), and ``sem_seg`` (H, W) or ``instances``.
        y, x: of the window's corner, in pixels of the sample; they may be negative.
        height, width: of the window.

    Returns:
        a new sample: outside the image is gray, and the label map says of no class.
    """

    def cut(values: torch.Tensor, fill: int) -> torch.Tensor:
        rows, columns = values.shape[-2:]
        result = values.new_full((*values.shape[:-2], height, width), fill)
        top, left, bottom, right = (
            max(y, 0),
            max(x, 0),
            min(y + height, rows),
            min(x + width, columns),
        )
        if top < bottom and left < right:
            seen = values[..., top:bottom, left:right]
            result[..., top - y : bottom - y, left - x : right - x] = seen
        return result

    seen = {**sample, "image": cut(sample["image"], GRAY)}
    if "sem_seg" in sample:
        seen["sem_seg"] = cut(sample["sem_seg"], IGNORE_LABEL)
    if "instances" in sample:
        old = with_bits(sample["instances"])
        boxes = Boxes(old.gt_boxes.tensor - old.gt_boxes.tensor.new_tensor([x, y, x, y]))
        boxes.clip((height, width))
        new = Instances((height, width), gt_boxes=boxes, gt_classes=old.gt_classes)
        kept = boxes.nonempty(threshold=1e-5) & (boxes.area() >= VISIBLE * old.gt_boxes.area())
        if old.has("gt_masks"):
            masks = cut(old.gt_masks.tensor, 0)
            new.gt_masks = BitMasks(masks)
            kept &= masks.flatten(1).any(1)
        seen["instances"] = new[kept]
    return seen


def with_bits(instances: Instances) -> Instances:
    """A copy of ground truth with bits in place of polygons."""
    fields = instances.get_fields()
    if isinstance(fields.get("gt_masks"), PolygonMasks):
        bits = BitMasks.from_polygon_masks(fields["gt_masks"], *instances.image_size)
        fields = {**fields, "gt_masks": bits}
    return Instances(instances.image_size, **fields)
