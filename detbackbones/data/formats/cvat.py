"""CVAT for images 1.1: an XML file of all images."""

from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np
from pycocotools import mask as mask_util

from .findings import SPLITS, Findings, Picture, numbers
from .xml import files_of, read_xml


def find(found: Findings) -> list[Path]:
    """The XML files of a folder that have the root ``annotations``."""
    return files_of("annotations", found)


def read(files: list[Path], found: Findings) -> None:
    """Read data sets.

    Args:
        files: of :func:`find`.
        found: gets what is in them.
    """
    for file in files:
        document = read_xml(file, found)
        if document is None:
            continue
        root, lines = document
        for track in root.iter("track"):
            found.fault(file, lines[track], "a track of a video must be an export 'for images'")
        labels = [(x.text or "").strip() for x in root.iterfind(".//label/name")]
        found.classes += [label for label in labels if label not in found.classes]
        for element in root.iterfind("image"):
            line = lines[element]
            image = found.locate(element.get("name", ""), file, line)
            if image is None:
                continue
            subset = element.get("subset", "").lower()
            if subset not in (*SPLITS, "", "default"):
                found.fault(file, line, f"subset={subset!r} must be train, val or test")
                continue
            split = SPLITS.get(subset) or found.split_of(image)
            size = numbers(element.get(side) for side in ("width", "height"))
            picture = found.picture(split, image, file, line, size)
            for shape in element if picture else ():
                _read_shape(shape, labels, picture, file, lines[shape], found)


def _read_shape(
    shape: Element, labels: list[str], picture: Picture, file: Path, line: int, found: Findings
) -> None:
    kind, label = shape.tag, shape.get("label", "").strip()
    if kind == "tag":  # of the image
        return
    if labels and label not in labels:
        found.fault(file, line, f"label {label!r} must be one of the task's, {labels}")
    elif kind == "box":
        corners = numbers(shape.get(key) for key in ("xtl", "ytl", "xbr", "ybr"))
        if numbers([shape.get("rotation", 0)]) != [0]:
            found.fault(file, line, "rotation: oriented boxes are not read")
        elif corners is None:
            found.fault(file, line, "a box must have numbers xtl, ytl, xbr, ybr")
        else:
            left, top, right, bottom = corners
            found.add(picture, label, [left, top, right - left, bottom - top], file, line)
    elif kind == "polygon":
        points = numbers(shape.get("points", "").replace(";", ",").split(","))
        if points is None:
            found.fault(file, line, "a polygon must have points, 'x,y;x,y;...'")
        else:
            found.add(picture, label, None, file, line, [points])
    elif kind == "mask":
        _read_mask(shape, picture, file, line, found)
    else:
        found.fault(file, line, f"{kind} must be a box, a polygon or a mask")


def _read_mask(shape: Element, picture: Picture, file: Path, line: int, found: Findings) -> None:
    """Runs of pixels row by row in a rectangle, outside and inside in turn."""
    place = numbers(shape.get(key) for key in ("left", "top", "width", "height"))
    runs = numbers(shape.get("rle", "").split(","))
    if place is None or runs is None or min(runs) < 0:
        found.fault(file, line, "a mask must have rle and numbers left, top, width, height")
        return
    left, top, width, height = map(int, place)
    inside = min(left, top, width, height) >= 0 and left + width <= picture.width
    if not inside or top + height > picture.height or sum(runs) != width * height:
        found.fault(file, line, "a mask must lie in its image, with runs for all of its pixels")
        return
    bits = np.repeat(np.arange(len(runs)) % 2, np.array(runs, int)).astype(np.uint8)
    whole = np.zeros((picture.height, picture.width), np.uint8, order="F")
    whole[top : top + height, left : left + width] = bits.reshape(height, width)
    rle = mask_util.encode(whole)
    box = mask_util.toBbox(rle).tolist()
    rle["counts"] = rle["counts"].decode()
    found.add(picture, shape.get("label", ""), box, file, line, rle)
