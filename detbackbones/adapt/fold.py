"""Folding of frozen batch norm into the convolution before it: one pass over the maps less."""

import copy
from collections.abc import Mapping

import torch
from timm.layers import Conv2dSame
from torch import nn

from ..measure.levels import output_list
from .folded_conv import FoldedConv2d
from .norm import FrozenBatchNorm2d

TOLERANCE = 1e-4  # by which a fold may change a level, relative to the level's largest value


def fold_norms(
    model: nn.Module, followed_by: Mapping[str, str], shape: tuple[int, ...]
) -> list[str]:
    """Fold each frozen batch norm that directly follows a convolution into it.

    The state dict stays the same. What the folds change is measured on a copy of the model and a
    random image, and one that changes more than rounding does is left out.

    Args:
        model: a feature extractor; changed in place.
        followed_by: names of its modules to the name of the one module that reads what they give,
            see :class:`detbackbones.measure.trace.Trace`.
        shape: (N, C, H, W) of images that it takes.

    Returns:
        the names of the convolutions.
    """
    modules = dict(model.named_modules())
    pairs = [
        (name, follower)
        for name, follower in followed_by.items()
        if type(modules.get(name)) in (nn.Conv2d, Conv2dSame)
        and isinstance(modules.get(follower), FrozenBatchNorm2d)
        and modules[name].out_channels == len(modules[follower].running_mean)
    ]
    weight = next(model.parameters(), None)
    if pairs and not weight.is_meta:
        x = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(weight)
        if _agreeing(model, pairs, x) != pairs:  # it may be rounding that grows
            pairs = _agreeing(model, pairs, x.double(), split=True)
    _fold(model, pairs)
    return [name for name, _ in pairs]


Pairs = list[tuple[str, str]]


def _agreeing(model: nn.Module, pairs: Pairs, x: torch.Tensor, split: bool = False) -> Pairs:
    """The pairs that can be folded together, or none; with ``split`` as many of them as can be."""
    trial = copy.deepcopy(model).to(x.dtype).eval()
    modules = dict(trial.named_modules())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # A new norm changes nothing: a wrong fold of one would be as good as a right one.
        for _, name in pairs:
            for buffer, low in (
                (modules[name].weight, 0.5),
                (modules[name].bias, -0.5),
                (modules[name].running_mean, -0.5),
            ):
                buffer.copy_(low + torch.rand(buffer.shape, generator=generator))
        expected = output_list(trial(x))

        def agreeing(pairs: Pairs) -> Pairs:
            _fold(trial, pairs)
            if not pairs or all(map(_agree, output_list(trial(x)), expected)):
                return pairs
            for name, follower in pairs:
                trial.set_submodule(name, modules[name])
                modules[follower].folded = False
            if not split or len(pairs) == 1:
                return []
            half = len(pairs) // 2
            return agreeing(pairs[:half]) + agreeing(pairs[half:])

        return agreeing(pairs)


def _fold(model: nn.Module, pairs: Pairs) -> None:
    for name, follower in pairs:
        norm = model.get_submodule(follower)
        model.set_submodule(name, FoldedConv2d(model.get_submodule(name), norm))
        norm.folded = True


def unfold(model: nn.Module) -> nn.Module:
    """A copy of a model in eval mode, whose folded convolutions are plain ones: for an exporter.

    Args:
        model: in any mode.
    """
    model = copy.deepcopy(model).eval()
    for name, module in [*model.named_modules()]:
        if isinstance(module, FoldedConv2d):
            model.set_submodule(name, module.plain())
    return model


def _agree(output: torch.Tensor, expected: torch.Tensor) -> bool:
    difference = (output - expected).abs().max()
    return bool(difference <= TOLERANCE * expected.abs().max())
