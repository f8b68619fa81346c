"""What an earlier run has found right, kept in ``~/.cache/detbackbones``."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def recall(name: str) -> dict[str, Any]:
    """What :func:`remember` has written under a name; nothing if there is no such file."""
    try:
        known = json.loads(_file(name).read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def remember(name: str, known: Mapping[str, Any]) -> None:
    """Write what is known under a name, in place of what was; other runs may do the same."""
    file = _file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    own = file.with_suffix(f".{os.getpid()}")
    own.write_text(json.dumps(known))
    own.replace(file)


def _file(name: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "detbackbones" / f"{name}.json"
