"""Files of predictions: pictures, COCO JSON, CSV, YOLO text, label maps."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

from ..messages import first_line
from ..weights import replacing
from .extras import import_supervision
from .painter import Painter

if TYPE_CHECKING:
    from supervision import Detections


@dataclass(frozen=True)
class Item:
    """An image of which something is written.

    Attributes:
        name: of a file for it alone, without a suffix.
        file_name: in a table.
        pixels: RGB (H, W, C) of 0 to 255.
    """

    name: str
    file_name: str
    pixels: np.ndarray


class Result(Protocol):
    """What takes the objects in one image after the other, and is closed at the end."""

    def add(self, item: Item, found: "Detections") -> None: ...

    def close(self) -> None: ...


class Pictures:
    """A JPEG of each image with its objects."""

    def __init__(self, folder: Path):
        self._folder, self._painter = folder, Painter()

    def add(self, item: Item, found: "Detections") -> None:
        """Write the picture of an image."""
        picture = self._painter(item.pixels, found)
        Image.fromarray(picture).save(self._folder / f"{item.name}.jpg", quality=90)

    def close(self) -> None:
        """Nothing is left to do."""


class CocoFile:
    """A JSON file in COCO's format for instances, whose annotations have a ``score``."""

    def __init__(self, file: Path, classes: Sequence[str], categories: Sequence[int]):
        self._file, self._ids = file, categories
        named = [{"id": key, "name": name} for key, name in zip(categories, classes)]
        self._content: dict[str, list] = {"images": [], "annotations": [], "categories": named}

    def add(self, item: Item, found: "Detections") -> None:
        """Note the objects of an image; ids count from 1."""
        height, width = item.pixels.shape[:2]
        images, annotations = self._content["images"], self._content["annotations"]
        key = len(images) + 1
        images.append({"id": key, "file_name": item.file_name, "height": height, "width": width})
        for i, (x0, y0, x1, y1) in enumerate(found.xyxy.tolist()):
            annotation: dict[str, Any] = {
                "id": len(annotations) + 1,
                "image_id": key,
                "category_id": self._ids[int(found.class_id[i])],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
                "score": float(found.confidence[i]),
            }
            if found.mask is not None:
                bits = np.asfortranarray(np.asarray(found.mask[i]).astype(np.uint8))
                rle = mask_util.encode(bits)
                annotation["area"] = int(mask_util.area(rle))
                annotation["segmentation"] = {**rle, "counts": rle["counts"].decode()}
            annotations.append(annotation)

    def close(self) -> None:
        """Write the file."""
        with replacing(str(self._file)) as temporary:
            Path(temporary).write_text(json.dumps(self._content))


class CsvFile:
    """A table of boxes as supervision has it, a row each: corners in pixels, class, score, file.

    ``class_id`` counts the classes from 0.
    """

    def __init__(self, file: Path):
        self._sink = import_supervision().CSVSink(str(file))
        self._sink.open()

    def add(self, item: Item, found: "Detections") -> None:
        """Write the rows of an image."""
        self._sink.append(found, {"file_name": item.file_name})

    def close(self) -> None:
        """Close the file."""
        self._sink.close()


class YoloFiles:
    """A text file for each image, a line an object: class, place, score.

    The place is the box as centre and size, or the polygon around the largest part of a mask (its
    box, where the mask is of a pixel or a line); as fractions of the image's width and height.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def add(self, item: Item, found: "Detections") -> None:
        """Write the file of an image."""
        mask_to_polygons = import_supervision().mask_to_polygons
        height, width = item.pixels.shape[:2]
        lines = []
        for i, (x0, y0, x1, y1) in enumerate(found.xyxy):
            place = np.array([[(x0 + x1) / 2, (y0 + y1) / 2], [x1 - x0, y1 - y0]])
            if found.mask is not None:
                corners = np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]])
                polygons = mask_to_polygons(np.asarray(found.mask[i]).astype(bool))
                place = max(polygons, key=cv2.contourArea, default=corners)
            numbers = (place / [width, height]).ravel()
            score = found.confidence[i]
            lines.append(
                f"{int(found.class_id[i])} " + " ".join(f"{x:.6g}" for x in (*numbers, score))
            )
        (self._folder / f"{item.name}.txt").write_text("".join(f"{line}\n" for line in lines))

    def close(self) -> None:
        """Nothing is left to do."""


class Maps:
    """An 8-bit grayscale PNG of each image, the class of each pixel, as for a training."""

    def __init__(self, folder: Path):
        self._folder = folder

    def add(self, item: Item, found: "Detections") -> None:
        """Write the map of an image."""
        labels = np.zeros(item.pixels.shape[:2], np.uint8)
        for mask, label in zip(found.mask, found.class_id):
            labels[mask] = label
        Image.fromarray(labels).save(self._folder / f"{item.name}.png")

    def close(self) -> None:
        """Nothing is left to do."""


class Film:
    """A video of frames with what is found in them."""

    def __init__(self, file: Path, source: Path, every: int):
        """
        Args:
            file: to write, ``.mp4``.
            source: the video, whose size and rate it has.
            every: each so many-th of its frames is written.

        Raises:
            OSError: if the video cannot be read, or the file not be written.
        """
        supervision = import_supervision()
        try:
            info = supervision.VideoInfo.from_video_path(str(source))
            info.fps /= every
            self._sink = supervision.VideoSink(str(file), info).__enter__()
        except Exception as error:  # it has no errors of its own
            raise OSError(
                f"video '{source}' cannot be read or written: {first_line(error)}"
            ) from error
        self._painter = Painter()

    def add(self, item: Item, found: "Detections") -> None:
        """Write a frame."""
        self._sink.write_frame(np.ascontiguousarray(self._painter(item.pixels, found)[:, :, ::-1]))

    def close(self) -> None:
        """Finish the file."""
        self._sink.__exit__(None, None, None)
