"""Checkpoints of a run: what a detector starts from, and what a run writes."""

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from ..backbones.feature_backbone import FeatureBackbone
from ..messages import first_line
from ..weights import (
    OtherModelError,
    Part,
    behind,
    find_part,
    fitting,
    is_counter,
    read_checkpoint,
    read_tensors,
    replacing,
    unloaded,
    write_checkpoint,
)
from .agreement import refuse_missing
from .record import of_record
from .sharding import is_sharded, whole

logger = logging.getLogger(__name__)


def load_init_checkpoint(
    model: nn.Module,
    path: str,
    *,
    whole: bool = False,
    allow_pickle: bool = False,
    allow_partial: bool = False,
) -> str:
    """Start a detector from weights: its own, or those of its backbone's source model alone.

    Whatever stands before the names in the file is taken off. Tensors whose name or shape the
    detector does not have (a classifier, heads for other classes) are passed over; the report
    counts them.

    Args:
        model: a detector, or any module.
        path: see :func:`detbackbones.weights.read_tensors`; with ``allow_pickle`` also detectron2's
            ``.pkl`` files and model-zoo addresses.
        whole: refuse a file that leaves a weight of the detector as it was drawn, but for those
            that detectron2 reads.
        allow_pickle: let detectron2 read ``.pkl`` files, which can execute any code.
        allow_partial: take a file that has less than half of a backbone.

    Returns:
        the report, one line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is bad, no tensor fits, less than half of a backbone's do, several
            parts of the file fit, or one that must be whole is not.
    """
    if path.endswith(".pkl") or "://" in path:
        if not allow_pickle:
            raise ValueError(
                f"init_checkpoint={path!r} must be a file that is read without pickle, which can "
                "execute any code: set train.allow_pickle=True if you trust it"
            )
        DetectionCheckpointer(model).load(path)
        return f"loaded {path}"
    tensors, within = read_tensors(path)
    try:
        match = _match(model, tensors, within, allow_partial)
    except ValueError as error:
        raise ValueError(f"init_checkpoint={path!r} cannot be taken: {error}") from error
    loaded, wanting = match.loaded, match.wanting
    if whole:
        own = model.state_dict()
        left = unloaded(_outside(match.backbones, own), match.others)
        refuse_missing(path, [*wanting, *left], len(own))
    its_own = f"its own are {', '.join(list(tensors)[:3])}, ..."
    if not match.others and not loaded:
        raise ValueError(
            f"init_checkpoint={path!r} must fit the detector or its backbone: none of its "
            f"{len(tensors)} tensors does; {its_own}"
        )
    if loaded < len(wanting) and not allow_partial:
        raise ValueError(
            f"init_checkpoint={path!r} must have at least half of the backbone, and has {loaded} "
            f"of its {loaded + len(wanting)} tensors; {its_own}: train.allow_partial=True takes it"
        )
    for name, (part, _) in match.backbones.items():
        model.get_submodule(name).load_part(part)
    model.load_state_dict(match.others, strict=False)
    report = match.report(model, path)
    logger.log(logging.WARNING if wanting else logging.INFO, report)
    return report


@dataclass(frozen=True)
class _Match:
    """What a file has of a detector.

    Attributes:
        part: by the detector's names.
        backbones: of each backbone, by its name, what its source model can load, and what that
            lacks.
        others: the tensors of the rest of the detector that fit.
    """

    part: Part
    backbones: Mapping[str, tuple[Part, list[str]]]
    others: Mapping[str, torch.Tensor]

    @property
    def loaded(self) -> int:
        return sum(part.fitting for part, _ in self.backbones.values())

    @property
    def wanting(self) -> list[str]:
        return [key for _, missing in self.backbones.values() for key in missing]

    def report(self, model: nn.Module, path: str) -> str:
        """How much was loaded, from where, and how much was not; one line."""
        loaded, wanting, used = self.loaded, self.wanting, []
        if self.backbones:
            where = next(iter(self.backbones.values()))[0].where
            used.append(f"{loaded} of the backbone's {loaded + len(wanting)} tensors{where}")
        unused = sum(part.unused for part, _ in self.backbones.values())
        if self.others:
            groups = (self.others, model.state_dict(), self.part.state)
            count, every, there = (
                sum(not is_counter(key) for key in _outside(self.backbones, group))
                for group in groups
            )
            used.append(f"{count} of the detector's {every} other tensors{self.part.where}")
            unused += there - count
        report = f"loaded {' and '.join(used)}"
        if wanting:
            report += f" ({wanting[0]} and {len(wanting) - 1} others of the backbone are wanting)"
        return f"{report} from {path}; {unused} of the tensors there are not used"


def _match(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], within: str | None, allow_partial: bool
) -> _Match:
    """Find what a file has of a detector.

    Of a backbone it is what stands behind its name in the detector's part of the file, or else any
    part that fits its source model.
    """
    own = model.state_dict()
    convert = getattr(model, "convert_weights", lambda state: state)
    part = find_part(tensors, own, convert, within)
    backbones = {}
    for name, backbone in model.named_modules():
        if not isinstance(backbone, FeatureBackbone):
            continue
        mine = behind(part.state, f"{name}." if name else "") if part.fitting else {}
        try:
            found, wanting = backbone.match_source(mine or tensors, None if mine else within)
        except OtherModelError:
            if not allow_partial:
                raise
            found, wanting = backbone.match_source({})
        backbones[name] = replace(found, prefix=part.prefix) if mine else found, wanting
    return _Match(part, backbones, fitting(_outside(backbones, part.state), own))


def _outside(
    backbones: Iterable[str], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Those of a detector's tensors that are of none of its backbones."""
    inside = tuple(f"{name}." if name else "" for name in backbones)
    return {key: value for key, value in tensors.items() if not key.startswith(inside)}


class Checkpointer(DetectionCheckpointer):
    """detectron2's checkpointer, safe to kill while it saves, and reading without pickle.

    Attributes:
        record: what it writes of the detector, see :func:`~.record.make_record`.
    """

    record: dict[str, Any] | None = None

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``{name}.pth`` under a temporary name, rename it, then tag it as the last one.

        Args:
            name: of the checkpoint.
            kwargs: what else to keep in it, such as the iteration.
        """
        saves = self.save_dir and self.save_to_disk
        if not saves and not is_sharded(self.model):
            return
        data = {"model": self.model.state_dict(), **of_record(self.record), **kwargs}
        for key, obj in self.checkpointables.items():
            data[key] = obj.state_dict()
        if is_sharded(self.model):
            data = whole(data)
        if not saves:
            return
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
