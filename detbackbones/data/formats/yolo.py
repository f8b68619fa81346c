"""YOLO: data.yaml, and beside each image a text file of boxes or polygons, as fractions."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ...messages import first_line
from ..images import SUFFIXES
from .findings import Findings, are_fractions, numbers

_NAMES = {"train": "train", "val": "val", "valid": "val", "test": "test"}


def find(folder: Path) -> list[Path]:
    """The YAML files of a folder that name classes and images."""
    files = [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("*.yml"))]
    return [file for file in files if "names" in _content(file)]


def read(files: list[Path], found: Findings) -> None:
    """Read data sets.

    Args:
        files: of :func:`find`.
        found: gets what is in them.
    """
    for file in files[1:]:
        found.fault(file, None, f"must be the only one, and there is '{files[0]}'")
    file = files[0]
    content = _content(file)
    if "kpt_shape" in content:
        found.fault(file, None, "kpt_shape: keypoints are not read, only boxes and polygons")
        return
    names = content["names"]
    if isinstance(names, dict):
        names = [names.get(i) for i in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(n, str | int) for n in names) or not names:
        found.fault(file, None, "names must be a list of names, or a mapping of 0, 1, ... to names")
        return
    if "nc" in content and content["nc"] != len(names):
        found.fault(file, None, f"nc={content['nc']!r} must be {len(names)}, the number of names")
    found.classes = [str(name) for name in names]
    lines: list[int] = []
    for key, split in _NAMES.items():
        if content.get(key):
            for image in _images(file, content, key, found):
                _read_labels(image, split, found, lines)
    if lines and set(lines) == {9}:
        found.fault(
            file,
            None,
            "each line has a class and 8 coordinates, as of oriented boxes (OBB), which are not "
            "read",
        )


def _content(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _images(file: Path, content: dict[str, Any], key: str, found: Findings) -> Iterator[Path]:
    """The images of a split: of folders, patterns, or lists of them in a text file."""
    given = content[key] if isinstance(content[key], list) else [content[key]]
    base = Path(str(content.get("path") or "."))
    for word in map(str, given):
        places = [file.parent / base / word, file.parent / word]
        places.append(file.parent / word.removeprefix("../"))  # as Roboflow writes it
        place = next((p for p in places if p.exists() or glob.glob(str(p))), None)
        if place is None:
            found.fault(file, None, f"{key}={word!r} must be a folder of images, and is not there")
            continue
        if place.suffix == ".txt":
            for number, line in enumerate(place.read_text().splitlines(), 1):
                if line.strip() and (image := found.locate(line.strip(), place, number)):
                    yield image
            continue
        paths = place.rglob("*") if place.is_dir() else map(Path, glob.glob(str(place)))
        images = sorted(path for path in paths if path.suffix.lower() in SUFFIXES)
        if not images:
            found.fault(file, None, f"{key}={word!r} must hold images")
        yield from (Path(os.path.normpath(image)) for image in images)


def _labels_of(image: Path) -> Path:
    """Where the boxes of an image are: the last folder ``images`` of its path is ``labels``."""
    parts = [*image.with_suffix(".txt").parts]
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts)


def _read_labels(image: Path, split: str, found: Findings, lines: list[int]) -> None:
    picture = found.picture(split, image)
    file = _labels_of(image)
    if picture is None or not file.is_file():
        return
    size = picture.width, picture.height
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        found.fault(file, None, f"must be text: {first_line(error)}")
        return
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words:
            continue
        values = numbers(words)
        lines.append(len(words))
        if values is None:
            found.fault(file, number, f"{line.strip()!r} must be numbers")
        elif len(values) != 5 and (len(values) < 7 or len(values) % 2 == 0):
            found.fault(
                file,
                number,
                f"{len(values)} numbers must be 5, a class and a box, or a class and a polygon of "
                "three points or more",
            )
        elif values[0] != int(values[0]) or not 0 <= values[0] < len(found.classes):
            found.fault(
                file,
                number,
                f"class {words[0]} must be a whole number from 0 to {len(found.classes) - 1}",
            )
        elif not are_fractions(values[1:]):
            found.fault(file, number, "coordinates must be fractions of the image, from 0 to 1")
        else:
            label = found.classes[int(values[0])]
            points = [value * size[i % 2] for i, value in enumerate(values[1:])]
            if len(points) == 4:
                x, y, width, height = points
                box = [x - width / 2, y - height / 2, width, height]
                found.add(picture, label, box, file, number)
            else:
                found.add(picture, label, None, file, number, [points])
