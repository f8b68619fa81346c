"""Predicting many images and videos, and writing what is found."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..data.files import check_new
from ..messages import one_of, whole_number
from .augmented import check_scales
from .extras import import_supervision
from .predictor import Predictor, check_tiles
from .results import CocoFile, CsvFile, Film, Item, Maps, Pictures, Result, YoloFiles
from .sources import Source, read_frames

if TYPE_CHECKING:
    from supervision import Detections

OBJECTS, MAPS = ("pictures", "coco", "csv", "yolo"), ("pictures", "maps")
FOLDERS = {"pictures": Pictures, "yolo": YoloFiles, "maps": Maps}


def predict_files(
    predictor: Predictor,
    sources: Sequence[Source],
    output: str | Path,
    *,
    save: Sequence[str] = ("pictures",),
    batch_size: int = 1,
    tile: int | None = None,
    overlap: float = 0.2,
    augment: Sequence[float] | None = None,
    every: int = 1,
) -> list[str]:
    """Predict what is in images and videos, and write it to a folder.

    Args:
        predictor: of a trained detector or segmenter.
        sources: see :func:`detbackbones.deploy.sources.list_sources`.
        output: the folder, which must be new or empty.
        save: "pictures"; of a detector "coco", which is coco.json, "csv", boxes.csv, and "yolo",
            a text file for each image; of a segmenter "maps", a label map for each. A video
            becomes a video, and each of its frames an image of the others.
        batch_size: images that go through the model at once.
        tile: of a detector, length of the side of the tiles that an image is cut into, in pixels;
            None is for whole images.
        overlap: of neighbouring tiles, a fraction of the side.
        augment: of a detector, scales of the views of each image that it predicts from, see
            :meth:`Predictor.augmented`; None is for the image alone.
        every: of a video take each so many-th frame.

    Returns:
        a sentence for each image or video that could not be read or taken; the rest is written.

    Raises:
        ValueError: if an argument is wrong.
        FileExistsError: if the folder holds something.
        ImportError: if supervision is not installed.
    """
    for kind in save:
        one_of("save", kind, OBJECTS if predictor.gives_objects else MAPS)
    whole_number("batch_size", batch_size)
    whole_number("every", every)
    if tile is not None:
        check_tiles(tile, overlap)
    if augment is not None:
        augment = [*augment]
        check_scales(augment)
    for name, value in (("tile", tile), ("augment", augment)):
        if value is not None and not predictor.gives_objects:
            raise ValueError(f"{name}={value} must be left out for a model that gives label maps")
    if augment is not None and tile is not None:
        raise ValueError(f"augment={augment} must stand without tile={tile}")
    import_supervision()
    output = Path(output)
    check_new("output", output)
    images = [source for source in sources if not source.is_video]
    videos = [source for source in sources if source.is_video]
    faults: list[str] = []

    def predict(images: Sequence[np.ndarray]) -> list["Detections"]:
        if tile is not None:
            return [predictor.predict_tiled(image, tile, overlap) for image in images]
        if augment is not None:
            views = (predictor.augmented(image, augment) for image in images)
            return [predictor.detections(view) for view in views]
        return [predictor.detections(prediction) for prediction in predictor.predict(images)]

    with ExitStack() as stack:
        results = _open(predictor, output, [x for x in save if images or x != "pictures"], stack)
        bar = stack.enter_context(tqdm(total=None if videos else len(images), unit="image"))

        def write(items: list[Item], results: Sequence[Result]) -> None:
            for item, found in _find(predict, items, faults):
                for result in results:
                    result.add(item, found)

        for batch in _batches(images, batch_size):
            write([*_read(predictor, batch, faults)], results)
            bar.update(len(batch))
        tables = [result for result in results if not isinstance(result, Pictures)]
        for video in videos:
            try:
                with ExitStack() as films:
                    taking = [*tables]
                    if "pictures" in save:
                        film = Film(output / f"{video.name}.mp4", video.file, every)
                        taking.append(films.enter_context(closing(film)))
                    for batch in _batches(_frames(predictor, video, every), batch_size):
                        write(batch, taking)
                        bar.update(len(batch))
            except OSError as error:
                faults.append(str(error))
    return faults


def _open(
    predictor: Predictor, output: Path, save: Sequence[str], stack: ExitStack
) -> list[Result]:
    results: list[Result] = []
    output.mkdir(parents=True, exist_ok=True)
    for kind in dict.fromkeys(save):
        if kind == "coco":
            result = CocoFile(output / "coco.json", predictor.classes, predictor.categories)
        elif kind == "csv":
            result = CsvFile(output / "boxes.csv")
        else:
            folder = output / kind
            folder.mkdir()
            result = FOLDERS[kind](folder)
        results.append(stack.enter_context(closing(result)))
    return results


def _batches(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := [*islice(items, size)]:
        yield batch


def _read(predictor: Predictor, sources: Sequence[Source], faults: list[str]) -> Iterator[Item]:
    for source in sources:
        try:
            yield Item(source.name, source.file.name, predictor.read(source.file))
        except (OSError, ValueError) as error:
            faults.append(str(error))


def _frames(predictor: Predictor, video: Source, every: int) -> Iterator[Item]:
    for number, pixels in read_frames(video.file, every):
        name = f"{video.name}_{number:06d}"
        yield Item(name, name, predictor.read(Image.fromarray(pixels)))


def _find(
    predict: Callable[[Sequence[np.ndarray]], list["Detections"]],
    items: Sequence[Item],
    faults: list[str],
) -> Iterator[tuple[Item, "Detections"]]:
    """The objects in each image; one that the model cannot take is left out."""
    try:
        found = predict([item.pixels for item in items])
    except ValueError as error:
        if len(items) == 1:
            faults.append(f"{items[0].file_name}: {error}")
            return
        for item in items:
            yield from _find(predict, [item], faults)
        return
    yield from zip(items, found)
