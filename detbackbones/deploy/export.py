"""Exporting a detector, a segmenter or a backbone, and trying what was written."""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision.transforms.v2.functional import resize

from ..messages import first_line, one_of
from ..training.record import versions
from .agreement import Agreement
from .example import write_example
from .exported import ABOUT, Exported
from .formats import FORMATS, Format, import_extra, write_quietly
from .graphs import Graph, MapsGraph, make_graph

ROUNDS = 5  # of timing
Size = tuple[int, int]


@dataclass
class Report:
    """What was exported, and how it compares with the model.

    Attributes:
        folder: where it lies.
        free: the axes of the images that may have any length.
        agreement: of the outputs.
        seconds: that the exported takes for the first image, and that the model takes.
        refused: why axes are not free, by their names.
    """

    folder: Path
    free: tuple[str, ...]
    agreement: Agreement
    seconds: tuple[float, float]
    refused: dict[str, str]


def export(
    model: nn.Module,
    folder: str | Path,
    images: Sequence[torch.Tensor],
    *,
    format: str = "onnx",
    size: Size | None = None,
    about: dict[str, Any] | None = None,
) -> Report:
    """Export a model, and compare what was written with it.

    Of the axes of the images as many are left free as can be: it is tried with images of other
    sizes and in batches, and what gives other outputs is exported anew with fixed axes.

    Args:
        model: a detector, a segmenter, or a backbone.
        folder: to write to; it must not exist or be empty.
        images: some (C, H, W) as the model takes them, to try it with.
        format: "onnx", "openvino", "torchscript" or "pt2".
        size: (height, width) of all images; None is for any, if it can be.
        about: what ``model.json`` says besides: classes, sizes.

    Raises:
        FileExistsError: if the folder holds files.
        ImportError: if a package that the format needs is not installed.
        ValueError: if an argument is wrong, the model cannot be exported, or what was exported
            gives other outputs.
    """
    one_of("format", format, FORMATS)
    folder = Path(folder)
    for name in FORMATS[format].packages:
        import_extra(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"folder={str(folder)!r} must be a new or empty folder")
    if not images:
        raise ValueError("images=[] must be some images to try the exported model with")
    graph = make_graph(model).cpu().eval()
    there = folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return _export(graph, folder, images, format, size, about or {})
    except BaseException:
        for path in folder.iterdir():
            path.unlink()
        if not there:
            folder.rmdir()
        raise


def _export(
    graph: Graph,
    folder: Path,
    images: Sequence[torch.Tensor],
    format: str,
    size: Size | None,
    about: dict[str, Any],
) -> Report:
    refused: dict[str, str] = {}
    for way, free in _wishes(graph, format, size):
        graph.pads = way.pads
        fixed = size
        if "height" not in free and not size:
            fixed = _fitting(graph, images[0].shape[-2:])
        first = _tried(graph, images[0], fixed)
        content = _describe(graph, way, free, first, fixed, about) | {"format": format}
        (folder / ABOUT).write_text(json.dumps(content, indent=1) + "\n")
        try:
            batch = first[None].repeat(2 if "batch" in free else 1, 1, 1, 1)
            write_quietly(way, graph, batch, free, folder / way.file)
            exported = Exported(folder)
            agreement = _compare(graph, exported, images, free)
            fault = "" if agreement.agrees else str(agreement)
        except ImportError:
            raise
        except Exception as error:  # exporters fail in any way
            fault = first_line(error)
        if not fault:
            write_example(folder, content)
            return Report(folder, free, agreement, _time(graph, exported, first), refused)
        refused[f"{' and '.join(free) or 'nothing'} ({way.__name__})"] = fault
    raise ValueError(f"the model cannot be exported to {format!r}: {fault}")


def _wishes(
    graph: Graph, format: str, size: Size | None
) -> Iterator[tuple[type[Format], tuple[str, ...]]]:
    """Ways to write a format, and which axes to leave free, the most first."""
    ways = [FORMATS[format], FORMATS[format].other_way]
    for way in filter(None, ways):
        for axes in ([] if size else [("height", "width")]) + [()]:
            if graph.batches:
                yield way, ("batch", *axes)
            yield way, axes


def _fitting(graph: Graph, size: Sequence[int]) -> Size:
    """The size next to another that the model takes without padding."""
    height, width = (max(round(n / graph.multiple), 1) * graph.multiple for n in size)
    return height, width


def _tried(graph: Graph, image: torch.Tensor, size: Size | None) -> torch.Tensor:
    if size is None and not graph.pads:
        size = _fitting(graph, image.shape[-2:])
    if size is None or tuple(image.shape[-2:]) == tuple(size):
        return image.float()
    return resize(image.float(), list(size), antialias=True)


def _compare(
    graph: Graph, exported: Exported, images: Sequence[torch.Tensor], free: Sequence[str]
) -> Agreement:
    """Compare on all images, on one of other sizes, and on a batch where these are free."""
    agreement = Agreement()
    batches = [exported.fit(image)[None] for image in images]
    if "height" in free:
        _, height, width = images[0].shape
        for other in ((width, height), (height * 5 // 4, width), (height, width * 7 // 5)):
            batches.append(exported.fit(resize(images[0], list(other), antialias=True))[None])
    if "batch" in free:
        batches.append(torch.cat([batches[0], batches[0].flip(-1), batches[0].flip(-2)]))
    for batch in batches:
        agreement.add(_eager(graph, batch.float()), exported(batch.numpy()))
    return agreement


def _eager(graph: Graph, images: torch.Tensor) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {name: x.numpy() for name, x in zip(graph.outputs, graph(images), strict=True)}


def _time(graph: Graph, exported: Exported, image: torch.Tensor) -> tuple[float, float]:
    images = image[None]
    runs: list[Callable] = [lambda: exported(images.numpy()), lambda: _eager(graph, images)]
    seconds: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for run, times in zip(runs, seconds):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def _describe(
    graph: Graph,
    way: type[Format],
    free: Sequence[str],
    image: torch.Tensor,
    size: Size | None,
    about: dict[str, Any],
) -> dict[str, Any]:
    """The content of ``model.json``."""
    channels, height, width = image.shape
    lengths = {"batch": 1, "height": height, "width": width}
    batch, *sides = (axis if axis in free else length for axis, length in lengths.items())
    content = {
        "file": way.file,
        **({"opset": way.opset} if way.opset else {}),
        "input": {
            "name": "images",
            "shape": [batch, channels, *sides],
            "type": "float32",
            "values": "normalized" if isinstance(graph, MapsGraph) else "0 to 255",
        },
        "outputs": {name: [*axes] for name, axes in graph.outputs.items()},
        **about,
        "versions": versions(),
    }
    return content | {"resize": _resize_rule(about.get("resize", {}), graph, size)}


def _resize_rule(rule: dict[str, int], graph: Graph, size: Size | None) -> dict[str, int]:
    """How an image gets a size that is taken: the one that is taken, or by its sides' lengths."""
    if size:
        return {"height": size[0], "width": size[1]}
    return rule | ({} if graph.pads else {"multiple": graph.multiple})
