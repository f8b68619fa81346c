"""detectron2's resizing and flipping of images of 8 bits and of masks, in less time.

Of a resized image a few pixels are one more or less than PIL's, which detectron2 has; masks and
label maps are equal to the bit.
"""

from collections.abc import Callable

import cv2
import detectron2.data.transforms as T
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .semantic import IGNORE_LABEL


def resizing(augmentations: T.AugmentationList) -> list[T.ResizeShortestEdge | T.Resize]:
    """The augmentations of a mapper for tests, which must resize alone.

    Raises:
        ValueError: if one does not.
    """
    for augmentation in augmentations.augs:
        if type(augmentation) not in (T.ResizeShortestEdge, T.Resize):
            raise ValueError(
                "dataloader.test.mapper.augmentations must be ResizeShortestEdge or Resize, and "
                f"one is {type(augmentation).__name__}"
            )
    return augmentations.augs


def quick(transform: T.Transform) -> T.Transform:
    """The same transform, by a quicker program where there is one.

    Args:
        transform: any, or a list of them.
    """
    if isinstance(transform, T.TransformList):
        return T.TransformList([quick(one) for one in transform.transforms])
    if type(transform) is T.ResizeTransform and transform.interp == Image.BILINEAR:
        return QuickResize(transform.h, transform.w, transform.new_h, transform.new_w)
    if type(transform) is T.HFlipTransform:
        return QuickHFlip(transform.width)
    if type(transform) is T.VFlipTransform:
        return QuickVFlip(transform.height)
    return transform


class QuickAugInput(T.AugInput):
    """detectron2's ``AugInput`` with :func:`quick` transforms, of which boxes stay in the image."""

    def transform(self, tfm: T.Transform) -> None:
        """Transform the image, the boxes and the label map.

        Args:
            tfm: any transform.
        """
        tfm = quick(tfm)
        label_map, self.sem_seg = self.sem_seg, None
        super().transform(tfm)
        if self.boxes is not None:  # or what is cropped off would be back where an image is padded
            height, width = self.image.shape[:2]
            self.boxes = self.boxes.clip(0, (width, height, width, height))
        if label_map is not None:
            self.sem_seg = _transform_label_map(label_map, tfm)


def _transform_label_map(label_map: np.ndarray, transform: T.Transform) -> np.ndarray:
    """What comes from outside of the picture is in no class, and not in the first."""
    if isinstance(transform, T.RotationTransform | T.ExtentTransform):  # which fill with 0
        return IGNORE_LABEL - transform.apply_segmentation(IGNORE_LABEL - label_map)
    return transform.apply_segmentation(label_map)


class QuickResize(T.ResizeTransform):
    """Resizes images as torchvision does, with antialiasing, and masks by OpenCV."""

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """Resize an image (H, W, C) or (H, W).

        Args:
            img: of 8 bits, or another, which detectron2 resizes.
            interp: of PIL's numbers; bilinear if not given.
        """
        size = (self.new_h, self.new_w)
        if img.dtype == np.uint8 and img.ndim == 2 and interp == Image.NEAREST:
            return _resize_mask(img, *size)
        if img.dtype != np.uint8 or img.ndim != 3 or interp not in (None, Image.BILINEAR):
            return super().apply_image(img, interp)
        # in channels-last strides, of which torch's kernel makes the most
        pixels = torch.from_numpy(np.ascontiguousarray(img))[None].permute(0, 3, 1, 2)
        resized = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def _resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """The nearest pixels of a mask. Those of pycocotools lie in memory column by column."""
    by_column = mask.flags.f_contiguous
    if by_column and mask.size < height * width:  # to transpose the smaller one
        mask, by_column = cv2.transpose(mask.T), False
    if by_column:
        return cv2.transpose(cv2.resize(mask.T, (height, width), interpolation=_NEAREST))
    return cv2.resize(np.ascontiguousarray(mask), (width, height), interpolation=_NEAREST)


_NEAREST = cv2.INTER_NEAREST_EXACT  # as PIL has it


def _flip(image: np.ndarray, code: int, slowly: Callable) -> np.ndarray:
    if image.dtype != np.uint8 or not image.flags.c_contiguous or 0 in image.shape:
        return slowly(image)
    return cv2.flip(image, code).reshape(image.shape)


class QuickHFlip(T.HFlipTransform):
    """Flips from left to right."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Flip an image (H, W, C) or (H, W)."""
        return _flip(img, 1, super().apply_image)


class QuickVFlip(T.VFlipTransform):
    """Flips from top to bottom."""

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Flip an image (H, W, C) or (H, W)."""
        return _flip(img, 0, super().apply_image)
