"""What an earlier run has found right, kept in ``~/.cache/detbackbones``."""

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def recall(name: str) -> dict[str, Any]:
    """What :func:`remember` has written under a name; nothing if there is no such file."""
    try:
        known = json.loads(_file(name).read_text())
    except (OSError, ValueError, RuntimeError):  # the last without a home
        return {}
    return known if isinstance(known, dict) else {}


def remember(name: str, known: Mapping[str, Any]) -> None:
    """Write what is known under a name, in place of what was; other runs may do the same.

    Where it cannot be written, the next run finds it out again.
    """
    try:
        file = _file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as own:
            own.write(json.dumps(known))
        os.replace(own.name, file)
    except (OSError, RuntimeError) as error:
        logger.debug("what was found right is not remembered: %s", error)


def _file(name: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return cache / "detbackbones" / f"{name}.json"
