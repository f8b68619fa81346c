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


def read_tensors(path: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint by their names; those of nested dicts are joined by dots.

    Args:
        path: a ``.pth``, ``.pt`` or ``.safetensors`` file, the ``.index.json`` of several, or
            ``package:NAME``, see :mod:`detbackbones.weights.packages`. With ``#teacher`` at its
            end, those alone that stand behind ``teacher.``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, truncated, damaged, has no tensors, or needs pickle.
        ConnectionError: if a package cannot be downloaded.
    """
    if path.startswith(PREFIX):
        return read_package(path.removeprefix(PREFIX))
    path, part = (path, "") if os.path.exists(path) else path.partition("#")[::2]
    content = _read_shards(path) if path.endswith(".index.json") else read_checkpoint(path)
    tensors = flat(content) if isinstance(content, Mapping) else {}
    if not tensors:
        raise ValueError(f"checkpoint {path!r} holds no state dict")
    if not part:
        return tensors
    behind = {
        key.removeprefix(f"{part}."): value
        for key, value in tensors.items()
        if key.startswith(f"{part}.")
    }
    if not behind:
        words = dict.fromkeys(key.partition(".")[0] for key in tensors)
        raise ValueError(f"checkpoint {path!r} has nothing behind {part!r}: {nearest(part, words)}")
    return behind


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
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"checkpoint {path!r} must name files beside it, and names {name!r}")
        tensors |= flat(read_checkpoint(str(index.with_name(name))))
    if missing := sorted(places.keys() - tensors.keys()):
        raise ValueError(
            f"checkpoint {path!r} names {missing[0]!r}, which is not in {places[missing[0]]!r}"
        )
    return tensors
