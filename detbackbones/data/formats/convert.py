"""Writing a data set in the form that is trained on, and splitting it."""

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ...weights import replacing
from ..images import read_label_map
from . import read_folder
from .findings import Findings, Picture

CLASSES, LABELS = "classes.txt", "labels"


def write_splits(
    found: Findings, splits: Mapping[str, Sequence[Picture]], output: str | Path
) -> list[Path]:
    """Write what a training reads of each split; the images stay where they are, below the folder.

    It is a JSON file in COCO's format, or, of label maps, a text file of the images' paths, their
    label maps as indices in ``labels/`` and the name of the split, and the names of the classes in
    ``classes.txt``.

    Args:
        found: of the folder, which of boxes becomes ``dataset.train_images`` and
            ``dataset.val_images``.
        splits: pictures by the names of the files, without a suffix.
        output: the folder to write to; it is made.

    Returns:
        the file of each split.

    Raises:
        ValueError: if there are faults, or images of a split share a name that label maps need.
        FileExistsError: if a file is there that says something else.
    """
    if found.faults:
        more = len(found.faults) - 1
        others = f" (and {more} more: detbackbones data check lists all)" if more else ""
        raise ValueError(f"{found.faults[0]}{others}")
    return write_as_found(found, splits, Path(output))


def write_as_found(
    found: Findings, splits: Mapping[str, Sequence[Picture]], output: Path
) -> list[Path]:
    """As :func:`write_splits`, whatever the faults: for pictures of the data."""
    if found.label_map is None:
        files = [output / f"{name}.json" for name in splits]
        texts = dict(zip(files, (json.dumps(found.coco(p)) for p in splits.values())))
    else:
        files = [output / f"{name}.txt" for name in splits]
        lines = [[str(picture.file) for picture in pictures] for pictures in splits.values()]
        texts = dict(zip([*files, output / CLASSES], map("\n".join, [*lines, found.names])))
    for file, text in texts.items():
        if file.exists() and file.read_text() != text:
            raise _holds_others(file)
    if found.label_map is not None:
        for pictures in splits.values():
            _refuse_equal_names(pictures)
        for name, pictures in splits.items():
            _write_label_maps(found.label_map, pictures, output / LABELS / name)
    output.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        with replacing(str(file)) as temporary:
            Path(temporary).write_text(text)
    return files


def _write_label_maps(
    label_map: Callable[[Path], np.ndarray], pictures: Sequence[Picture], folder: Path
) -> None:
    """Write the label maps of a split, each ``a.png`` for an image ``a``."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in tqdm(pictures, f"writing {folder}", unit="image", leave=False):
        file = folder / f"{picture.file.stem}.png"
        labels = label_map(picture.file)
        if file.exists():
            if not np.array_equal(read_label_map(str(file)), labels):
                raise _holds_others(file)
            continue
        with replacing(str(file)) as temporary:
            Image.fromarray(labels).save(temporary, format="png")


def _refuse_equal_names(pictures: Sequence[Picture]) -> None:
    """Refuse images of one split whose label maps would have one name."""
    first: dict[str, Path] = {}
    for picture in pictures:
        other = first.setdefault(picture.file.stem, picture.file)
        if other != picture.file:
            raise ValueError(
                f"'{other}' and '{picture.file}' must have names that differ before the ending: "
                "their label maps are of one split"
            )


def _holds_others(file: Path) -> FileExistsError:
    return FileExistsError(f"'{file}' holds other data: choose another folder, or remove it")


@dataclass(frozen=True)
class TrainingData:
    """Data that a detector or segmenter can be trained on.

    Attributes:
        found: what the folder holds.
        splits: the pictures of train and val.
        said: what was found, and how it is split.
    """

    found: Findings
    splits: Mapping[str, Sequence[Picture]]
    said: str

    @property
    def task(self) -> str:
        """What can be learned of it: "boxes", "masks" where each object has one, or "semantic"."""
        if self.found.label_map is not None:
            return "semantic"
        return "boxes" if type(None) in self._kinds else "masks"

    @property
    def _kinds(self) -> set[type]:
        return {type(thing.mask) for picture in self.found.pictures for thing in picture.things}

    def write(self, output: str | Path) -> dict[str, str]:
        """Write what the training reads.

        Args:
            output: the folder to write to, see :func:`write_splits`.

        Returns:
            keys of a config and their values.

        Raises:
            ValueError, FileExistsError: as of :func:`write_splits`.
        """
        output = Path(output).absolute()
        files = dict(zip(self.splits, write_splits(self.found, self.splits, output)))
        if self.task == "semantic":
            settings = {f"dataset.{split}_images": str(file) for split, file in files.items()}
            folder = output / LABELS
            settings |= {f"dataset.{split}_labels": str(folder / split) for split in files}
            settings["dataset.num_classes"] = str(len(self.found.names))
            return settings | {"dataset.classes": json.dumps(self.found.names)}
        settings = {f"dataset.{split}_json": str(file) for split, file in files.items()}
        settings |= {f"dataset.{split}_images": str(self.found.folder) for split in files}
        if dict in self._kinds and self.task == "masks":
            settings["dataloader.train.mapper.instance_mask_format"] = "bitmask"
        return settings


def read_for_training(
    folder: str | Path,
    format: str | None = None,
    palette: str | Path | None = None,
    seed: int = 0,
) -> TrainingData:
    """Read a folder that a detector or segmenter is to be trained on.

    Data without a split for validation, which may be named val, valid, validation or test, are
    split: a fifth is for validation.

    Args:
        folder, format, palette: as of :func:`read_folder`.
        seed: of the split.

    Raises:
        ValueError, OSError: as of :func:`read_folder`.
    """
    name, found = read_folder(folder, format, palette)
    splits = {split: [*pictures.values()] for split, pictures in found.splits.items()}
    val = next((split for split in ("val", "test") if splits.get(split)), None)
    if val and splits.get("train"):
        chosen, how = {"train": splits["train"], "val": splits[val]}, f"split as train and {val}"
        left = {split: len(p) for split, p in splits.items() if p and split not in ("train", val)}
        how += "".join(f", {count} images of {split} left out" for split, count in left.items())
    else:
        chosen = split_pictures([*found.pictures], {"train": 0.8, "val": 0.2}, seed)
        how = f"without a split for validation: a fifth is taken, by seed {seed}"
    counts = " and ".join(str(len(pictures)) for pictures in chosen.values())
    said = [f"{folder}: {name}, {how}; {counts} images", *(f"{folder}: {x}" for x in found.notes)]
    return TrainingData(found, chosen, "\n".join(said))


def split_pictures(
    pictures: Sequence[Picture], fractions: Mapping[str, float], seed: int = 0
) -> dict[str, list[Picture]]:
    """Split pictures so that each class is divided as the pictures are.

    Pictures of the rarest class go first, each to the split that lacks most objects of it
    (Sechidis et al. 2011, iterative stratification). The same pictures, by their paths, and the
    same seed give the same split.

    Args:
        pictures: to be split.
        fractions: the part of each split; they add up to 1.
        seed: of the order.

    Returns:
        the pictures of each split, in the order that they came.
    """
    labels = {picture.file: Counter(t.label for t in picture.things) for picture in pictures}
    remaining = Counter()
    for counts in labels.values():
        remaining.update(counts)
    wanted = {s: {c: n * part for c, n in remaining.items()} for s, part in fractions.items()}
    room = {split: len(pictures) * part for split, part in fractions.items()}
    order = sorted(labels)
    random.Random(seed).shuffle(order)
    chosen: dict[Path, str] = {}
    while len(chosen) < len(order):
        rarest = min((c for c in remaining if remaining[c] > 0), key=remaining.get, default=None)
        for file in order:
            if file in chosen or not (rarest is None or labels[file][rarest]):
                continue
            need = {s: (wanted[s].get(rarest, 0.0), room[s]) for s in fractions}
            chosen[file] = split = max(fractions, key=need.get)
            room[split] -= 1
            remaining.subtract(labels[file])
            for label, count in labels[file].items():
                wanted[split][label] -= count
    return {s: [p for p in pictures if chosen[p.file] == s] for s in fractions}
