"""Data sets as people have them, whatever the format."""

from pathlib import Path

from ...messages import one_of
from . import coco, cvat, label_maps, label_studio, labelme, table, voc, yolo
from .findings import ALL, Findings, Picture, Thing

FORMATS = {
    "yolo": yolo,
    "voc": voc,
    "cvat": cvat,
    "label_studio": label_studio,
    "labelme": labelme,
    "coco": coco,
    "csv": table,
    "label_maps": label_maps,
}

__all__ = ["ALL", "FORMATS", "Findings", "Picture", "Thing", "read_folder"]


def read_folder(
    folder: str | Path, format: str | None = None, palette: str | Path | None = None
) -> tuple[str, Findings]:
    """Read a data set of boxes, of boxes and masks, or of label maps.

    Args:
        folder: that holds the images and what is said of them.
        format: a key of ``FORMATS``; None is for the one that is found. Label maps are what they
            are taken for where nothing else is there.
        palette: the file that says what the values or colours of label maps are; None is for the
            one that is in the folder, if any.

    Returns:
        the format, and what was found, with all faults.

    Raises:
        FileNotFoundError: if there is no such folder, or nothing of the format in it.
        ValueError: if the format is unknown, or there are several in the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder={str(folder)!r} must be a folder of data, and is none")
    if palette is not None:
        format = format or "label_maps"
        if format != "label_maps":
            raise ValueError(f"palette={str(palette)!r} is for label maps, not for {format!r}")
    if format is not None:
        one_of("format", format, FORMATS)
    findings = Findings(folder)
    found = {name: x.find(findings) for name, x in FORMATS.items() if format in (None, name)}
    found = {name: files for name, files in found.items() if files}
    if not found:
        kind = f"data of format={format!r}" if format else f"one of {', '.join(FORMATS)}"
        raise FileNotFoundError(f"folder={str(folder)!r} must hold {kind}, and holds none")
    if len(found) > 1:
        found.pop("label_maps", None)  # the masks of objects, it may be
    if len(found) > 1:
        shown = ", ".join(f"{name} ({files[0].name})" for name, files in found.items())
        raise ValueError(
            f"folder={str(folder)!r} holds several formats, {shown}: say which by format (--format)"
        )
    ((name, files),) = found.items()
    more = {"palette": palette} if palette is not None else {}
    FORMATS[name].read(files, findings, **more)
    order = ("train", "val", "test", ALL)
    findings.splits = {split: findings.splits[split] for split in order if split in findings.splits}
    _check(findings, files[0])
    return name, findings


def _check(found: Findings, file: Path) -> None:
    """Note what the whole of the data tells."""
    if found.label_map is not None:
        return
    boxes = [thing.box for picture in found.pictures for thing in picture.things]
    if not any(found.splits.values()) and not found.faults:
        found.fault(file, None, "it must have images, and has none")
    large = any(max(picture.width, picture.height) > 2 for picture in found.pictures)
    if boxes and large and all(x + w <= 1 and y + h <= 1 for x, y, w, h in boxes):
        found.fault(file, None, "no box reaches beyond the first pixel: are they fractions?")
