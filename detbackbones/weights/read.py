"""The tensors of a checkpoint, wherever it is and however it is written."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from ..messages import nearest
from .files import read_checkpoint
from .packages import PREFIX, read_package
from .parts import flat


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], str | None]:
    """Read the tensors of a checkpoint by their names; those of nested dicts are joined by dots.

    Args:
        path: a ``.pth``, ``.pt`` or ``.safetensors`` file, the ``.index.json`` of several, or
            ``package:NAME``, see :mod:`detbackbones.weights.packages`. It may end in ``#teacher``,
            which says where in the file the weights are, or in ``#`` for its outermost level.

    Returns:
        the tensors, and the ``within`` of :func:`detbackbones.weights.parts.find_part`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, truncated, damaged, has no tensors, or needs pickle.
        ConnectionError: if a package cannot be downloaded.
    """
    path = os.fspath(path)
    if path.startswith(PREFIX):
        return read_package(path.removeprefix(PREFIX)), None
    within = None
    if not os.path.exists(path) and "#" in path:
        path, _, within = path.rpartition("#")
    content = _read_shards(path) if path.endswith(".index.json") else read_checkpoint(path)
    try:
        tensors = flat(content) if isinstance(content, Mapping) else {}
    except RecursionError:
        tensors = {}
    if not tensors:
        raise ValueError(f"checkpoint {path!r} holds no state dict")
    if within and not any(key.startswith(f"{within}.") for key in tensors):
        words = dict.fromkeys(key.partition(".")[0] for key in tensors)
        raise ValueError(
            f"checkpoint {path!r} has nothing behind {within!r}: {nearest(within, words)}"
        )
    return tensors, within


def _read_shards(path: str) -> dict[str, torch.Tensor]:
    """The tensors of several files, as an index in the format of Hugging Face's names them."""
    index = Path(path)
    if not index.is_file():
        return read_checkpoint(path)  # which says so
    try:
        places = json.loads(index.read_text())["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {path!r} is no index of files of weights") from error
    tensors: dict[str, torch.Tensor] = {}
    for name in files:
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise ValueError(f"checkpoint {path!r} must name files beside it, and names {name!r}")
        tensors |= flat(read_checkpoint(str(index.with_name(name))))
    if missing := sorted(places.keys() - tensors.keys()):
        raise ValueError(
            f"checkpoint {path!r} names {missing[0]!r}, which is not in {places[missing[0]]!r}"
        )
    return tensors
