"""Images as transformers' models take them: normalized, padded, with a mask of what is an image."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.modeling import Backbone
from detectron2.structures import BitMasks, ImageList, Instances, PolygonMasks
from torch import nn

from ..backbones.feature_backbone import FeatureBackbone
from ..data.images import ImageError


class NormalizesImages(nn.Module):
    """What all meta-architectures here do with images before their model sees them."""

    def __init__(
        self,
        backbone: Backbone,
        pixel_mean: Sequence[float] | None,
        pixel_std: Sequence[float] | None,
    ):
        """
        Args:
            backbone: images are padded to the sizes that it takes.
            pixel_mean, pixel_std: of the images' channels, 0 to 255; None is for those that the
                backbone's weights were trained with.

        Raises:
            ValueError: if they are None and the backbone does not say them.
        """
        super().__init__()
        self.backbone = backbone
        self.size_divisibility = 0  # what a model needs of a backbone that takes all sizes
        for key, value in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            value = _backbones_own(backbone, key) if value is None else value
            pixels = torch.tensor(list(value), dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(key, pixels, persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the images go."""
        return self.pixel_mean.device

    def preprocess_image(self, batched_inputs: list[dict[str, Any]]) -> ImageList:
        """Images on the model's device, normalized, padded to the largest of them."""
        images = [x["image"].to(self.device) for x in batched_inputs]
        images = [(image - self.pixel_mean) / self.pixel_std for image in images]
        divisor = self.backbone.size_divisibility or self.size_divisibility
        constraints = self.backbone.padding_constraints
        return ImageList.from_tensors(images, divisor, padding_constraints=constraints)

    def groups_of_one_size(
        self, batched_inputs: list[dict[str, Any]]
    ) -> list[tuple[list[int], ImageList]]:
        """The images that have one size when padded, together.

        The encoders look at all of an image, its padding too, and what is found in it would depend
        on the sizes of those beside it.

        Returns:
            for each size the numbers of the images, and the images.
        """
        singles = [self.preprocess_image([x]) for x in batched_inputs]
        groups = defaultdict(list)
        for i, image in enumerate(singles):
            groups[image.tensor.shape].append(i)
        return [
            (
                indices,
                ImageList(
                    torch.cat([singles[i].tensor for i in indices]),
                    [singles[i].image_sizes[0] for i in indices],
                ),
            )
            for indices in groups.values()
        ]


def images_and_mask(images: ImageList) -> dict[str, torch.Tensor]:
    """Images as transformers takes them: ``pixel_values`` and ``pixel_mask``."""
    device, (height, width) = images.tensor.device, images.tensor.shape[-2:]
    rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
    masks = [(rows < h)[:, None] & (columns < w) for h, w in images.image_sizes]
    return {"pixel_values": images.tensor, "pixel_mask": torch.stack(masks).long()}


def check_classes(classes: torch.Tensor, count: int) -> None:
    """Refuse true classes that are none, where a model would learn them as no object.

    Raises:
        ImageError: if one is below 0, or ``count`` or more.
    """
    if len(classes) and not 0 <= classes.min() <= classes.max() < count:
        wrong = classes[(classes < 0) | (classes >= count)][0]
        raise ImageError(f"class {wrong} must be from 0 to {count - 1}, for num_classes={count}")


def true_masks(instances: Instances, size: tuple[int, int]) -> torch.Tensor:
    """The true masks of an image, bits (n, height, width).

    Args:
        instances: with ``gt_masks``, polygons or bits, unless there are none.
        size: (height, width) that the image is padded to.

    Raises:
        ImageError: if there are boxes without masks.
    """
    height, width = instances.image_size
    padded = torch.zeros(
        len(instances), *size, dtype=torch.bool, device=instances.gt_classes.device
    )
    if not len(instances):
        return padded
    if not instances.has("gt_masks"):
        raise ImageError("masks cannot be learned: an image has boxes alone")
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, height, width)
    padded[:, :height, :width] = masks.tensor
    return padded


def upsampled(masks: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Maps (n, h, w) of a padded image, of the size of the padded images (N, C, H, W)."""
    return F.interpolate(masks[None], images.shape[-2:], mode="bilinear", align_corners=False)[0]


def _backbones_own(backbone: Backbone, key: str) -> Sequence[float]:
    """The mean or deviation of the pixels that a backbone's source model was trained on."""
    sources = [m for m in backbone.modules() if isinstance(m, FeatureBackbone)]
    value = getattr(sources[0], key) if sources else None
    if value is None:
        raise ValueError(f"{key}=None, and the backbone does not say what it was trained with")
    return value
