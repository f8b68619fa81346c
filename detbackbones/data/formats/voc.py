"""Pascal VOC: an XML file of boxes for each image."""

from pathlib import Path

from .findings import ALL, SPLITS, Findings, numbers
from .xml import read_xml

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def find(folder: Path) -> list[Path]:
    """The XML files of a folder that have the root ``annotation``."""
    return [file for file in sorted(folder.rglob("*.xml")) if b"<annotation>" in _head(file)]


def read(files: list[Path], found: Findings) -> None:
    """Read data sets.

    Pixels count from 1, and the last one belongs to the box, as the VOC has it; but where any box
    begins at 0, as other programs write it, they count from 0.

    Args:
        files: of :func:`find`.
        found: gets what is in them.
    """
    splits = _splits(found.folder)
    boxes = []
    for file in files:
        try:
            root, lines = read_xml(file)
        except ValueError as error:
            found.fault(file, None, str(error))
            continue
        name = root.findtext("filename") or f"{file.stem}.jpg"
        name = name if Path(name).suffix else f"{name}.jpg"
        image = found.locate(name.strip(), file)
        if image is None:
            continue
        size = numbers(root.findtext(f"size/{side}") for side in ("width", "height"))
        split = splits.get(file.stem, ALL) if splits else found.split_of(file)
        picture = found.picture(split, image, file, None, size and (size[0], size[1]))
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
    first = 0 if any(min(corners[:2]) < 1 for _, _, corners, _, _ in boxes) else 1
    found.notes.append(f"pixels count from {first}, by the smallest xmin and ymin")
    for picture, label, (left, top, right, bottom), file, line in boxes:
        box = [left - first, top - first, right - left + first, bottom - top + first]
        found.add(picture, label, box, file, line)


def _head(file: Path) -> bytes:
    with file.open("rb") as content:
        return content.read(2000)


def _splits(folder: Path) -> dict[str, str]:
    """The split of each image by its name, from ``ImageSets/Main``, where that is."""
    found = {}
    for file in sorted(folder.rglob("ImageSets/Main/*.txt")):
        if file.stem in SPLITS:
            for line in file.read_text().split("\n"):
                if line.strip():
                    found[line.split()[0]] = SPLITS[file.stem]
    return found
