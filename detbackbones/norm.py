"""Batch norm: frozen, synchronised or as it was, whatever class a model uses for it."""

import torch
from timm.layers import (
    convert_sync_batchnorm,
    freeze_batch_norm_2d,
    unfreeze_batch_norm_2d,
)
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from .messages import one_of

NORMS = ("", "FrozenBN", "SyncBN", "BN")


class FrozenBatchNorm1d(FrozenBatchNorm2d):
    """Batch norm over (N, C) or (N, C, L) with fixed statistics and affine parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return x * scale.view(shape) + shift.view(shape)


def _freeze_batch_norm_1d(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.BatchNorm1d):
        frozen = FrozenBatchNorm1d(module.num_features, eps=module.eps)
        frozen.load_state_dict(module.state_dict(), strict=module.affine)
        return frozen.to(module.running_mean.device)
    for name, child in module.named_children():
        setattr(module, name, _freeze_batch_norm_1d(child))
    return module


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """Fix statistics, scale and shift of every batch norm; eps and activation stay the model's own.

    timm's ``BatchNormAct2d`` keeps its activation (detectron2's converter would drop it).

    Args:
        module: any module; converted in place.

    Returns:
        the module, or what replaces it if it is a batch norm itself.
    """
    return _freeze_batch_norm_1d(freeze_batch_norm_2d(module))


def convert_norm(module: nn.Module, norm: str) -> nn.Module:
    """Treat every batch norm of a module as ``norm`` says.

    Args:
        module: any module; converted in place.
        norm: ``""`` as the model has it, ``"FrozenBN"`` fixed statistics and affine parameters,
            ``"SyncBN"`` statistics over all processes, ``"BN"`` ordinary batch norm.

    Returns:
        the module, or what replaces it if it is a batch norm itself.

    Raises:
        ValueError: for any other ``norm``.
    """
    one_of("norm", norm, NORMS)
    if norm == "FrozenBN":
        return freeze_batch_norm(module)
    if norm == "SyncBN":
        return convert_sync_batchnorm(module)
    if norm == "BN":
        return unfreeze_batch_norm_2d(module)
    return module


def norm_from_layer(norm_layer: type | str, norm: str) -> str:
    """The ``norm`` that a ``norm_layer`` of detrex's configs means.

    Args:
        norm_layer: a class or its dotted name. Any class called FrozenBatchNorm2d, BatchNorm2d or
            SyncBatchNorm is understood; none is passed on to the model.
        norm: what the user gave as ``norm``.

    Raises:
        ValueError: for another class, or if ``norm`` says something else.
    """
    name = norm_layer if isinstance(norm_layer, str) else getattr(norm_layer, "__name__", "")
    name = name.rpartition(".")[-1]
    meanings = {"FrozenBatchNorm2d": "FrozenBN", "BatchNorm2d": "BN", "SyncBatchNorm": "SyncBN"}
    if name not in meanings:
        one_of("norm_layer", norm_layer, meanings, hint="; other layers go into model_kwargs")
    if norm not in ("", meanings[name]):
        raise ValueError(f"norm_layer={name} means norm={meanings[name]!r}, but norm={norm!r}")
    return meanings[name]
