"""Reading and writing weights: no pickle is executed, and no file is ever half-written."""

import argparse
import contextlib
import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .messages import first_line, nearest

# Where our configs put a backbone within a detector, and where DDP puts the detector.
_BACKBONE_KEY = re.compile(
    r"^(?:module\.)?backbone\.(?:(?:bottom_up|net)\.)?(?:timm_model\.(?:model\.)?|model\.)"
)
# What detectron2 calls a ResNet's parts, and timm and torchvision.
_RESNET_KEY = re.compile(r"^(?:module\.)?backbone\.(?:bottom_up\.)?(?=(?:stem|res[2-5])\.)")
_RESNET_NAMES = (
    (r"^stem\.", ""),
    (r"^res(\d)\.", lambda found: f"layer{int(found[1]) - 1}."),
    (r"shortcut\.norm\.", "downsample.1."),
    (r"shortcut\.", "downsample.0."),
    (r"conv(\d)\.norm\.", r"bn\1."),
)

_CHECKSUM = "detbackbones.sha256"
# What training scripts put beside the weights, and what does nothing when it is read.
_HARMLESS = [argparse.Namespace]


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
            f"checkpoint {path!r} is damaged or holds Python objects, which are never executed: "
            "save its state dict alone with torch.save(model.state_dict(), path)"
        ) from error
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # torch raises all kinds for a file that is none of its own
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
            save_file(dict(content), temporary, _metadata(content))
            return
        torch.save(content, temporary)
        with zipfile.ZipFile(temporary, "a") as file:
            file.comment = _comment("0" * 64)
        with open(temporary, "rb+") as file:
            digest = _file_digest(file, os.path.getsize(temporary) - len(_comment("0" * 64)))
            file.write(_comment(digest))


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


def read_state_dict(path: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint file.

    Args:
        path: a ``.pth``, ``.pt`` or ``.safetensors`` file: a state dict, or a dict that has one
            under ``model``, ``state_dict`` or the like.

    Returns:
        names to tensors on the CPU, without the ``module.`` that DDP puts before them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, truncated, damaged, no state dict, or needs pickle.
    """
    content = read_checkpoint(path)
    content = content if isinstance(content, Mapping) else {}
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {str(k): v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise ValueError(f"checkpoint {path!r} holds no state dict")
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def backbone_state_dict(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The backbone's tensors of a detector's state dict, by the source model's own names.

    timm and torchvision load the result into the classification model that the backbone was made
    from (``strict=False``, for the classifier is not in it). Empty if there is no backbone.

    A backbone is also one of detrex's ``TimmBackbone``, and a ResNet of detectron2's, whose names
    are translated. That takes BGR images, unless it was trained otherwise.
    """
    found = {_BACKBONE_KEY.sub("", k): v for k, v in state.items() if _BACKBONE_KEY.match(k)}
    if found:
        return found
    resnet = {_RESNET_KEY.sub("", k): v for k, v in state.items() if _RESNET_KEY.match(k)}
    return {_in_timms_words(key): value for key, value in resnet.items()}


def _in_timms_words(key: str) -> str:
    """The name of a parameter of detectron2's ResNet in timm's and torchvision's models."""
    for pattern, name in _RESNET_NAMES:
        key = re.sub(pattern, name, key)
    return key


def fitting(
    state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Those tensors of a state dict that have the name and the shape of one of ``own``.

    Raises:
        ValueError: if one of them is of another kind of number, such as whole numbers for weights,
            or has values that are not finite where ``own`` has.
    """
    found = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    for name, tensor in found.items():
        if name.endswith("num_batches_tracked"):  # averaged, it is a fraction
            continue
        kinds = [(t.is_floating_point(), t.is_complex()) for t in (tensor, own[name])]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"tensor {name!r} of the checkpoint is of {tensor.dtype}, and must be of "
                f"{own[name].dtype}"
            )
        wrong = ~tensor.isfinite()
        if wrong.any() and (wrong & own[name].to(wrong.device).isfinite()).any():
            raise ValueError(
                f"tensor {name!r} of the checkpoint has {wrong.sum()} values that are not finite, "
                f"of {tensor.numel()}"
            )
    return found


def unloaded(own: Iterable[str], loaded: Collection[str]) -> list[str]:
    """Names of ``own`` that are not among those loaded.

    Counters of batches do not count: timm and torchvision keep them, but nothing depends on them.
    """
    return [k for k in own if k not in loaded and not k.endswith("num_batches_tracked")]


def export_backbone(checkpoint: str, output: str) -> int:
    """Write the backbone of a trained detector as a checkpoint of timm or torchvision.

    Args:
        checkpoint: a file that the training program wrote.
        output: the ``.safetensors`` or ``.pth`` file to write; it must not exist.

    Returns:
        how many tensors were written.

    Raises:
        FileExistsError: if ``output`` exists.
        ValueError: if there is no backbone in the checkpoint.
    """
    if os.path.exists(output):
        raise FileExistsError(f"output {output!r} exists: choose another name or remove it")
    state = backbone_state_dict(read_state_dict(checkpoint))
    if not state:
        raise ValueError(f"checkpoint {checkpoint!r} has no tensors under 'backbone'")
    state = {key: value.contiguous() for key, value in state.items()}
    write_checkpoint(state, output)
    return len(state)


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
