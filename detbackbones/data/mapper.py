"""CheckedDatasetMapper: detectron2's DatasetMapper on images that are checked as they are read."""

from typing import Any

import detectron2.data.transforms as T
import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import (
    SizeMismatchError,
    annotations_to_instances,
    transform_keypoint_annotations,
)
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from pycocotools import mask as mask_util

from ..messages import one_of
from .images import ImageError, read_image, read_label_map, shown_channels
from .transforms import QuickAugInput, quick

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
        return shown_channels(read_image(dataset_dict["file_name"], self.channels, self.max_value))

    def __call__(self, dataset_dict: dict) -> dict:
        """Map one dataset dict as detectron2's ``DatasetMapper`` does.

        Args:
            dataset_dict: one image in detectron2's dataset format.

        Returns:
            the model's input, with ``image`` of shape (C, H, W).

        Raises:
            OSError, ValueError: as of :meth:`read`.
        """
        sample = dict(dataset_dict)
        if "annotations" in sample:
            sample["annotations"] = [dict(annotation) for annotation in sample["annotations"]]
        image, labels = self.read(sample)
        inputs = QuickAugInput(
            image, boxes=_boxes(sample) if self.is_train else None, sem_seg=labels
        )
        transforms = self.augmentations(inputs)
        height, width = image.shape[:2]
        sample.update(height=height, width=width)  # boxes are mapped back to it
        sample["image"] = torch.as_tensor(np.ascontiguousarray(inputs.image)).permute(2, 0, 1)
        if sample.pop("sem_seg_file_name", None):
            sample["sem_seg"] = torch.as_tensor(inputs.sem_seg.astype("long"))
        if not self.is_train:
            sample.pop("annotations", None)
        elif "annotations" in sample:
            self._transform_annotations(
                sample, inputs.boxes, quick(transforms), inputs.image.shape[:2]
            )
        return sample

    def _transform_annotations(
        self,
        dataset_dict: dict,
        boxes: np.ndarray,
        transforms: T.TransformList,
        image_shape: tuple[int, int],
    ) -> None:
        """What detectron2 does, with boxes that are transformed, and empty masks left out early."""
        annotations = [x for x in dataset_dict.pop("annotations") if not x.get("iscrowd", 0)]
        height, width = image_shape
        kept = []
        for annotation, box in zip(annotations, boxes.clip(0, (width, height, width, height))):
            annotation.update(bbox=box, bbox_mode=BoxMode.XYXY_ABS)
            if self.use_instance_mask and "segmentation" in annotation:
                mask = _transform_mask(annotation["segmentation"], transforms)
                if isinstance(mask, np.ndarray) and not mask.any():
                    continue
                annotation["segmentation"] = mask
            else:
                annotation.pop("segmentation", None)
            if self.use_keypoint and "keypoints" in annotation:
                annotation["keypoints"] = transform_keypoint_annotations(
                    annotation["keypoints"], transforms, image_shape, self.keypoint_hflip_indices
                )
            else:
                annotation.pop("keypoints", None)
            kept.append(annotation)
        instances = annotations_to_instances(
            kept, image_shape, mask_format=self.instance_mask_format
        )
        if self.use_instance_mask and not kept:  # as other images have
            none = torch.zeros(0, height, width, dtype=torch.bool)
            bits = self.instance_mask_format == "bitmask"
            instances.gt_masks = BitMasks(none) if bits else PolygonMasks([])
        if self.recompute_boxes:
            instances.gt_boxes = instances.gt_masks.get_bounding_boxes()
        full = instances.gt_boxes.nonempty(threshold=1e-5)
        if any(isinstance(x.get("segmentation"), list) for x in kept):
            full &= instances.gt_masks.nonempty()
        dataset_dict["instances"] = instances if full.all() else instances[full]


def _boxes(sample: dict) -> np.ndarray | None:
    """The boxes (n, 4) of the objects that are no crowds, as corners."""
    if "annotations" not in sample:
        return None
    objects = [x for x in sample["annotations"] if not x.get("iscrowd", 0)]
    boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in objects]
    return np.array(boxes, dtype=float).reshape(-1, 4)


def _transform_mask(
    mask: list | dict | np.ndarray, transforms: T.TransformList
) -> list[np.ndarray] | np.ndarray:
    """Polygons, or RLE or bits (H, W) as bits of the new size."""
    if isinstance(mask, list):
        polygons = [np.asarray(polygon, dtype=float).reshape(-1, 2) for polygon in mask]
        return [polygon.reshape(-1) for polygon in transforms.apply_polygons(polygons)]
    bits = mask_util.decode(mask) if isinstance(mask, dict) else mask
    return transforms.apply_segmentation(bits.astype(np.uint8, copy=False)) == 1  # 255 is padding
