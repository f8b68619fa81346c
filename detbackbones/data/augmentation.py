"""Augmentations for one's own data, of detectron2's kind."""

from collections.abc import Sequence

import detectron2.data.transforms as T
import numpy as np

from ..messages import fraction
from .semantic import IGNORE_LABEL

GRAY = 128  # of what is padded


def build_augmentations(
    sizes: Sequence[int],
    max_size: int,
    *,
    scale_jitter: Sequence[float] | None = None,
    crop: float = 0.0,
    zoom_out: float = 0.0,
    color: float = 0.0,
    upright: bool = True,
) -> list[T.Augmentation]:
    """Resizing and flipping, and what is asked for besides.

    Args:
        sizes: lengths of the shorter side in pixels, of which each image gets one.
        max_size: of the longer side.
        scale_jitter: least and greatest factor of large-scale jittering (Ghiasi et al., arXiv
            2012.07177): the image, scaled by a number between them, is cropped or padded to a
            square of the largest of ``sizes``, which a factor of 1 would fill.
        crop: probability of a crop as of SSD (Liu et al., arXiv 1512.02325), with objects in it;
            of an image with a label map alone any part of half the width and height at least.
        zoom_out: probability that the image becomes a part of a gray one, up to twice as wide.
        color: brightness, contrast and saturation are multiplied by up to 1 plus or minus this.
        upright: whether the pictures have an up; those without one, as of a microscope or from
            above, are turned by 90, 180 and 270 degrees, too.

    Raises:
        ValueError: if ``crop``, ``zoom_out`` or ``color`` is no number from 0 to 1.
    """
    for name, value in (("crop", crop), ("zoom_out", zoom_out), ("color", color)):
        fraction(name, value)
    augmentations: list[T.Augmentation] = []
    if color:
        extent = (1 - color, 1 + color)
        augmentations += [T.RandomBrightness(*extent), T.RandomContrast(*extent)]
        augmentations.append(RandomSaturation(*extent))
    if zoom_out:
        augmentations.append(T.RandomApply(RandomZoomOut(), zoom_out))
    if crop:
        augmentations.append(T.RandomApply(RandomObjectCrop(), crop))
    if scale_jitter:
        side = max(sizes)
        augmentations.append(T.ResizeScale(*scale_jitter, side, side))
        augmentations.append(T.FixedSizeCrop((side, side), pad_value=GRAY))
    else:
        augmentations.append(T.ResizeShortestEdge(list(sizes), max_size, "choice"))
    augmentations.append(T.RandomFlip())
    if not upright:
        augmentations.append(RandomTurn())
    return augmentations


class RandomSaturation(T.RandomSaturation):
    """detectron2's, which leaves images as they are that have not three channels."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """For an image (H, W, C)."""
        return super().get_transform(image) if image.shape[-1] == 3 else T.NoOpTransform()


class RandomObjectCrop(T.MinIoURandomCrop):
    """detectron2's ``MinIoURandomCrop``, for images without boxes, too."""

    def get_transform(self, image: np.ndarray, boxes: np.ndarray | None) -> T.Transform:
        """For an image (H, W, C) and its boxes (n, 4)."""
        if boxes is None:
            return T.RandomCrop("relative_range", (0.5, 0.5)).get_transform(image)
        return super().get_transform(image, boxes)


class RandomZoomOut(T.Augmentation):
    """Puts the image at a random place in a gray one."""

    def __init__(self, most: float = 2.0):
        """
        Args:
            most: how many times as wide and high that is at most.
        """
        super().__init__()
        self.most = most

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """For an image (H, W, C)."""
        height, width = image.shape[:2]
        factor = np.random.uniform(1, self.most) - 1
        right, below = int(width * factor), int(height * factor)
        x, y = np.random.randint(right + 1), np.random.randint(below + 1)
        return T.PadTransform(
            x, y, right - x, below - y, width, height, GRAY, seg_pad_value=IGNORE_LABEL
        )


class RandomTurn(T.Augmentation):
    """Turns the image by 0, 90, 180 or 270 degrees."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """For an image (H, W, C)."""
        return Turn(np.random.randint(4), *image.shape[:2])


class Turn(T.Transform):
    """A turn by right angles, which loses no pixel and keeps boxes tight."""

    def __init__(self, quarters: int, height: int, width: int):
        """
        Args:
            quarters: of a turn, counterclockwise.
            height, width: of the image before.
        """
        super().__init__()
        self.quarters, self.height, self.width = quarters, height, width

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """Turn an image (H, W, C) or (H, W)."""
        return np.ascontiguousarray(np.rot90(img, self.quarters))

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """Turn points (n, 2) of x and y."""
        width, height = self.width, self.height
        for _ in range(self.quarters):
            coords = np.stack([coords[:, 1], width - coords[:, 0]], 1)
            width, height = height, width
        return coords

    def inverse(self) -> "Turn":
        """The turn back."""
        odd = self.quarters % 2
        size = (self.width, self.height) if odd else (self.height, self.width)
        return Turn(-self.quarters % 4, *size)
