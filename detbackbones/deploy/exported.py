"""Exported: what was exported, run on the CPU by the program of its format."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling.postprocessing import detector_postprocess, sem_seg_postprocess
from detectron2.structures import Boxes, Instances
from torchvision.transforms.v2.functional import resize

from ..messages import one_of
from .formats import FORMATS

ABOUT = "model.json"


def nearest_size(size: Sequence[int], multiple: int) -> tuple[int, int]:
    """The (height, width) nearest to another whose sides are multiples of a number."""
    height, width = (max(round(n / multiple), 1) * multiple for n in size)
    return height, width


def resized(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """An image (C, H, W) of another size; the same if it has that already."""
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return resize(image, [*size], antialias=True)


class Exported:
    """An exported detector, segmenter or backbone.

    Attributes:
        about: what ``model.json`` says of it.
    """

    def __init__(self, folder: str | Path):
        """
        Args:
            folder: that it was exported to.

        Raises:
            FileNotFoundError: if nothing was, or the file is gone.
            ImportError: if the program of the format is not installed.
            ValueError: if its ``model.json`` is damaged.
        """
        file = Path(folder, ABOUT)
        if not file.is_file():
            raise FileNotFoundError(f"folder={str(folder)!r} must hold {ABOUT}, and there is none")
        try:
            self.about: dict[str, Any] = json.loads(file.read_text())
            form, name = self.about["format"], self.about["file"]
            self._shape: list[str | int] = self.about["input"]["shape"]
            self.about["outputs"].keys(), self.about["resize"].get("multiple")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is damaged: {error!r}") from error
        one_of("format", form, FORMATS)
        path = Path(folder, name)
        if not path.is_file():
            raise FileNotFoundError(f"{file} names {name!r}, which is not beside it")
        self._run = FORMATS[form].open(path)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Run it.

        Args:
            images: (N, C, H, W) of 0 to 255, of a backbone normalized, of a size that it takes.

        Returns:
            its outputs by their names.

        Raises:
            ValueError: if they have another shape.
        """
        wrong = len(images.shape) != 4 or any(
            isinstance(wanted, int) and wanted != length
            for wanted, length in zip(self._shape, images.shape)
        )
        if wrong:
            shape = ", ".join(map(str, self._shape))
            raise ValueError(f"images of shape {tuple(images.shape)} must be ({shape})")
        found = self._run(np.ascontiguousarray(images, dtype=np.float32))
        return dict(zip(self.about["outputs"], found, strict=True))

    def fit(self, image: torch.Tensor) -> torch.Tensor:
        """An image (C, H, W) in a size that it takes, stretched where it must be."""
        rule = self.about["resize"]
        if "height" in rule:
            return resized(image, (rule["height"], rule["width"]))
        return resized(image, nearest_size(image.shape[-2:], rule.get("multiple", 1)))

    def detect(self, batched_inputs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """What detectron2's models give for their inputs, for its evaluators.

        Args:
            batched_inputs: for each image a dict with ``image`` (C, H, W), and ``height`` and
                ``width`` of what is given.
        """
        return [self._detect(x) for x in batched_inputs]

    def _detect(self, x: dict[str, Any]) -> dict[str, Any]:
        image = self.fit(x["image"])
        outputs = self(image[None].numpy())
        found = {key: torch.from_numpy(np.array(value)) for key, value in outputs.items()}
        size = tuple(image.shape[-2:])
        height, width = x.get("height", size[0]), x.get("width", size[1])
        if "sem_seg" in found:
            return {"sem_seg": sem_seg_postprocess(found["sem_seg"][0], size, height, width)}
        if found["boxes"].dim() == 3:  # of a batch
            found = {key: value[0] for key, value in found.items()}
        boxes = Boxes(found["boxes"])
        fields = {"scores": found["scores"], "pred_classes": found["classes"].long()}
        if self.about["outputs"].get("masks", ())[1:] == ["height", "width"]:
            boxes.scale(width / size[1], height / size[0])
            masks = resize(found["masks"].float(), [height, width], antialias=False) > 0.5
            whole = Instances((height, width), pred_boxes=boxes, pred_masks=masks, **fields)
            return {"instances": whole}
        if "masks" in found:  # of the boxes
            fields["pred_masks"] = found["masks"][:, None]
        instances = Instances(size, pred_boxes=boxes, **fields)
        return {"instances": detector_postprocess(instances, height, width)}
