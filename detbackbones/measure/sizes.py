"""Which image sizes a model takes, found by running it on the meta device."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..messages import first_line
from .levels import PROBE_SIZE, is_power_of_two, measure_shape
from .trace import Trace, trace


@dataclass(frozen=True)
class SizeRule:
    """The image sizes that a model takes.

    Attributes:
        divisor: height and width are multiples of this.
        img_size: N if the model takes images of N x N only.
        resample: some level's grid is no whole fraction of the image, and is resampled to one.
    """

    divisor: int = 1
    img_size: int | None = None
    resample: bool = False

    @property
    def probe(self) -> tuple[int, int]:
        """An (H, W) that the model takes.

        Unless they are to be equal, H and W are consecutive multiples of ``divisor``: a model that
        takes them needs no larger divisor, for they have no larger one in common.
        """
        if self.img_size:
            return self.img_size, self.img_size
        if self.divisor == 1:
            return PROBE_SIZE
        n = math.ceil(PROBE_SIZE[0] / self.divisor)
        return n * self.divisor, (n + 1) * self.divisor

    def padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """The least (height, width) that the model takes and that an image fits into.

        Args:
            size: (height, width) of the image.

        Raises:
            ValueError: if the image is larger than the only size that the model takes.
        """
        n = self.img_size
        if n and max(size) > n:
            raise ValueError(
                f"images of {size[0]}x{size[1]} do not fit the model, which takes images of at "
                f"most img_size={n}, padded to {n}x{n}: shrink them, or give img_size"
            )
        if n:
            return n, n
        height, width = (math.ceil(side / self.divisor) * self.divisor for side in size)
        return height, width


ANY_SIZE = SizeRule()


def find_size_rule(
    variants: Sequence[Callable[[], nn.Module]],
    native: int,
    in_channels: int = 3,
    odd_strides: bool = True,
    at_native: Sequence[torch.Size] = (),
    native_only: bool = False,
) -> tuple[SizeRule, int, Trace]:
    """Find how a model can be made to take images of the most sizes.

    In this order: any multiple of its strides, larger multiples (whole windows), its native size
    alone; and only if none of these gives maps of whole strides, the same with maps resampled.

    Args:
        variants: functions that build an extractor, the preferred first; they may raise.
        native: the N of the N x N images that the model is made for.
        in_channels: channels of the input.
        odd_strides: whether strides that are no powers of two are left as they are.
        at_native: shapes of the outputs for N x N images, if they are known.
        native_only: try no other size.

    Returns:
        the rule, the index of the first variant that follows it, and a trace of that.

    Raises:
        ValueError: if no variant gives feature maps, with the first variant's reason.
    """
    models: dict[int, nn.Module | None] = {}  # None for what cannot be built
    failures: list[Exception] = []

    def attempt(index: int, rule: SizeRule) -> Trace | None:
        if index in models and models[index] is None:
            return None
        try:
            if index not in models:
                models[index] = None
                models[index] = variants[index]()
            found = trace(models[index], in_channels, rule.probe, rule.resample)
            if rule.resample and not rule.img_size:
                double = (2 * rule.probe[0], 2 * rule.probe[1])
                again = trace(models[index], in_channels, double, resample=True)
                if _strides(again) != _strides(found):
                    raise ValueError("the feature maps do not grow with the image")
            if not (odd_strides or all(map(is_power_of_two, _strides(found)))):
                raise ValueError(f"the strides {_strides(found)} are no powers of two")
            return found
        except Exception as error:  # a model may refuse in any way
            failures.append(error)
            return None

    indices = range(len(variants))
    if not at_native:
        traces = (attempt(index, SizeRule(native, native, resample=True)) for index in indices)
        at_native = next((found.shapes for found in traces if found), ())
    for rule in _candidates(at_native, native) if at_native else ():
        if native_only and not rule.img_size:
            continue
        for index in indices:
            if found := attempt(index, rule):
                return rule, index, found
    raise ValueError(first_line(failures[0])) from failures[0]


def _strides(trace: Trace) -> list[int]:
    return [level.stride for level in trace.levels]


def _candidates(shapes: Sequence[torch.Size], native: int) -> Iterator[SizeRule]:
    """The rules that a model may follow, by the shapes that it gives for N x N images."""
    size = (native, native)
    # The nearest powers of two, for 8 rows of 240 pixels are of stride 32 and not of 30.
    step = max(measure_shape(shape, size, resample=True)[1] for shape in shapes)
    whole = [measure_shape(shape, size) for shape in shapes]
    exact = math.lcm(*(stride for _, stride, _, _ in whole)) if all(whole) else step
    for resample in (False, True):
        yield SizeRule(step, resample=resample)
        if not resample and exact != step:
            yield SizeRule(exact)
        for divisor in range(2 * step, native + 1, step):
            if native % divisor == 0:
                yield SizeRule(divisor, resample=resample)
        if not resample and native % exact == 0:
            yield SizeRule(native, native)
        elif resample:
            side = math.ceil(native / step) * step
            yield SizeRule(side, side, resample=True)
