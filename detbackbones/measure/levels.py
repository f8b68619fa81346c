"""Levels (feature maps): channels, stride and layout, and the names that they get."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..messages import nearest

# Height and width differ, so that a layout can be told from a shape, and both divide by 64.
PROBE_SIZE = (256, 320)


@dataclass(frozen=True)
class Level:
    """A feature map as it was measured.

    Attributes:
        channels: number of channels.
        stride: input pixels per feature-map pixel, the same in both directions.
        layout: "NCHW", "NHWC", or "NLC" for tokens in the order of the rows.
        resampled: True if its own grid is no whole fraction of the input, so that it is to be
            resampled to the grid of the stride.
        end: index of the operation that wrote it (see :class:`Trace`).
    """

    channels: int
    stride: int
    layout: str
    resampled: bool
    end: int

    @property
    def exponent(self) -> int:
        """The n of the nearest stride 2^n; a level is called ``res{n}``."""
        return round(math.log2(self.stride))

    def feature_map(self, output: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """The model's output as a feature map.

        Args:
            output: as the model gave it, in ``layout``.
            size: (H, W) of the image.

        Returns:
            (N, channels, H / stride, W / stride); where the division leaves a remainder, with the
            rows and columns that the model gave.
        """
        h, w = size[0] // self.stride, size[1] // self.stride
        if self.layout == "NHWC":
            output = output.permute(0, 3, 1, 2)
        elif self.layout == "NLC":
            output = output.transpose(1, 2).unflatten(2, (h, w))
        if self.resampled and output.shape[2:] != (h, w):
            output = F.interpolate(output, (h, w), mode="bilinear", align_corners=False)
        return output


def output_list(outputs) -> list[torch.Tensor]:
    """The outputs of a feature extractor (list, tuple or dict) as a list."""
    return list(outputs.values() if isinstance(outputs, dict) else outputs)


def measure_shape(
    shape: torch.Size, size: tuple[int, int], resample: bool = False
) -> tuple[int, int, str, bool] | None:
    """Channels, stride and layout of a feature map of an input with the given (height, width).

    Args:
        shape: of the output.
        size: (H, W) of the input.
        resample: take a map of another stride than 2^n for one of the nearest, to be resampled.

    Returns:
        (channels, stride, layout, resampled), or None if the shape is no feature map with a whole
        stride in any layout.
    """
    if len(shape) == 3:
        stride = math.isqrt(size[0] * size[1] // shape[1]) if shape[1] else 0
        grid = stride and (size[0] / stride) * (size[1] / stride)
        whole = stride and size[0] % stride == 0 == size[1] % stride and grid == shape[1]
        return (shape[2], stride, "NLC", False) if whole else None
    if len(shape) != 4 or 0 in shape:
        return None
    grids = {"NCHW": (shape[1], *shape[2:]), "NHWC": (shape[3], *shape[1:3])}
    for layout, (channels, h, w) in grids.items():
        stride = size[0] // h
        whole = min(h, w) > 1 and size == (h * stride, w * stride)
        if whole and (is_power_of_two(stride) or not resample):
            return channels, stride, layout, False
    for layout, (channels, h, w) in grids.items() if resample else ():
        exponents = {round(math.log2(size[0] / h)), round(math.log2(size[1] / w))}
        if len(exponents) == 1 and min(h, w) > 1:
            return channels, 2 ** exponents.pop(), layout, True
    return None


def is_power_of_two(stride: int) -> bool:
    """Whether a stride, of 1 or more, is 2^n."""
    return stride & (stride - 1) == 0


def last_of_each_stride(levels: list[Level]) -> dict[str, int]:
    """Name levels by their stride, detectron2's way.

    Args:
        levels: in the order of execution.

    Returns:
        ``res{n}`` for stride 2^n to the index of the last level with that stride, fine to coarse.
    """
    names = {level.exponent: index for index, level in enumerate(levels)}
    return {f"res{exponent}": names[exponent] for exponent in sorted(names)}


def select_levels(
    out_features: Sequence[str] | None, valid: Sequence[str], parameter: str = "out_features"
) -> list[str]:
    """The levels to output, in the order of ``valid``.

    Args:
        out_features: their names; None for those of strides 4 to 32 (``res2`` to ``res5``).
        valid: the names of all levels of the model, fine to coarse.
        parameter: what the user knows ``out_features`` as.

    Raises:
        ValueError: if a name is unknown or given twice, or the list is empty.
    """
    if out_features is None:
        return [name for name in valid if name in ("res2", "res3", "res4", "res5")]
    wrong = [name for name in out_features if name not in valid]
    if wrong or not out_features or len(set(out_features)) < len(out_features):
        raise ValueError(
            f"{parameter}={list(out_features)} must be different levels of the model: "
            + nearest(wrong[0] if wrong else "", valid)
        )
    return [name for name in valid if name in out_features]
