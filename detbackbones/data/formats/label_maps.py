"""Label maps as people have them: of indices, of colours, or a mask for each class."""

import re
from collections import Counter, defaultdict
from collections.abc import Container, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from ...messages import few, first_line
from ..semantic import IGNORE_LABEL
from .findings import SPLITS, Findings, Thing
from .palette import Meanings, color_of, find_palettes, read_palette

# The files of the label map of each image, by the class of each, or "" for one of all classes.
Paired = dict[Path, dict[str, Path]]

LOSSLESS = (".png", ".bmp", ".tif", ".tiff")
MOST = 64  # values that are taken for classes where no palette says what they are
BACKGROUND = "background"
NOTHING = {"void", "ignore", "ignored", "unlabeled", "unlabelled"}  # names of what is no class
_FOLDERS = {"annotation", "groundtruth", "gt", "label", "labelmap", "mask", "segmentation"}
_FOLDERS |= {f"{name}s" for name in _FOLDERS} | {"segmentationclass", "label_maps", "ground_truth"}
_OTHERS = {"segmentationobject"}  # of Pascal VOC: objects, not classes
_ENDINGS = {"mask", "masks", "label", "labels", "labelmap", "gt", "seg", "l"}


def find(found: Findings) -> list[Path]:
    """The label maps of a folder that have an image."""
    images, maps = _sorted_out(found)
    stems = {image.stem for image in images}
    return [file for file in maps if any(_cuts(file.stem, stems))]


def read(files: list[Path], found: Findings, palette: str | Path | None = None) -> None:
    """Read a data set.

    Each image gets a thing for each class that it has, of so many pixels, and ``found.label_map``
    gives the label map of an image.

    What the values or colours are is said by a palette, see :func:`.palette.read_palette`; without
    one they are the classes themselves, in ascending order, and 255 is none. Values of 0 and 255
    alone are background and foreground.

    Args:
        files: of :func:`find`.
        found: gets what is in them.
        palette: the file that says it; None is for the one that is found in the folder.

    Raises:
        ValueError: if the palette is wrong, or there are several.
    """
    meanings, colors = _palette(found, palette)
    paired = _paired(found)
    if sum("" in maps for maps in paired.values()) * 2 < len(paired):
        _read_masks(found, paired)
    else:
        _read_values(found, paired, meanings, colors)


def _paired(found: Findings) -> Paired:
    """The files of the label map of each image.

    They are in a folder named labels, masks or the like, or end so: the label map of
    ``images/a.jpg`` is ``labels/a.png``, or ``a_mask.png`` beside it. With a mask for each class
    they are ``masks/cell/a.png``, or ``masks/a_cell.png``.
    """
    images, maps = _sorted_out(found)
    by_stem = defaultdict(list)
    for image in images:
        by_stem[image.stem].append(image)
    folders = {image.parent.name for image in images}
    paired: Paired = defaultdict(dict)
    for file in maps:
        base, rest = next(_cuts(file.stem, by_stem), ("", ""))
        near = by_stem.get(base, [])
        if len(near) > 1:
            near = [image for image in near if found.split_of(image) == found.split_of(file)]
        if len(near) != 1:
            found.fault(file, None, f"{'several images have' if near else 'no image has'} its name")
            continue
        label = "" if rest.lower() in _ENDINGS else rest
        folder = file.parent.name
        if not label and _is_class(folder) and folder not in folders:
            label = folder
        if label in paired[near[0]]:
            found.fault(file, None, f"'{near[0]}' has another label map too")
        paired[near[0]][label] = file
    by_name: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        by_name[image.name].append(image)
    found.images = by_name
    return paired


def _read_masks(found: Findings, paired: Paired) -> None:
    """Of masks of a class each."""
    names = sorted({name for maps in paired.values() for name in maps if name})
    counts, covered = {}, True
    for image, maps in _progress(paired):
        if "" in maps:
            found.fault(maps[""], None, "it is of no class, and those of other images are")
            continue
        total, one, counted = None, "", {}
        for name, file in maps.items():
            values = _checked(found, image, file, False)
            if values is None:
                break
            if len(known := np.unique(values)) > 2 or known[-1] > known[0] > 0:
                found.fault(file, None, "a mask of one class must have two values, one of them 0")
            mask = values > 0
            if total is not None and (both := int((total & mask).sum())):
                found.fault(file, None, f"{both} of its pixels are of {one!r} too")
            total, one = mask if total is None else total | mask, name
            counted[name] = int(mask.sum())
        else:
            rest = int((~total).sum())
            covered &= not rest
            counts[image] = counted | ({} if BACKGROUND in counted else {BACKGROUND: rest})
    if not covered and BACKGROUND not in names:
        names = [BACKGROUND, *names]
    _tell(found, counts, names)
    found.label_map = lambda image: _stacked(paired[image], names)


def _read_values(found: Findings, paired: Paired, meanings: Meanings | None, colors: bool) -> None:
    """Of one label map for each image."""
    read: dict[Path, tuple[Path, dict[int, int]]] = {}
    if not colors:
        files = (file for maps in paired.values() for file in maps.values())
        colored = [file for file in files if not _is_gray(file)]
        if meanings is None:
            colors = bool(colored)
        else:
            for file in colored:
                found.fault(file, None, "it has colours, and the palette is of values")
    for image, maps in _progress(paired):
        for name in maps:
            if name:
                found.fault(maps[name], None, f"it is of {name!r}, and others of all classes")
        values = _checked(found, image, maps[""], colors) if "" in maps else None
        if values is not None:
            counted = zip(*(x.tolist() for x in np.unique(values, return_counts=True)))
            read[image] = maps[""], dict(counted)
    every = sorted({value for _, counted in read.values() for value in counted})
    if meanings is None:
        meanings = _guess(found, every, colors)
    elif [*meanings] == [0, 1] and every == [0, IGNORE_LABEL]:
        found.notes.append(f"the label maps are 0 and 255: 255 is taken as {meanings[1]!r}")
        meanings = {0: meanings[0], IGNORE_LABEL: meanings[1]}
    else:
        for file, counted in read.values():
            unknown = [v for v in counted if v not in meanings and (colors or v != IGNORE_LABEL)]
            if unknown:
                shown = few([_shown(v, colors) for v in unknown])
                found.fault(file, None, f"{shown} must be in the palette, and is not")
    names = [*dict.fromkeys(n for n in meanings.values() if n.lower() not in NOTHING)]
    numbers = {v: names.index(n) if n in names else IGNORE_LABEL for v, n in meanings.items()}
    if not colors:
        numbers.setdefault(IGNORE_LABEL, IGNORE_LABEL)
    counts = {}
    for image, (_, counted) in read.items():
        counts[image] = Counter()
        for value, count in counted.items():
            if (number := numbers.get(value, IGNORE_LABEL)) != IGNORE_LABEL:
                counts[image][names[number]] += count
    _tell(found, counts, names)
    found.label_map = lambda image: _numbered(_values(paired[image][""], colors), numbers)


def _numbered(values: np.ndarray, numbers: dict[int, int]) -> np.ndarray:
    """The numbers of values' classes, uint8; of values that are a fault, that of no class."""
    known, places = np.unique(values, return_inverse=True)
    table = np.array([numbers.get(v, IGNORE_LABEL) for v in known.tolist()], np.uint8)
    return table[places].reshape(values.shape)


def _stacked(files: dict[str, Path], names: list[str]) -> np.ndarray:
    """The label map of masks of a class each."""
    masks = {names.index(name): _values(file, False) > 0 for name, file in files.items()}
    rest = 0 if names[0] == BACKGROUND and 0 not in masks else IGNORE_LABEL
    return np.select([*masks.values()], [*masks], rest).astype(np.uint8)


def _guess(found: Findings, values: list[int], colors: bool) -> Meanings:
    """Names for values of which nothing is said."""
    if len(values) > MOST:
        what = "colours" if colors else "values"
        found.faults.append(
            f"'{found.folder}': its label maps have {len(values)} {what}, too many to be classes: "
            "are edges smoothed, or objects numbered? A palette says which are classes (--palette)"
        )
        return {}
    if colors:
        names = {value: _shown(value, True) for value in values}
        found.notes.append(f"no palette is there: the colours are the classes, {few(names)}")
        return names
    if values == [0, IGNORE_LABEL]:
        found.notes.append("the label maps are 0 and 255: taken as background and foreground")
        return {0: BACKGROUND, IGNORE_LABEL: "foreground"}
    classes = [value for value in values if value != IGNORE_LABEL]
    found.notes.append(f"no names are there: the values are the classes, {few(classes)}")
    return {value: f"class_{value}" for value in classes}


def _tell(found: Findings, counts: dict[Path, dict[str, int]], names: list[str]) -> None:
    """Note the images with the classes that they have."""
    found.classes = names
    if not names and not found.faults:
        found.faults.append(f"'{found.folder}': its label maps must have a class somewhere")
    if len(names) > IGNORE_LABEL:
        text = f"its label maps have {len(names)} classes, and must have at most {IGNORE_LABEL}"
        found.faults.append(f"'{found.folder}': {text}")
    stems: dict[tuple[str, str], Path] = {}
    for image, counted in counts.items():
        split = found.split_of(image)
        other = stems.setdefault((split, image.stem), image)
        if other != image:
            found.fault(image, None, f"'{other}' has the same name in {split}")
        if (picture := found.picture(split, image)) is None:
            continue
        box = (0, 0, picture.width, picture.height)
        picture.things += [Thing(n, box, area=count) for n, count in counted.items() if count]


def _checked(found: Findings, image: Path, file: Path, colors: bool) -> np.ndarray | None:
    """The values of a label map; None after a fault."""
    if file.suffix.lower() not in LOSSLESS:
        found.fault(file, None, f"a label map must be one of {', '.join(LOSSLESS)}: others change")
        return None
    try:
        values = _values(file, colors)
    except Exception as error:  # decoders raise all kinds
        found.fault(file, None, f"it cannot be read: {first_line(error)}")
        return None
    picture = found.picture(found.split_of(image), image)
    if picture is None:
        return None
    size = values.shape[1], values.shape[0]
    if size != (picture.width, picture.height):
        wanted = f"{picture.width}x{picture.height}"
        found.fault(file, None, f"size={size[0]}x{size[1]} must be {wanted}, that of '{image}'")
        return None
    return values


def _values(file: Path, colors: bool) -> np.ndarray:
    """The values or the colours of a label map, int32 (H, W)."""
    with Image.open(file) as image:
        image = ImageOps.exif_transpose(image)
        if colors:
            pixels = np.asarray(image.convert("RGB")).astype(np.int32)
            return color_of(*np.moveaxis(pixels, 2, 0))
        pixels = np.asarray(image).astype(np.int32)
    return pixels if pixels.ndim == 2 else pixels[:, :, 0]


def _is_gray(file: Path) -> bool:
    """Whether a label map has one channel, or several that are equal; what cannot be read too."""
    try:
        with Image.open(file) as image:
            if image.mode not in ("RGB", "RGBA"):
                return True
            red, green, blue = (np.asarray(image.getchannel(c)) for c in "RGB")
    except Exception:  # it is said where it is read
        return True
    return bool((red == green).all() and (red == blue).all())


def _shown(value: int, color: bool) -> str:
    return f"#{value:06x}" if color else str(value)


def _palette(found: Findings, palette: str | Path | None) -> tuple[Meanings | None, bool]:
    """What a palette says, and whether it is of colours; nothing if there is none."""
    if palette is not None:
        return read_palette(Path(palette))
    said: dict[Path, tuple[Meanings, bool]] = {}
    for file in find_palettes(found.files):
        said[file] = read_palette(file)
    different = {str(sorted(meanings.items())): str(file) for file, (meanings, _) in said.items()}
    if len(different) > 1:
        raise ValueError(f"palettes {few(different.values())} differ: give --palette")
    return next(iter(said.values()), (None, False))


def _sorted_out(found: Findings) -> tuple[list[Path], list[Path]]:
    """The images, and the label maps."""
    images, maps = [], []
    for file in (file for files in found.images.values() for file in files):
        parts = [part.lower() for part in file.relative_to(found.folder).parts[:-1]]
        if not {*parts} & _OTHERS:
            (maps if any(map(_has_labels, parts)) else images).append(file)
    stems = {(file.parent, file.stem) for file in images}

    def ends_as_map(file: Path) -> bool:
        base, _, ending = file.stem.rpartition("_")
        return ending.lower() in _ENDINGS and (file.parent, base) in stems

    maps += filter(ends_as_map, images)
    return [file for file in images if not ends_as_map(file)], maps


def _cuts(stem: str, known: Container[str]) -> Iterator[tuple[str, str]]:
    """Names of images that a name begins with, the longest first, and the rest of it."""
    for end in range(len(stem), 0, -1):
        if stem[:end] in known and (end == len(stem) or stem[end] in "_-"):
            yield stem[:end], stem[end + 1 :]


def _has_labels(folder: str) -> bool:
    """Whether a folder's name says that label maps are in it, such as ``train_labels``."""
    name = folder.lower()
    return name in _FOLDERS or re.split(r"[\W_]+", name)[-1] in _FOLDERS


def _is_class(folder: str) -> bool:
    return not _has_labels(folder) and folder.lower() not in {*SPLITS, "images"}


def _progress(paired: Paired) -> Iterator[tuple[Path, dict[str, Path]]]:
    yield from tqdm(paired.items(), "label maps", unit="image", leave=False)
