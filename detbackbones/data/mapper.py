"""CheckedDatasetMapper: detectron2's DatasetMapper on images that are checked as they are read."""

import copy
from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError

from ..messages import one_of
from .images import ImageError, read_image, read_label_map

# Wrong images, which are read while training.
DATA_ERRORS = (OSError, SizeMismatchError, ImageError)


class CheckedDatasetMapper(DatasetMapper):
    """detectron2's ``DatasetMapper`` that reads images by :func:`read_image`.

    In a LazyConfig, set ``mapper._target_ = CheckedDatasetMapper``.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        image_format: str,
        channels: int = 3,
        max_value: float | None = None,
        **kwargs: Any,
    ):
        """
        Args:
            is_train: whether annotations are wanted.
            image_format: "RGB" or "BGR", the order of 3 channels.
            channels: of the images.
            max_value: the value that becomes 255, of images of more than 8 bits.
            kwargs: of detectron2's ``DatasetMapper``, but for precomputed proposals.

        Raises:
            ValueError: if ``image_format`` is another.
        """
        one_of("image_format", image_format, ("RGB", "BGR"))
        super().__init__(is_train, image_format=image_format, **kwargs)
        self.channels, self.max_value = channels, max_value

    def read(self, dataset_dict: dict) -> tuple[np.ndarray, np.ndarray | None]:
        """Read one image, and its label map if it has one.

        Args:
            dataset_dict: one image in detectron2's dataset format.

        Returns:
            the image (H, W, C), from 0 to 255, and the class of each pixel (H, W).

        Raises:
            OSError: if the image or its label map cannot be read or decoded.
            ImageError: if they cannot be used.
            SizeMismatchError: if they have not the size that the dataset states; a ValueError.
        """
        file = dataset_dict["file_name"]
        image = read_image(file, self.channels, self.max_value)
        height, width = image.shape[:2]
        stated = dataset_dict.get("width", width), dataset_dict.get("height", height)
        if stated != (width, height):
            raise SizeMismatchError(
                f"image '{file}': size={stated[0]}x{stated[1]} (width x height) in the dataset "
                f"must be {width}x{height}, that of the file"
            )
        if self.channels == 3 and self.image_format == "BGR":
            image = image[:, :, ::-1]
        if "sem_seg_file_name" not in dataset_dict:
            return image, None
        labels = read_label_map(dataset_dict["sem_seg_file_name"])
        if labels.shape != (height, width):
            raise SizeMismatchError(
                f"label map '{dataset_dict['sem_seg_file_name']}': shape={labels.shape} must be "
                f"{(height, width)}, the height and width of its image"
            )
        return image, labels

    def picture(self, dataset_dict: dict) -> np.ndarray:
        """An image to look at, RGB (H, W, 3) of 0 to 255: the first three of its channels, or one.

        Args:
            dataset_dict: one image in detectron2's dataset format.
        """
        image = read_image(dataset_dict["file_name"], self.channels, self.max_value)
        shown = image[:, :, :3] if self.channels >= 3 else image[:, :, [0, 0, 0]]
        return np.ascontiguousarray(shown.astype(np.uint8))

    def __call__(self, dataset_dict: dict) -> dict:
        """Map one dataset dict as detectron2's ``DatasetMapper`` does.

        Args:
            dataset_dict: one image in detectron2's dataset format.

        Returns:
            the model's input, with ``image`` of shape (C, H, W).

        Raises:
            OSError, ValueError: as of :meth:`read`.
        """
        sample = copy.deepcopy(dataset_dict)
        image, labels = self.read(sample)
        inputs = T.AugInput(image, sem_seg=labels)
        transforms = self.augmentations(inputs)
        height, width = image.shape[:2]
        sample.update(height=height, width=width)  # boxes are mapped back to it
        sample["image"] = torch.as_tensor(np.ascontiguousarray(inputs.image.transpose(2, 0, 1)))
        if sample.pop("sem_seg_file_name", None):
            sample["sem_seg"] = torch.as_tensor(inputs.sem_seg.astype("long"))
        if not self.is_train:
            sample.pop("annotations", None)
        elif "annotations" in sample:
            self._transform_annotations(sample, transforms, inputs.image.shape[:2])
        return sample
