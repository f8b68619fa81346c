"""JSON files of several formats, told apart by what they begin with."""

import json
from pathlib import Path
from typing import Any

from ...messages import first_line
from ..coco_file import paused_collector
from .findings import Findings

_HEAD = 100_000  # bytes that are looked at


def kind_of(file: Path) -> str | None:
    """The format that a file seems to be of: "coco", "labelme", "label_studio", or None."""
    with file.open("rb") as content:
        head = content.read(_HEAD).lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(b"["):
        return "label_studio"
    if not head.startswith(b"{"):
        return None
    if b'"shapes"' in head:
        return "labelme"
    keys = (b'"annotations"', b'"images"', b'"categories"')
    return "coco" if any(key in head for key in keys) else None


def read_json(file: Path, found: Findings) -> Any:
    """What a file holds; None and a fault if it is no JSON."""
    try:
        with paused_collector():
            return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        found.fault(file, None, f"it must be JSON: {first_line(error)}")
        return None
