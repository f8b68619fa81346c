"""The outputs of named modules as feature maps, of any module that maps images to anything."""

from collections.abc import Iterable, Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import nn

from ..messages import first_line, nearest, one_of
from .levels import PROBE_SIZE, measure_shape
from .trace import record, tensors_in


class LayerExtractor(nn.Module):
    """A model that ends with the last of some of its modules, and gives the outputs of all of them.

    Its state dict has the model's own keys under the prefix ``model.``.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str]):
        """
        Args:
            model: maps (N, C, H, W) images to anything.
            layers: names of its modules, as :func:`check_layers` takes and returns them.
        """
        super().__init__()
        self.model = model
        self.layers = list(layers)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """
        Args:
            x: images (N, C, H, W).

        Returns:
            the output of each layer, in the order of ``layers`` and the model's own layout.

        Raises:
            ValueError: if an operation after a layer overwrites its output.
        """
        outputs, versions = {}, {}

        def keep(name: str, output: Any) -> None:
            (outputs[name],) = tensors_in(output)
            versions[name] = _version(outputs[name])
            if len(outputs) == len(self.layers):
                raise _Done

        # Hooks that stayed would make a deep copy report to the original, and would stop the
        # second run of a module under gradient checkpointing.
        modules = [(name, self.model.get_submodule(name)) for name in self.layers]
        hooks = [
            module.register_forward_hook(lambda _, inputs, output, name=name: keep(name, output))
            for name, module in modules
        ]
        try:
            self.model(x)
        except _Done:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        for name, output in outputs.items():
            if _version(output) != versions[name]:
                raise ValueError(
                    f"layers={name!r} is overwritten by an in-place operation after it: give the "
                    "module that does this (an activation, say), or the one around both"
                )
        return [outputs[name] for name in self.layers]


class _Done(Exception):
    """The last of the layers has run."""


def check_layers(
    model: nn.Module,
    layers: Sequence[str] | Mapping[str, str],
    size: tuple[int, int] = PROBE_SIZE,
    in_channels: int = 3,
) -> dict[str, str]:
    """See on the meta device that each layer runs once and gives one feature map.

    Args:
        model: maps (N, C, H, W) images to anything; left as it is.
        layers: names of its modules, as in ``model.named_modules()``, or these names to the names
            of their outputs.
        size: an (H, W) of images that the model takes.
        in_channels: channels of the images.

    Returns:
        the layers, in the order given, to the names of their outputs (their own by default).

    Raises:
        ValueError: if ``layers`` or what one of them gives is anything else.
    """
    listed = isinstance(layers, Sequence) and not isinstance(layers, str)
    outputs = list(layers.values() if isinstance(layers, Mapping) else layers if listed else ())
    if not outputs or len(set(outputs)) < len(outputs):
        raise ValueError(
            f"layers={layers!r} must be a list of different names of modules, or a mapping from "
            "such names to different names of outputs"
        )
    names = dict(zip(layers, outputs))
    found = record(model, in_channels, size)
    for name in names:
        one_of("layers", name, found.runs_of)
    # what follows the layers may fail: the classifier of a model of one image size, say
    ended = {name: [r.shapes for r in runs if r.end < inf] for name, runs in found.runs_of.items()}
    if found.error and not all(ended[name] for name in names):
        raise ValueError(
            f"layers={list(names)} did not all run: {type(model).__name__} fails on images "
            f"{(2, in_channels, *size)}, {first_line(found.error)}"
        ) from found.error
    maps = [
        name
        for name, runs in ended.items()
        if len(runs) == 1 and _has_dims(*runs, 4) and measure_shape(*runs[0], size, resample=True)
    ]
    for name in names:
        runs, hint = ended[name], ""
        if name in maps:
            continue
        if len(runs) != 1:
            what = f"runs {len(runs)} times in a forward pass, not once"
        else:
            shapes = " and ".join(map(str, *runs)) or "no tensor"
            what = f"gives {shapes}, not one feature map (N, C, H, W) or (N, H, W, C)"
            if _has_dims(*runs, 3):
                hint = "; for a ViT's tokens as maps leave layers out and use out_indices"
        raise ValueError(f"layers={name!r} {what}: {nearest(name, maps)}{hint}")
    return names


def _version(tensor: torch.Tensor) -> int | None:
    """How often a tensor has been written in place; under inference mode torch does not count."""
    return None if tensor.is_inference() else tensor._version


def _has_dims(shapes: list[tuple[int, ...]], dims: int) -> bool:
    """Whether a module gave one tensor of so many dimensions for the two images of a trace.

    Windows of the images (of a Swin or MaxViT) come as further images.
    """
    return len(shapes) == 1 and len(shapes[0]) == dims and shapes[0][0] == 2
