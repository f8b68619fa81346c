"""A trained backbone as a checkpoint of timm or torchvision."""

import os
import re
from collections.abc import Mapping

import torch

from .files import write_checkpoint
from .packages import PREFIX
from .read import read_tensors

# Where our configs put a backbone within a detector, and where trainers put the detector.
_BACKBONE_KEY = re.compile(r"^(?:model\.|module\.)*backbone\.(?:(?:bottom_up|net)\.)?model\.")


def backbone_state_dict(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The backbone's tensors of a detector's, by the source model's own names.

    timm and torchvision load the result into the classification model that the backbone was made
    from (``strict=False``, for the classifier is not in it). Empty if there is no backbone.
    """
    return {_BACKBONE_KEY.sub("", k): v for k, v in tensors.items() if _BACKBONE_KEY.match(k)}


def export_backbone(checkpoint: str, output: str) -> int:
    """Write the backbone of a trained detector as a checkpoint of timm or torchvision.

    Args:
        checkpoint: a file that the training program wrote, or ``package:NAME``, whose model is
            written whole.
        output: the ``.safetensors`` or ``.pth`` file to write; it must not exist.

    Returns:
        how many tensors were written.

    Raises:
        FileExistsError: if ``output`` exists.
        ValueError: if there is no backbone in the checkpoint.
    """
    if os.path.exists(output):
        raise FileExistsError(f"output {output!r} exists: choose another name or remove it")
    tensors = read_tensors(checkpoint)
    state = tensors if checkpoint.startswith(PREFIX) else backbone_state_dict(tensors)
    if not state:
        raise ValueError(f"checkpoint {checkpoint!r} has no tensors under 'backbone'")
    write_checkpoint({key: value.contiguous() for key, value in state.items()}, output)
    return len(state)
