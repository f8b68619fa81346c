"""YOLO: data.yaml, and beside each image a text file of boxes or polygons, as fractions."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from ...messages import first_line
from .findings import SPLITS, Findings, are_fractions, numbers, walk, without_copies


def find(found: Findings) -> list[Path]:
    """The YAML files at the top of a folder that speak of names."""
    files = [x for x in found.files if x.suffix in (".yaml", ".yml") and x.parent == found.folder]
    return [file for file in files if b"names" in file.read_bytes()]


def read(files: list[Path], found: Findings) -> None:
    """Read data sets.

    Args:
        files: of :func:`find`.
        found: gets what is in them.
    """
    for file in files[1:]:
        found.fault(file, None, f"must be the only one, and there is '{files[0]}'")
    file = files[0]
    try:
        content = yaml.safe_load(file.read_bytes())
    except (yaml.YAMLError, ValueError) as error:
        found.fault(file, None, f"it must be YAML: {first_line(error)}")
        return
    if not isinstance(content, dict) or not _read_names(file, content, found):
        return
    numbers_a_line: set[int] = set()
    for key in content:
        if key in SPLITS and content[key]:
            for image in _images(file, content, key, found):
                _read_labels(image, SPLITS[key], found, numbers_a_line)
    if numbers_a_line == {9}:
        found.fault(
            file,
            None,
            "each line has a class and 8 coordinates, as of oriented boxes (OBB), which are not "
            "read",
        )


def _read_names(file: Path, content: dict[str, Any], found: Findings) -> bool:
    if "kpt_shape" in content:
        found.fault(file, None, "kpt_shape: keypoints are not read, only boxes and polygons")
        return False
    names = content.get("names")
    if isinstance(names, dict):
        names = [names.get(i) for i in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(n, str | int) for n in names) or not names:
        found.fault(file, None, "names must be a list of names, or a mapping of 0, 1, ... to names")
        return False
    found.classes = [str(name).strip() for name in names]
    if len(set(found.classes)) < len(names):
        found.fault(file, None, "names must differ")
        return False
    count = content.get("nc", len(names))
    if count != len(names):
        shown = count if isinstance(count, int | str) else "..."
        found.fault(file, None, f"nc={shown} must be {len(names)}, the number of names")
    return True


def _images(file: Path, content: dict[str, Any], key: str, found: Findings) -> Iterator[Path]:
    """The images of a split: of folders, patterns, or lists of them in a text file."""
    given = content[key] if isinstance(content[key], list) else [content[key]]
    base = content.get("path") or "."
    if not all(isinstance(word, str) for word in (*given, base)):
        found.fault(file, None, f"{key} and path must be text")
        return
    for word in given:
        places = [file.parent / base / word, file.parent / word]
        places.append(file.parent / word.removeprefix("../"))  # as Roboflow writes it
        place = next((p for p in places if p.exists() or glob.glob(str(p))), None)
        if place is None:
            found.fault(file, None, f"{key}={word!r} must be a folder of images, and is not there")
        elif place.suffix == ".txt":
            lines = place.read_text(errors="replace").splitlines()
            for number, line in enumerate(lines, 1):
                if line.strip() and (image := found.locate(line, place, number)):
                    yield image
        else:
            paths = walk(place) if place.is_dir() else sorted(map(Path, glob.glob(str(place))))
            images = without_copies(paths)
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


def _read_labels(image: Path, split: str, found: Findings, numbers_a_line: set[int]) -> None:
    if image in found.splits.get(split, {}):  # a split may name an image twice
        return
    picture = found.picture(split, image)
    file = _labels_of(image)
    if picture is None:
        return
    if not file.is_file():
        found.unlabeled.append(image)
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
        numbers_a_line.add(len(words))
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
