"""Exporting a detector, a segmenter or a backbone, and trying what was written."""

import copy
import importlib.util
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling import Backbone
from torch import nn

from ..data.files import new_folder
from ..messages import first_line, one_of, whole_number
from ..training.record import versions
from .agreement import NEAR, Agreement, outputs_of
from .example import write_example
from .exported import ABOUT, Exported, nearest_size, resized
from .extras import import_exporter
from .formats import FORMATS, Format, write_quietly
from .graphs import Graph, MapsGraph, make_graph

ROUNDS = 5  # of timing
Size = tuple[int, int]


@dataclass
class Report:
    """What was exported, and how it compares with the model.

    Attributes:
        folder: where it lies.
        shape: of the images, with names for the axes that may have any length.
        agreement: of the outputs.
        seconds: that the exported takes for the first image, and that the model takes.
        refused: why more axes are not free, by their names.
    """

    folder: Path
    shape: list[str | int]
    agreement: Agreement
    seconds: tuple[float, float]
    refused: dict[str, str]

    @property
    def free(self) -> tuple[str, ...]:
        """The axes of the images that may have any length."""
        return tuple(axis for axis in self.shape if isinstance(axis, str))


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
    with new_folder("folder", folder) as unfinished:
        report = write(model, unfinished, images, format=format, size=size, about=about)
    return replace(report, folder=Path(folder))


def write(
    model: nn.Module,
    folder: Path,
    images: Sequence[torch.Tensor],
    *,
    format: str,
    size: Size | None,
    about: dict[str, Any] | None,
) -> Report:
    """As :func:`export`, into a folder that is there."""
    one_of("format", format, FORMATS)
    for name in FORMATS[format].packages:
        import_exporter(name)
    if not images:
        raise ValueError("images=[] must be some images to try the exported model with")
    for length in size or ():
        whole_number("size", length)
    model = copy.deepcopy(model).cpu().eval()
    graph = make_graph(model).eval()
    step = graph.multiple
    if size and not FORMATS[format].pads and any(n % step for n in size):
        raise ValueError(f"size={size} must be multiples of {step} in {format!r}")
    found = [expected_of(model, image) for image in images]
    if all("boxes" in outputs and not len(outputs["boxes"]) for outputs in found):
        raise ValueError("the model finds nothing in the images to try it with: give others")
    refused: dict[str, str] = {}
    for way, free in _wishes(graph, format, size):
        graph.pads = way.pads
        fixed = size
        if "height" not in free and not size:
            fixed = nearest_size(images[0].shape[-2:], step)
        first = resized(images[0].float(), _taken(graph, images[0], fixed))
        content = _describe(graph, way, free, first, fixed, about or {}) | {"format": format}
        (folder / ABOUT).write_text(json.dumps(content, indent=1) + "\n")
        try:
            batch = first[None].repeat(2 if "batch" in free else 1, 1, 1, 1)
            write_quietly(way, graph, batch, free, folder / way.file)
            exported = Exported(folder)
            agreement = compare(model, exported, images)
            fault = "" if agreement.agrees else str(agreement)
        except ImportError:
            raise
        except Exception as error:  # exporters fail in any way
            fault = reason(error)
        if not fault:
            write_example(folder, content)
            shape, seconds = content["input"]["shape"], time_both(model, exported, first)
            return Report(folder, shape, agreement, seconds, refused)
        refused[f"{' and '.join(free) or 'no axis'} free, by {way.by}"] = fault
    last = {what.partition(", ")[2]: fault for what, fault in refused.items()}  # of each way
    raise ValueError(f"the model cannot be exported to {format!r}: {'; '.join(last.values())}")


def _wishes(
    graph: Graph, format: str, size: Size | None
) -> Iterator[tuple[type[Format], tuple[str, ...]]]:
    """Ways to write a format, and which axes to leave free, the most first."""
    ways, other = [FORMATS[format]], FORMATS[format].other_way
    if other and all(map(importlib.util.find_spec, other.packages)):
        if not size or all(n % graph.multiple == 0 for n in size):
            ways.append(other)
    for way in ways:
        for axes in ([] if size else [("height", "width")]) + [()]:
            if graph.batches:
                yield way, ("batch", *axes)
            yield way, axes


def _taken(graph: Graph, image: torch.Tensor, size: Size | None) -> Size:
    """The size that an image gets: the one of all, or the nearest that needs no padding."""
    own = tuple(image.shape[-2:])
    return size or (own if graph.pads else nearest_size(own, graph.multiple))


def reason(error: BaseException) -> str:
    """The first line of the error that was the cause of all, without colours."""
    while error.__cause__:
        error = error.__cause__
    return re.sub(r"\x1b\[\d*m", "", first_line(error))


def compare(
    model: nn.Module, exported: Exported, images: Sequence[torch.Tensor], near: float = NEAR
) -> Agreement:
    """Compare with the model on images, on one of other sizes, and in a batch where it can be.

    Args:
        model: in eval mode, on the CPU.
        exported: of it.
        images: (C, H, W).
        near: see :class:`Agreement`.
    """
    agreement, free = Agreement(near=near), exported.about["input"]["shape"]
    if isinstance(model, Backbone):  # others pad images as it does itself
        step = model.size_divisibility or 1
        images = [resized(image, nearest_size(image.shape[-2:], step)) for image in images]
    tried = [exported.fit(image).float() for image in images]
    if "height" in free:
        height, width = images[0].shape[-2:]
        for size in ((width, height), (height * 5 // 4, width), (height, width * 7 // 5)):
            if isinstance(model, Backbone):
                size = nearest_size(size, step)
            tried.append(exported.fit(resized(images[0], size)).float())
    for image in tried:
        agreement.add(expected_of(model, image), _found_by(exported, image))
    if "batch" in free:
        batch = torch.stack([tried[0], tried[0].flip(-1), tried[0].flip(-2)])
        together = exported(batch.numpy())
        for i, image in enumerate(batch):
            alone = exported(image[None].numpy())
            one, other = ({k: v[n] for k, v in x.items()} for x, n in ((alone, 0), (together, i)))
            agreement.add(one, other)
    return agreement


def expected_of(model: nn.Module, image: torch.Tensor) -> dict[str, np.ndarray]:
    """What a model gives for an image (C, H, W), as arrays by their names."""
    with torch.no_grad():
        if isinstance(model, Backbone):
            return {name: level[0].numpy() for name, level in model(image[None].float()).items()}
        return outputs_of(model([{"image": image}])[0])


def _found_by(exported: Exported, image: torch.Tensor) -> dict[str, np.ndarray]:
    if "boxes" in exported.about["outputs"] or "sem_seg" in exported.about["outputs"]:
        return outputs_of(exported.detect([{"image": image}])[0])
    return {name: level[0] for name, level in exported(image[None].numpy()).items()}


def time_both(model: nn.Module, exported: Exported, image: torch.Tensor) -> tuple[float, float]:
    """Seconds that the exported and the model take for an image, medians."""
    runs: list[Callable] = [lambda: _found_by(exported, image), lambda: expected_of(model, image)]
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
    defaults: dict[str, Any] = {"score_threshold": 0.5}
    if isinstance(graph, MapsGraph):
        means = {key: getattr(graph.model, key, None) for key in ("pixel_mean", "pixel_std")}
        defaults = means if all(means.values()) else {}
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
        **defaults,
        **about,
        "versions": versions(),
    }
    return content | {"resize": _resize_rule(about.get("resize", {}), graph, size)}


def _resize_rule(rule: dict[str, int], graph: Graph, size: Size | None) -> dict[str, int]:
    """How an image gets a size that is taken: the one that is taken, or by its sides' lengths."""
    if size:
        return {"height": size[0], "width": size[1]}
    return rule | ({} if graph.pads else {"multiple": graph.multiple})
