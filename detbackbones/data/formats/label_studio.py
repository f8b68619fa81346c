"""Label Studio: a JSON file of tasks, whose places are percent of the image."""

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from .findings import Findings, Picture, numbers
from .json import kind_of, read_json


def find(folder: Path) -> list[Path]:
    """The JSON files of a folder that are a list."""
    return [file for file in sorted(folder.rglob("*.json")) if kind_of(file) == "label_studio"]


def read(files: list[Path], found: Findings) -> None:
    """Read data sets; of several annotations of a task the first that was not cancelled.

    Args:
        files: of :func:`find`.
        found: gets what is in them.
    """
    several = 0
    for file in files:
        tasks = read_json(file, found)
        for i, task in enumerate(tasks or []):
            where = f"task {task.get('id', i)}" if isinstance(task, dict) else f"task {i}"
            if not isinstance(task, dict) or "annotations" not in task:
                found.fault(
                    file, where, "it must have annotations: export as JSON, which is not JSON-MIN"
                )
                continue
            image = _image(task, file, where, found)
            picture = image and found.picture(found.split_of(image), image, file, where)
            if not picture:
                continue
            kept = [x for x in task["annotations"] if not x.get("was_cancelled")]
            several += len(kept) > 1
            for result in kept[0]["result"] if kept else []:
                _read_result(result, picture, file, where, found)
    if several:
        found.notes.append(f"{several} tasks have several annotations: the first is taken")


def _image(task: dict[str, Any], file: Path, where: str, found: Findings) -> Path | None:
    """The image of a task, whose address may have the path in a query or a prefix to its name."""
    data = task.get("data")
    texts = [x for x in data.values() if isinstance(x, str)] if isinstance(data, dict) else []
    if not texts:
        found.fault(file, where, "data must name an image")
        return None
    address = urlparse(data.get("image") or texts[0])
    path = parse_qs(address.query).get("d", [unquote(address.path)])[0]
    name = Path(path).name
    if name not in found.images and "-" in name:
        name = name.partition("-")[2]  # what an upload puts before it
    return found.locate(name if name in found.images else path.lstrip("/"), file, where)


def _read_result(
    result: dict[str, Any], picture: Picture, file: Path, where: str, found: Findings
) -> None:
    kind, value = result.get("type"), result.get("value") or {}
    if kind in ("choices", "labels", "relation", "textarea"):  # of the image, not of a place
        return
    labels = value.get(kind) or [None]
    scale = picture.width / 100, picture.height / 100
    if kind == "rectanglelabels":
        place = numbers(value.get(key) for key in ("x", "y", "width", "height"))
        if value.get("rotation"):
            found.fault(file, where, f"rotation={value['rotation']}: oriented boxes are not read")
        elif place is None:
            found.fault(file, where, "a rectangle must have numbers x, y, width, height")
        else:
            box = [number * scale[i % 2] for i, number in enumerate(place)]
            found.add(picture, labels[0], box, file, where)
    elif kind == "polygonlabels":
        points = value.get("points")
        flat = numbers(x for point in points for x in point) if isinstance(points, list) else None
        if flat is None:
            found.fault(file, where, "a polygon must have points, pairs of numbers")
        else:
            polygon = [number * scale[i % 2] for i, number in enumerate(flat)]
            found.add(picture, labels[0], None, file, where, [polygon])
    else:
        found.fault(file, where, f"type={kind!r} must be 'rectanglelabels' or 'polygonlabels'")
