"""What was measured of every model, as a backbone with default levels."""

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backbones import BACKBONES
from ..measure.levels import is_power_of_two

DATA = Path(__file__).parent / "catalog.json"  # written by detbackbones list --write
NECKS = ("fpn", "sfp")
VERSIONS = {source: kind.source_class.version() for source, kind in BACKBONES.items()}


@dataclass(frozen=True)
class Facts:
    """What was measured of a model as a backbone with default levels, on the meta device.

    Attributes:
        source: "timm" or "torchvision".
        params: parameters, without the classifier and other parts that no level depends on.
        gmacs: 10^9 multiply-adds of one image.
        side: the height and width of that image: 224, or 224 padded to what the model takes.
        size: which images it takes: "any", "multiples of 64", "square 224 or img_size", ...
        levels: (channels, stride) of each level, fine to coarse, and True if it is resampled.
        batch_norm: classes of its batch norms.
    """

    source: str
    params: int
    gmacs: float
    side: int
    size: str
    levels: list[list]
    batch_norm: list[str]

    @property
    def channels(self) -> list[int]:
        return [level[0] for level in self.levels]

    @property
    def strides(self) -> list[int]:
        return [level[1] for level in self.levels]

    @property
    def neck(self) -> str | None:
        """What ``build_pyramid`` builds on it: "fpn", "sfp" (of one level), or None.

        On a ViT of timm with patches of 14 pixels it does so with ``patch_size=16``.
        """
        if not all(map(is_power_of_two, self.strides)):
            return "sfp" if BACKBONES[self.source].source_class.resizes_patches else None
        return "sfp" if self.strides == [16] else "fpn"


@functools.cache
def facts(source: str) -> dict[str, Facts]:
    """Facts of the architectures of a source, by name, for the versions in the data file."""
    rows = json.loads(DATA.read_text())["models"].get(source, {})
    return {name: Facts(source, *row) for name, row in rows.items()}


def describe(source: str, names: Iterable[str]) -> list[dict[str, Any]]:
    """What is known of some models, as plain values.

    Args:
        source: a key of ``BACKBONES``.
        names: of architectures; those that the data file lacks are passed over.

    Returns:
        for each a dict of source, name, params, gmacs, side, strides, channels, images, batch_norm
        and weights (names of its pretrained weights), see :class:`Facts`.
    """
    known, weights = facts(source), BACKBONES[source].source_class.weights()
    return [
        {
            "source": source,
            "name": name,
            "params": known[name].params,
            "gmacs": known[name].gmacs,
            "side": known[name].side,
            "strides": known[name].strides,
            "channels": known[name].channels,
            "images": known[name].size,
            "batch_norm": known[name].batch_norm,
            "weights": weights.get(name, []),
        }
        for name in names
        if name in known
    ]
