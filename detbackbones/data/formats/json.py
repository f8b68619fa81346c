"""JSON files of several formats, told apart by what they begin with."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...messages import first_line
from ..coco_file import paused_collector

if TYPE_CHECKING:
    from .findings import Findings

MADE = "made by detbackbones data"  # files that say so are no data of the user's
_HEAD = 100_000  # bytes that are looked at
_KEYS = {  # by any of which a file is told
    "labelme": ("shapes", "imageData", "imagePath", "imageHeight"),
    "coco": ("annotations", "images"),
    "label_studio": ("annotations", "completions", "data"),
}


def files_of(kind: str, found: "Findings") -> list[Path]:
    """The JSON files of a folder that seem to be of a kind.

    Args:
        kind: "coco", "labelme" or "label_studio".
        found: of the folder.
    """
    return [file for file, its_kind in found.json_kinds.items() if its_kind == kind]


def kind_of(file: Path) -> str | None:
    """What a file seems to be: "coco", "labelme" or "label_studio", or else None."""
    with file.open("rb") as content:
        head = content.read(_HEAD).lstrip(b"\xef\xbb\xbf \t\r\n")

    def has(kind: str) -> bool:
        return any(re.search(rf'"{key}"\s*:'.encode(), head) for key in _KEYS[kind])

    if head.startswith(b"["):
        return "label_studio" if has("label_studio") else None
    if not head.startswith(b"{") or MADE.encode() in head:
        return None
    return next((kind for kind in ("labelme", "coco") if has(kind)), None)


def read_json(file: Path, found: "Findings") -> Any:
    """What a file holds; None and a fault if it is no JSON."""
    try:
        with paused_collector():
            return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        found.fault(file, None, f"it must be JSON: {first_line(error)}")
        return None
