"""Label Studio: a JSON file of tasks, whose places are percent of the image."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from ..images import SUFFIXES
from .findings import Findings, Picture, numbers, pairs
from .json import files_of, read_json

_UPLOAD = r"[0-9a-f]{8}-"  # what an upload puts before the name of a file


def find(found: Findings) -> list[Path]:
    """The JSON files of a folder that are a list of tasks."""
    return files_of("label_studio", found)


def read(files: list[Path], found: Findings) -> None:
    """Read data sets; of several annotations of a task the first that was not cancelled.

    A task without one is not done yet, and is left out.

    Args:
        files: of :func:`find`.
        found: gets what is in them.
    """
    several = left = 0
    for file in files:
        for i, task in enumerate(read_json(file, found) or []):
            where = f"task {task.get('id', i)}" if isinstance(task, dict) else f"task {i}"
            annotations = task.get("annotations") if isinstance(task, dict) else None
            if not isinstance(annotations, list) or not all(
                isinstance(entry, dict) and isinstance(entry.get("result", []), list)
                for entry in annotations
            ):
                found.fault(
                    file,
                    where,
                    "it must have annotations with a list named result: export as JSON, which is "
                    "not JSON-MIN",
                )
                continue
            kept = [
                x["result"] for x in annotations if "result" in x and not x.get("was_cancelled")
            ]
            several += len(kept) > 1
            left += not kept
            image = _image(task, file, where, found) if kept else None
            picture = image and found.picture(found.split_of(image), image, file, where)
            for result in kept[0] if picture else ():
                _read_result(result, picture, file, where, found)
    if several:
        found.notes.append(f"{several} tasks have several annotations: the first is taken")
    if left:
        found.notes.append(f"{left} tasks have no annotation yet: they are left out")


def _image(task: dict[str, Any], file: Path, where: str, found: Findings) -> Path | None:
    """The image of a task: its address may have a path as its query, or a mark before its name."""
    data = task.get("data")
    texts = [x for x in data.values() if isinstance(x, str)] if isinstance(data, dict) else []
    address = next((x for x in texts if x.lower().endswith(SUFFIXES)), None)
    if address is None:
        found.fault(file, where, "data must name an image")
        return None
    parts = urlparse(address)
    path = parse_qs(parts.query).get("d", [unquote(parts.path)])[0]
    name = Path(path).name
    if name not in found.images and re.match(_UPLOAD, name):
        path = f"/{name[9:]}"
    return found.locate(path, file, where)


def _read_result(result: Any, picture: Picture, file: Path, where: str, found: Findings) -> None:
    result = result if isinstance(result, dict) else {}
    kind, value = result.get("type"), result.get("value")
    if kind in ("choices", "labels", "relation", "textarea"):  # of the image, not of a place
        return
    if kind not in ("rectanglelabels", "polygonlabels") or not isinstance(value, dict):
        found.fault(file, where, f"type={kind!r} must be 'rectanglelabels' or 'polygonlabels'")
        return
    labels = value.get(kind)
    if not isinstance(labels, list) or len(labels) != 1:
        found.fault(file, where, f"{kind}={labels!r} must be a list of one class")
        return
    scale = picture.width / 100, picture.height / 100
    if kind == "polygonlabels":
        points = pairs(value.get("points"))
        if points is None:
            found.fault(file, where, "a polygon must have points, pairs of numbers")
        else:
            polygon = [number * scale[i % 2] for i, number in enumerate(points)]
            found.add(picture, labels[0], None, file, where, [polygon])
        return
    place = numbers(value.get(key) for key in ("x", "y", "width", "height"))
    if value.get("rotation"):
        found.fault(file, where, f"rotation={value['rotation']}: oriented boxes are not read")
    elif place is None:
        found.fault(file, where, "a rectangle must have numbers x, y, width, height")
    else:
        box = [number * scale[i % 2] for i, number in enumerate(place)]
        found.add(picture, labels[0], box, file, where)
