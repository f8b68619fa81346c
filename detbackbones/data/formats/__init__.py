"""Data sets of objects as people have them, whatever the format."""

from pathlib import Path

from ...messages import one_of
from . import coco, cvat, label_studio, labelme, table, voc, yolo
from .findings import ALL, Findings, Picture, Thing

FORMATS = {
    "yolo": yolo,
    "voc": voc,
    "cvat": cvat,
    "label_studio": label_studio,
    "labelme": labelme,
    "coco": coco,
    "csv": table,
}

__all__ = ["ALL", "FORMATS", "Findings", "Picture", "Thing", "read_folder"]


def read_folder(folder: str | Path, format: str | None = None) -> tuple[str, Findings]:
    """Read a data set of boxes, or boxes and masks.

    Args:
        folder: that holds the images and what is said of them.
        format: a key of ``FORMATS``; None is for the one that is found.

    Returns:
        the format, and what was found, with all faults.

    Raises:
        FileNotFoundError: if there is no such folder, or nothing of the format in it.
        ValueError: if the format is unknown, or there are several in the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder={str(folder)!r} must be a folder of data, and is none")
    if format is not None:
        one_of("format", format, FORMATS)
    found = {
        name: module.find(folder) for name, module in FORMATS.items() if format in (None, name)
    }
    found = {name: files for name, files in found.items() if files}
    if not found:
        kind = f"data of format={format!r}" if format else f"one of {', '.join(FORMATS)}"
        raise FileNotFoundError(f"folder={str(folder)!r} must hold {kind}, and holds none")
    if len(found) > 1:
        shown = ", ".join(f"{name} ({files[0].name})" for name, files in found.items())
        raise ValueError(f"folder={str(folder)!r} holds several formats, {shown}: give format=")
    ((name, files),) = found.items()
    findings = Findings(folder)
    FORMATS[name].read(files, findings)
    return name, findings
