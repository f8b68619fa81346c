"""The catalogue as one HTML page, to search, sort and filter."""

import json
from pathlib import Path
from typing import Any

from .facts import VERSIONS

TEMPLATE = Path(__file__).with_suffix(".html")


def page(rows: list[dict[str, Any]]) -> str:
    """The page, with everything in it.

    Args:
        rows: of :func:`detbackbones.catalog.facts.describe`.
    """
    data = json.dumps({"versions": VERSIONS, "rows": rows}, separators=(",", ":"))
    return TEMPLATE.read_text().replace("{{data}}", data.replace("<", "\\u003c"))
