"""Reading and writing weights: no pickle is executed, and no file is ever half-written."""

import contextlib
import os
import pickle
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .messages import first_line, nearest

# Where our configs put a backbone within a detector, and where DDP puts the detector.
_BACKBONE_KEY = re.compile(r"^(?:module\.)?backbone\.(?:(?:bottom_up|net)\.)?model\.")


def read_state_dict(path: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint file.

    Args:
        path: a ``.pth``, ``.pt`` or ``.safetensors`` file: a state dict, or a dict that has one
            under ``model``, ``state_dict`` or the like.

    Returns:
        names to tensors on the CPU, without the ``module.`` that DDP puts before them.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty, truncated, no state dict, or needs pickle.
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
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {path!r} is damaged or holds Python objects, which are never executed: "
            "save its state dict alone with torch.save(model.state_dict(), path)"
        ) from error
    except (RuntimeError, EOFError, OSError, SafetensorError) as error:
        raise ValueError(
            f"checkpoint {path!r} is truncated or damaged: {first_line(error)}"
        ) from error
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
    """
    return {_BACKBONE_KEY.sub("", k): v for k, v in state.items() if _BACKBONE_KEY.match(k)}


def fitting(
    state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Those tensors of a state dict that have the name and the shape of one of ``own``."""
    return {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}


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
    with replacing(output) as temporary:
        save_file(state, temporary) if output.endswith(".safetensors") else torch.save(
            state, temporary
        )
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
