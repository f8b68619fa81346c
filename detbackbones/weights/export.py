"""A trained backbone as a checkpoint of timm or torchvision."""

import os
import re
from collections import Counter
from collections.abc import Mapping

import torch

from ..adapt.lora import merged
from .files import write_checkpoint
from .packages import PREFIX
from .parts import choose
from .read import read_tensors

# Where our configs put a backbone within a detector; anything may stand before.
_BACKBONE_KEY = re.compile(r"^((?:.*?\.)?)backbone\.(?:(?:bottom_up|net)\.)?model\.")


def backbone_state_dict(
    tensors: Mapping[str, torch.Tensor], within: str | None = None
) -> dict[str, torch.Tensor]:
    """The backbone's tensors of a detector's, by the source model's own names.

    timm and torchvision load the result into the classification model that the backbone was made
    from (``strict=False``, for the classifier is not in it). Empty if there is no backbone.

    Args:
        tensors: of a file.
        within: what stands before the detector's names, as the user has chosen it; None for any.

    Raises:
        ValueError: if there are several backbones, see :func:`detbackbones.weights.parts.choose`.
    """
    start = f"{within}." if within else ""
    found = [match for key in tensors if (match := _BACKBONE_KEY.match(key))]
    counts = Counter(match[1] for match in found if match[1].startswith(start))
    if not counts:
        return {}
    most = max(counts.values())
    prefix = choose([*counts], [prefix for prefix in counts if counts[prefix] == most])
    return merged({m.string[m.end() :]: tensors[m.string] for m in found if m[1] == prefix})


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
        FileNotFoundError: if the folder of ``output`` or the checkpoint does not exist.
        ValueError: if there is no backbone in the checkpoint, or ``output`` ends on another type.
    """
    if not output.endswith((".safetensors", ".pth")):
        raise ValueError(f"output {output!r} must end on .safetensors or .pth")
    folder = os.path.dirname(output) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"output {output!r} must be in a folder that exists")
    if os.path.exists(output):
        raise FileExistsError(f"output {output!r} exists: choose another name or remove it")
    tensors, within = read_tensors(checkpoint)
    try:
        state = tensors if checkpoint.startswith(PREFIX) else backbone_state_dict(tensors, within)
    except ValueError as error:
        raise ValueError(f"checkpoint {checkpoint!r} cannot be taken: {error}") from error
    if not state:
        raise ValueError(f"checkpoint {checkpoint!r} has no tensors under 'backbone'")
    write_checkpoint({key: value.contiguous() for key, value in state.items()}, output)
    return len(state)
