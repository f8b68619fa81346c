"""Pascal VOC: an XML file of boxes for each image."""

from pathlib import Path

from .findings import ALL, SPLITS, Findings, numbers
from .xml import files_of, read_xml

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def find(found: Findings) -> list[Path]:
    """The XML files of a folder that have the root ``annotation``."""
    return files_of("annotation", found)


def read(files: list[Path], found: Findings) -> None:
    """Read data sets.

    Pixels count from 1, and the last one belongs to the box, as the VOC has it. They count from 0
    if any box begins at 0 or has fractions of pixels, as other programs write them.

    Args:
        files: of :func:`find`.
        found: gets what is in them.
    """
    splits = _splits(found)
    boxes = []
    for file in files:
        document = read_xml(file, found)
        if document is None:
            continue
        root, lines = document
        name = (root.findtext("filename") or "").strip() or f"{file.stem}.jpg"
        name = name if Path(name).suffix else f"{name}.jpg"
        image = found.locate(name, file)
        if image is None:
            continue
        size = numbers(root.findtext(f"size/{side}") for side in ("width", "height"))
        split = splits.get(file.stem, ALL) if splits else found.split_of(file)
        picture = found.picture(split, image, file, None, size)
        if picture is None:
            continue
        for thing in root.iter("object"):
            line = lines[thing]
            if thing.find("robndbox") is not None:
                found.fault(file, line, "robndbox: oriented boxes are not read")
                continue
            corners = numbers(thing.findtext(f"bndbox/{key}") for key in _CORNERS)
            if corners is None:
                found.fault(file, line, f"bndbox must have numbers {', '.join(_CORNERS)}")
                continue
            boxes.append((picture, thing.findtext("name"), corners, file, line))
    values = [value for _, _, corners, _, _ in boxes for value in corners]
    first = 0 if 0 in values or any(value != int(value) for value in values) else 1
    found.notes.append(f"pixels count from {first}, by the corners of all boxes")
    for picture, label, (left, top, right, bottom), file, line in boxes:
        box = [left - first, top - first, right - left + first, bottom - top + first]
        found.add(picture, label, box, file, line)


def _splits(found: Findings) -> dict[str, str]:
    """The split of each image by its name, from ``ImageSets/Main``, where that is."""
    lists = {x.stem: x for x in found.files if x.match("ImageSets/Main/*.txt")}
    if "train" not in lists and "trainval" in lists:
        lists["train"] = lists["trainval"]
    splits = {}
    for stem, file in lists.items():
        if stem in SPLITS:
            for line in file.read_text(errors="replace").splitlines():
                splits[line.strip()] = SPLITS[stem]
    return splits
