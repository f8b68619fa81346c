"""Which modules of a model give feature maps, and which of them to take as levels."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import nn

from ..messages import first_line
from .levels import measure_shape
from .trace import record

ALIGNED = 32  # the coarsest stride of nearly all models


@dataclass(frozen=True)
class Layer:
    """A feature map that a module gives.

    Attributes:
        name: of the module, as in ``model.named_modules()``.
        channels, height, width: of the map, whatever its layout.
        stride: input pixels per feature-map pixel; of a resampled map the nearest power of two.
        layout: "NCHW" or "NHWC".
        resampled: True if the map is no whole fraction of the image.
        note: why ``layers`` of a backbone cannot have the module, which runs several times or
            gives several tensors; "" if it can.
    """

    name: str
    channels: int
    height: int
    width: int
    stride: int
    layout: str
    resampled: bool
    note: str

    @property
    def shape(self) -> str:
        """Channels x height x width."""
        return f"{self.channels}x{self.height}x{self.width}"


def find_layers(
    model: nn.Module, size: tuple[int, int] = (224, 224), in_channels: int = 3
) -> list[Layer]:
    """Run a model on the meta device and measure each module's output that is a feature map.

    A square image cannot tell a map from, say, the (N, heads, L, L) of an attention. What is a map
    must therefore be one of an image twice as wide too; in a model that takes no such image, it
    must be a whole fraction of the image. The larger image is also padded to a multiple of
    ``ALIGNED``, for strides cannot be seen in an image that is none.

    Args:
        model: maps (N, C, H, W) images to anything; left as it is.
        size: (H, W) of the images.
        in_channels: channels of the images.

    Returns:
        the maps in the order in which their modules end, each shape of a module once.

    Raises:
        ValueError: if the model does not take such images, or they do not show its strides.
    """
    try:
        layers = _measure(model, size, in_channels)
    except Exception as error:  # a model may refuse in any way
        raise ValueError(
            f"size={size[0]}x{size[1]} does not suit {type(model).__name__}: {first_line(error)}"
        ) from error
    height, width = (math.ceil(n / ALIGNED) * ALIGNED for n in size)
    aligned = (height, width) == size
    try:
        wide = _measure(model, (height, 2 * width), in_channels)
    except Exception as error:
        whole = [layer for layer in layers if not layer.resampled]
        if layers and not whole and not aligned:
            raise ValueError(
                f"size={size[0]}x{size[1]} must be a multiple of {ALIGNED} for the strides of "
                f"{type(model).__name__} to be seen, which takes images of this size alone"
            ) from error
        return whole
    others = {(layer.name, layer.channels, layer.layout): layer for layer in wide}
    found = []
    for layer in layers:
        other = others.get((layer.name, layer.channels, layer.layout))
        if other:  # 8 rows of 224 pixels are of stride 32 if 15 columns of 448 are
            stride = layer.stride if aligned and not other.resampled else other.stride
            resampled = other.resampled or aligned and layer.resampled
            found.append(replace(layer, stride=stride, resampled=resampled))
    return found


def _measure(model: nn.Module, size: tuple[int, int], in_channels: int) -> list[Layer]:
    """The outputs of modules that could be maps of images of one size."""
    found = record(model, in_channels, size)
    if found.error:
        raise found.error
    runs = [(run.name, run.shapes) for run in found.ended if run.name]
    times = Counter(name for name, _ in runs)
    layers = {}
    for name, shapes in runs:
        note = f"one of {len(shapes)} tensors" if len(shapes) > 1 else ""
        if times[name] > 1:
            note = f"runs {times[name]} times"
        for shape in shapes:
            # windows of the two images come as further images
            measured = len(shape) == 4 and shape[0] == 2 and _measure_shape(shape, size)
            if measured:
                channels, stride, layout, resampled = measured
                height, width = shape[2:] if layout == "NCHW" else shape[1:3]
                layer = Layer(name, channels, height, width, stride, layout, resampled, note)
                layers[layer] = None
    return list(layers)


def _measure_shape(
    shape: tuple[int, ...], size: tuple[int, int]
) -> tuple[int, int, str, bool] | None:
    return measure_shape(shape, size) or measure_shape(shape, size, resample=True)


def find_stages(model: nn.Module, layers: Iterable[Layer]) -> list[Layer]:
    """The outermost modules that give one feature map and lower the resolution at most once.

    Of a ResNet that is ``layer4``, and neither ``layer4.2`` nor the activation in it that end at
    the same point; of a ConvNeXt ``stages.3``, and not ``stages``, in which there are four
    resolutions. A plain ``nn.Sequential`` is none if it begins with a block of a finer resolution.
    What a module does inside that gives anything else, say tokens, is no stage of the model.

    Args:
        model: in which they are.
        layers: as :func:`find_layers` returns them.

    Returns:
        some of the layers, in the same order.
    """
    layers = list(layers)
    by_name = {layer.name: layer for layer in layers if not layer.note}
    inside: dict[str, set[int]] = {}
    for layer in layers:
        for name in [*_around(layer.name), layer.name]:
            inside.setdefault(name, set()).add(layer.stride)

    def is_stage(layer: Layer) -> bool:
        module = model.get_submodule(layer.name)
        if type(module) is nn.Sequential:
            children = [(by_name.get(f"{layer.name}.{n}"), m) for n, m in module.named_children()]
            if any(part and part.stride < layer.stride and _is_block(m) for part, m in children):
                return False
        return sum(stride < layer.stride for stride in inside[layer.name]) <= 1

    stages = {name for name, layer in by_name.items() if is_stage(layer)}

    def is_open(name: str) -> bool:
        """Whether there may be stages in a module."""
        if name in by_name:
            return name not in stages
        module = model.get_submodule(name)
        return isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))

    return [by_name[n] for n in by_name if n in stages and all(map(is_open, _around(n)))]


def deepest_layers(model: nn.Module, stages: Iterable[Layer]) -> list[Layer]:
    """The deepest module at each stride: the stage that ends last.

    At the coarsest stride it is the last that has parts with weights, if there is one: a lone
    convolution or norm after the last block belongs to the classifier.

    Args:
        model: in which they are.
        stages: as :func:`find_stages` returns them.

    Returns:
        one layer a stride, deepest (coarsest) first.
    """
    stages = list(stages)
    last = {stage.stride: stage for stage in stages}
    if last:
        coarsest = max(last)
        for stage in stages:
            if stage.stride == coarsest and _is_block(model.get_submodule(stage.name)):
                last[coarsest] = stage
    return [last[stride] for stride in sorted(last, reverse=True)]


def followed_by_tokens(model: nn.Module, name: str, size: tuple[int, int] = (224, 224)) -> bool:
    """Whether blocks that end after a module give tokens (N, L, C) instead of maps.

    Args:
        model: that takes images of the (H, W) ``size``.
        name: of the module, which runs.
        size: of the images.
    """
    runs = [run for run in record(model, size=size).ended if run.name]
    end = max(i for i, run in enumerate(runs) if run.name == name)
    return any(
        len(run.shapes) == 1
        and len(run.shapes[0]) == 3
        and _is_block(model.get_submodule(run.name))
        for run in runs[end + 1 :]
    )


def _around(name: str) -> list[str]:
    """The names of the modules around a module, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _is_block(module: nn.Module) -> bool:
    """Whether a module consists of parts that have weights."""
    return any(True for child in module.children() for _ in child.parameters())
