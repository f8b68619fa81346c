"""Which image sizes a model takes, found by running it on the meta device."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from .levels import PROBE_SIZE, Trace, trace


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

    def check(self, size: tuple[int, int]) -> None:
        """Refuse images of another (height, width).

        Raises:
            ValueError: with what the model takes instead.
        """
        n = self.img_size
        if n and tuple(size) != (n, n):
            raise ValueError(
                f"images padded to {size[0]}x{size[1]} do not fit the model, which takes images "
                f"of at most img_size={n}, padded to {n}x{n}: shrink them, or give img_size"
            )
        if size[0] % self.divisor or size[1] % self.divisor:
            raise ValueError(
                f"images padded to {size[0]}x{size[1]} do not fit the model, which takes "
                f"multiples of size_divisibility={self.divisor}"
            )


ANY_SIZE = SizeRule()


def find_size_rule(
    variants: Sequence[Callable[[], nn.Module]], native: int, in_channels: int = 3
) -> tuple[SizeRule, int, nn.Module, Trace]:
    """Find how a model can be made to take images of the most sizes.

    In this order: any multiple of its strides, larger multiples (whole windows), its native size
    alone; and only if none of these gives maps of whole strides, the same with maps resampled.

    Args:
        variants: functions that build an extractor, the preferred first; they may raise.
        native: the N of the N x N images that the model is made for.
        in_channels: channels of the input.

    Returns:
        the rule, the index of the first variant that follows it, its extractor, and a trace of it.

    Raises:
        ValueError: if no variant gives feature maps, with the first variant's reason.
    """
    models: dict[int, nn.Module | Exception] = {}
    failures: list[Exception] = []

    def attempt(index: int, rule: SizeRule) -> Trace | None:
        try:
            if index not in models:
                models[index] = variants[index]()
            return trace(models[index], in_channels, rule.probe, rule.resample)
        except Exception as error:  # a model may refuse in any way
            failures.append(error)
            return None

    for resample in (False, True):
        square = SizeRule(native, native, resample)
        traces = (attempt(index, square) for index in range(len(variants)))
        at_native = next((found for found in traces if found), None)
        if at_native is None:
            continue
        step = math.lcm(*(level.stride for level in at_native.levels))
        whole = native % step == 0
        divisors = (
            [d for d in range(step, native + 1, step) if native % d == 0] if whole else [step]
        )
        rules = [SizeRule(divisor, resample=resample) for divisor in divisors]
        for rule in rules + [square] * whole:
            for index in range(len(variants)):
                if found := attempt(index, rule):
                    return rule, index, models[index], found
    raise ValueError(str(failures[0]).partition("\n")[0] or repr(failures[0])) from failures[0]
