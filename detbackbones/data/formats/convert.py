"""Writing a data set in COCO's format, and splitting it."""

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ...weights import replacing
from . import read_folder
from .findings import Findings, Picture


def write_coco(
    found: Findings, splits: Mapping[str, Sequence[Picture]], output: str | Path
) -> list[Path]:
    """Write a JSON file for each split; the images stay where they are, below the folder.

    Args:
        found: of the folder, which becomes ``dataset.train_images`` and ``dataset.val_images``.
        splits: pictures by the names of the files, without a suffix.
        output: the folder to write to; it is made.

    Returns:
        the files.

    Raises:
        ValueError: if there are faults.
        FileExistsError: if a file is there that says something else.
    """
    refuse_faults(found)
    output = Path(output)
    texts = {output / f"{name}.json": json.dumps(found.coco(p)) for name, p in splits.items()}
    for file, text in texts.items():
        if file.exists() and file.read_text() != text:
            raise FileExistsError(f"'{file}' holds other data: choose another folder, or remove it")
    output.mkdir(parents=True, exist_ok=True)
    for file, text in texts.items():
        with replacing(str(file)) as temporary:
            Path(temporary).write_text(text)
    return [*texts]


class Prepared(NamedTuple):
    """Data that a detector can be trained on.

    Attributes:
        settings: ``train_json``, ``train_images``, ``val_json`` and ``val_images`` of a config's
            ``dataset``.
        masks: whether each object has a mask.
        said: what was found and done, a sentence.
    """

    settings: dict[str, str]
    masks: bool
    said: str


def prepare_training(
    folder: str | Path, output: str | Path, format: str | None = None, seed: int = 0
) -> Prepared:
    """Make of a folder what a training needs.

    Data without a split for validation, which may be named val, valid, validation or test, are
    split: a fifth is for validation.

    Args:
        folder: as of :func:`read_folder`.
        output: the folder that train.json and val.json are written to.
        format: as of :func:`read_folder`.
        seed: of the split.

    Raises:
        ValueError: if there are faults.
        OSError: if there is no data, or the output holds other data.
    """
    name, found = read_folder(folder, format)
    refuse_faults(found)
    splits = {split: [*pictures.values()] for split, pictures in found.splits.items()}
    val = next((split for split in ("val", "test") if split in splits), None)
    if val and "train" in splits:
        chosen, how = {"train": splits["train"], "val": splits[val]}, f"split as train and {val}"
    else:
        chosen = split_pictures([*found.pictures], {"train": 0.8, "val": 0.2}, seed)
        how = f"without a split for validation: a fifth is taken, by seed {seed}"
    files = write_coco(found, chosen, output)
    settings = {f"{split}_json": str(file) for split, file in zip(chosen, files)}
    settings |= {f"{split}_images": str(folder) for split in chosen}
    counts = " and ".join(str(len(pictures)) for pictures in chosen.values())
    said = f"{folder}: {name}, {how}; {counts} images: wrote {' and '.join(map(str, files))}"
    masks = all(thing.mask is not None for picture in found.pictures for thing in picture.things)
    return Prepared(settings, masks, said)


def refuse_faults(found: Findings) -> None:
    """Refuse a data set with faults.

    Raises:
        ValueError: names the first of them.
    """
    if found.faults:
        more = len(found.faults) - 1
        others = f" (and {more} more: detbackbones data check lists all)" if more else ""
        raise ValueError(f"{found.faults[0]}{others}")


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
    labels = {id(p): Counter(thing.label for thing in p.things) for p in pictures}
    total = Counter()
    for counts in labels.values():
        total.update(counts)
    wanted = {s: {c: n * part for c, n in total.items()} for s, part in fractions.items()}
    room = {split: len(pictures) * part for split, part in fractions.items()}
    order = sorted(pictures, key=lambda p: str(p.file))
    random.Random(seed).shuffle(order)
    chosen: dict[int, str] = {}
    left = {id(p): p for p in order}
    while left:
        remaining = Counter()
        for key in left:
            remaining.update(labels[key])
        rarest = min(remaining, key=lambda c: (remaining[c], c), default=None)
        for key in [k for k in left if rarest is None or labels[k][rarest]]:
            need = {s: (wanted[s].get(rarest, 0.0), room[s]) for s in fractions}
            split = max(fractions, key=need.get)
            chosen[key] = split
            room[split] -= 1
            for label, count in labels[key].items():
                wanted[split][label] -= count
            del left[key]
    return {s: [p for p in pictures if chosen[id(p)] == s] for s in fractions}
