"""Checkpoints of a run: what a detector starts from, and what a run writes."""

import logging
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..backbones.feature_backbone import FeatureBackbone
from ..messages import first_line
from ..weights import (
    backbone_state_dict,
    fitting,
    read_checkpoint,
    read_state_dict,
    replacing,
    unloaded,
    write_checkpoint,
)

logger = logging.getLogger(__name__)


def load_init_checkpoint(
    model: nn.Module, path: str, *, allow_pickle: bool = False, allow_partial: bool = False
) -> str:
    """Start a detector from weights: its own, or those of its backbone's source model alone.

    Tensors whose name or shape the detector does not have (a classifier, heads for other classes)
    are passed over; the report counts them. A backbone's are found by its source model's names,
    and by those of detrex's wrapper and of detectron2's own ResNet.

    Args:
        model: a detector, or any module.
        path: see :func:`read_state_dict`; with ``allow_pickle`` also detectron2's ``.pkl`` files
            and model-zoo addresses.
        allow_pickle: let detectron2 read ``.pkl`` files, which can execute any code.
        allow_partial: take a file that has less than half of a backbone.

    Returns:
        the report, one line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is bad, no tensor fits, or less than half of a backbone's do.
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
    backbones = {n: m for n, m in model.named_modules() if isinstance(m, FeatureBackbone)}
    source = backbone_state_dict(state) or ({} if fit else state)
    loaded = wanted = others = 0
    wanting: list[str] = []
    for name, backbone in backbones.items():
        keys = [key for key in own if key.startswith(f"{name}." if name else "")]
        missing, count = unloaded(keys, fit), len([key for key in keys if key in fit])
        if source and not any(key in fit for key in keys):
            try:
                count, missing = backbone.load_source(source)
            except ValueError as error:
                raise ValueError(
                    f"init_checkpoint={path!r} must fit the backbone: {error}"
                ) from error
            others += count
        loaded, wanted = loaded + count, wanted + count + len(missing)
        wanting += missing
    if not fit and not loaded:
        raise ValueError(
            f"init_checkpoint={path!r} must fit the detector or its backbone: none of its "
            f"{len(state)} tensors ({', '.join(list(state)[:3])}, ...) does{_hint(state, own)}"
        )
    if loaded < wanted / 2 and not allow_partial:
        raise ValueError(
            f"init_checkpoint={path!r} must have at least half of the backbone, and has {loaded} "
            f"of its {wanted} tensors; its own are {', '.join(list(state)[:3])}, ..."
            f"{_hint(state, own)}: train.allow_partial=True takes it"
        )
    model.load_state_dict(fit, strict=False)
    parts = [f"{len(fit)} of the detector's {len(own)} tensors"] if fit else []
    if others or not fit:
        parts.append(f"{loaded} of the backbone's {wanted} tensors")
    report = f"loaded {' and '.join(parts)}"
    if wanting:
        report += f" ({wanting[0]} and {len(wanting) - 1} others of the backbone are wanting)"
    report += f" from {path}; {len(state) - len(fit) - others} of the file's tensors are of no use"
    report += " here"
    logger.log(logging.WARNING if wanting else logging.INFO, report)
    return report


def _hint(state: Iterable[str], own: Iterable[str]) -> str:
    """The clause that names the prefix without which most keys of a file would fit, if any."""
    names = {key.partition("model.")[2] or key for key in own}
    prefixes = Counter(
        key.removesuffix(name)
        for key in state
        for start in range(len(key))
        if key[start - 1 : start] == "." and (name := key[start:]) in names
    )
    if not prefixes:
        return ""
    prefix, count = prefixes.most_common(1)[0]
    return f"; without {prefix!r} in front {count} would fit"


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
        try:
            write_checkpoint(data, file)
        except (OSError, RuntimeError) as error:  # torch raises a RuntimeError on a full disk
            left = [path for path in checkpoints(self.save_dir) if path != file]
            last = f"the last one is {left[0]}" if left else "there is none before it"
            raise OSError(
                f"checkpoint {file!r} cannot be written: {first_line(error)}; {last}"
            ) from error
        self.tag_last_checkpoint(f"{name}.pth")
        logger.info("wrote %s", file)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the checkpoint that a resumed run starts from."""
        with replacing(os.path.join(self.save_dir, "last_checkpoint")) as temporary:
            Path(temporary).write_text(last_filename_basename)

    def kept(self, start: int, most: int | None) -> list[str]:
        """The checkpoints of a resumed run that count as recent, the oldest first.

        Args:
            start: the iteration that the run starts with.
            most: ``max_to_keep``; older ones of the main process's folder are removed.
        """
        if not start or most is None:
            return []
        last = f"model_{start:07d}.pth"
        names = sorted(map(os.path.basename, checkpoints(self.save_dir)))
        names = [name for name in names if name < last and name != "model_final.pth"]
        files = [os.path.join(self.save_dir, name) for name in names]
        for file in files[:-most] if self.save_to_disk else ():
            os.remove(file)
        return files[-most:]

    def _load_file(self, filename: str) -> dict[str, Any]:
        return read_checkpoint(filename)


def checkpoints(folder: str) -> list[str]:
    """The checkpoints of a run, the last first: as it is tagged, then by iteration."""
    found = sorted(map(str, Path(folder).glob("model_[0-9]*.pth")), reverse=True)
    tag = Path(folder, "last_checkpoint")
    tagged = os.path.join(folder, tag.read_text().strip()) if tag.is_file() else ""
    first = [tagged] if os.path.isfile(tagged) else []
    return first + [file for file in found if file != tagged]


def last_whole(folder: str) -> str | None:
    """The last checkpoint of a run that is not damaged; a warning names those that are.

    Raises:
        ValueError: if there are only damaged ones.
    """
    damaged = []
    for file in checkpoints(folder):
        try:
            read_checkpoint(file)
        except ValueError as error:
            damaged.append(error)
            continue
        if damaged:
            logger.warning("%s; the one before is taken, %s", damaged[0], file)
        return file
    if damaged:
        raise damaged[0]
    return None
