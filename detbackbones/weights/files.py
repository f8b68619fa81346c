"""Files of weights: no pickle is executed, no damage passes, and no file is ever half-written."""

import argparse
import contextlib
import hashlib
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..messages import first_line, nearest

_CHECKSUM = "detbackbones.sha256"
# What training scripts put beside the weights, and what does nothing when it is read.
_HARMLESS = [argparse.Namespace, np.dtype, np.float64(0).__reduce__()[0]]
_HARMLESS += [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64)]


def read_checkpoint(path: str) -> Any:
    """Read a checkpoint file, whatever it holds; no pickle is executed.

    A checksum of ours is compared, see :func:`write_checkpoint`; of other zip files, the CRCs of
    their members are, which ``torch.load`` does not look at.

    Args:
        path: a ``.pth``, ``.pt`` or ``.safetensors`` file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, truncated, damaged, or needs pickle.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"checkpoint {path!r} is a folder, and must be a file")
    if not file.is_file():
        names = [p.name for p in file.parent.glob("*")] if file.parent.is_dir() else []
        raise FileNotFoundError(
            f"checkpoint {path!r} does not exist: in that folder {nearest(file.name, names)}"
        )
    if file.stat().st_size == 0:
        raise ValueError(f"checkpoint {path!r} is empty (0 bytes)")
    try:
        if file.suffix == ".safetensors":
            return _read_safetensors(path)
        _check_zip(file)
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {path!r} is damaged or holds Python objects{_objects(path)}, which are "
            "never executed: save its state dict alone with torch.save(model.state_dict(), path)"
        ) from error
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # torch raises all kinds for a file that is none of its own
        if "TorchScript" in str(error):
            raise ValueError(
                f"checkpoint {path!r} is a TorchScript program: save its state dict alone"
            ) from error
        raise ValueError(
            f"checkpoint {path!r} is truncated or damaged: {first_line(error)}"
        ) from error


def write_checkpoint(content: Mapping[str, Any], path: str) -> None:
    """Write a checkpoint with a checksum, under a temporary name until all is written.

    That of a ``.safetensors`` file is in its metadata and covers names, types, shapes and values;
    that of another is the comment at the end of the zip file, and covers all before it. Other
    programs read both as ever.

    Args:
        content: what ``torch.save`` takes; for ``.safetensors`` names to tensors.
        path: of the file.

    Raises:
        OSError: if it cannot be written, with its name; what was there before stays.
    """
    with replacing(path) as temporary:
        if path.endswith(".safetensors"):
            Path(temporary).touch()
            mode = os.stat(temporary).st_mode
            save_file(dict(content), temporary, _metadata(content))
            os.chmod(temporary, mode)  # that others can read it, as any file: safetensors does not
            return
        torch.save(content, temporary)
        with zipfile.ZipFile(temporary, "a") as file:
            file.comment = _comment("0" * 64)
        with open(temporary, "rb+") as file:
            digest = _file_digest(file, os.path.getsize(temporary) - len(_comment("0" * 64)))
            file.write(_comment(digest))


def _objects(path: str) -> str:
    """The classes that a checkpoint needs, in brackets; empty if that cannot be told."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        return ""
    return f" ({', '.join(sorted(names)[:3])})" if names else ""


def _check_zip(file: Path) -> None:
    if not zipfile.is_zipfile(file):
        return
    with zipfile.ZipFile(file) as content:
        comment = content.comment
        if not comment and (wrong := content.testzip()):
            raise ValueError(f"the CRC of {wrong} in it is another")
    if comment:
        with open(file, "rb") as content:
            digest = _file_digest(content, file.stat().st_size - len(comment))
        if comment != _comment(digest):
            raise ValueError("its checksum is another")


def _read_safetensors(path: str) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    tensors = load_file(path)
    # Ours even if the checksum's own name is damaged.
    is_ours = len(metadata) == 2 and any(len(value) == 64 for value in metadata.values())
    if is_ours and metadata != _metadata(tensors):
        raise ValueError("its checksum is another")
    return tensors


def _metadata(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    return {"format": "pt", _CHECKSUM: _digest(tensors)}


def _comment(digest: str) -> bytes:
    return f"{_CHECKSUM}={digest}".encode()


def _file_digest(file: BinaryIO, size: int) -> str:
    """The SHA-256 of the first bytes of a file, which it is left behind."""
    digest = hashlib.sha256()
    file.seek(0)
    while size and (block := file.read(min(size, 2**20))):
        digest.update(block)
        size -= len(block)
    return digest.hexdigest()


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """The SHA-256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextlib.contextmanager
def replacing(path: str) -> Iterator[str]:
    """A temporary name beside a file that becomes the file when all is written.

    Args:
        path: of the file; it is as before if what is done within fails.
    """
    temporary = f"{path}.tmp"
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
