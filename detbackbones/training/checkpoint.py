"""Checkpoints of a run: what a detector starts from, and what a run writes."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..backbones.feature_backbone import FeatureBackbone
from ..weights import backbone_state_dict, fitting, read_state_dict, replacing

logger = logging.getLogger(__name__)


def load_init_checkpoint(model: nn.Module, path: str, *, allow_pickle: bool = False) -> str:
    """Start a detector from weights: its own, or those of its backbone's source model alone.

    Tensors whose name or shape the detector does not have (a classifier, heads for other classes)
    are passed over; the report counts them.

    Args:
        model: a detector, or any module.
        path: see :func:`read_state_dict`; with ``allow_pickle`` also detectron2's ``.pkl`` files
            and model-zoo addresses.
        allow_pickle: let detectron2 read ``.pkl`` files, which can execute any code.

    Returns:
        the report, one line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is bad or no tensor fits.
    """
    if path.endswith(".pkl") or "://" in path:
        if not allow_pickle:
            raise ValueError(
                f"init_checkpoint={path!r} must be a file that is read without pickle, which can "
                "execute any code: set train.allow_pickle=True if you trust it"
            )
        DetectionCheckpointer(model).load(path)
        return f"loaded {path}"
    state = read_state_dict(path)
    own = model.state_dict()
    fit = fitting(state, own)
    if fit:
        model.load_state_dict(fit, strict=False)
        report = f"loaded {len(fit)} of the detector's {len(own)} tensors"
        skipped = len(state) - len(fit)
    else:
        backbones = [m for m in model.modules() if isinstance(m, FeatureBackbone)]
        source = backbone_state_dict(state) or state
        try:
            loads = [backbone.load_source(source) for backbone in backbones]
        except ValueError as error:
            raise ValueError(f"init_checkpoint={path!r} must fit the backbone: {error}") from error
        loaded, wanting = sum(n for n, _ in loads), sum((w for _, w in loads), [])
        if not loaded:
            raise ValueError(
                f"init_checkpoint={path!r} must fit the detector or its backbone: none of its "
                f"{len(state)} tensors ({next(iter(state))}, ...) does"
            )
        report = f"loaded {loaded} of the backbone's {loaded + len(wanting)} tensors"
        skipped = len(state) - loaded
        if wanting:
            report += f" ({wanting[0]} and {len(wanting) - 1} others are wanting)"
    report += f" from {path}; {skipped} of the file's tensors are of no use here"
    logger.info(report)
    return report


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer, safe to kill while it saves, and reading without pickle."""

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``{name}.pth`` under a temporary name, rename it, then tag it as the last one.

        Args:
            name: of the checkpoint.
            kwargs: what else to keep in it, such as the iteration.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict(), **kwargs}
        for key, obj in self.checkpointables.items():
            data[key] = obj.state_dict()
        file = os.path.join(self.save_dir, f"{name}.pth")
        with replacing(file) as temporary:
            torch.save(data, temporary)
        self.tag_last_checkpoint(f"{name}.pth")
        logger.info("wrote %s", file)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the checkpoint that a resumed run starts from."""
        with replacing(os.path.join(self.save_dir, "last_checkpoint")) as temporary:
            Path(temporary).write_text(last_filename_basename)

    def _load_file(self, filename: str) -> dict[str, Any]:
        return torch.load(filename, map_location="cpu", weights_only=True)
