"""Batch norm: frozen, synchronised or as it was, whatever class a model uses for it."""

from collections.abc import Callable
from typing import Any

import detectron2.layers
import timm.layers
import torch
import torch.nn.functional as F
import torchvision
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ..messages import one_of

NORMS = ("", "FrozenBN", "SyncBN", "BN")

_FROZEN = (
    torchvision.ops.FrozenBatchNorm2d,
    detectron2.layers.FrozenBatchNorm2d,
    timm.layers.norm_act.FrozenBatchNormAct2d,
)
# What is known to normalise, and then to do what its `drop` and `act` do if it has them.
_KNOWN_FORWARDS = {
    _BatchNorm.forward,
    BatchNormAct2d.forward,
    nn.SyncBatchNorm.forward,
    timm.layers.SyncBatchNormAct.forward,
    detectron2.layers.NaiveSyncBatchNorm.forward,
}


class _FixedNorm(torch.autograd.Function):
    """``F.batch_norm`` with fixed statistics, of which the backward pass needs the scale alone."""

    @staticmethod
    def forward(ctx, x, scale, mean, var, weight, bias, eps):
        ctx.save_for_backward(scale)
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx, grad):
        (scale,) = ctx.saved_tensors
        shape = (1, -1) + (1,) * (grad.dim() - 2)
        return grad * scale.to(grad.dtype).view(shape), *[None] * 6


class FrozenBatchNorm2d(torchvision.ops.FrozenBatchNorm2d):
    """Batch norm over (N, C, H, W) with fixed statistics and affine parameters.

    They are buffers, with the keys of the batch norm. It computes with them in float32 at
    least, and gives float16 for float16 and bfloat16 for bfloat16.
    """

    folded = False  # True while the convolution before it does what it would do

    def __init__(self, norm: nn.Module):
        """
        Args:
            norm: the batch norm to take the values of, frozen or not.
        """
        super().__init__(len(norm.running_mean), eps=norm.eps)
        for name in self._buffers:
            value = getattr(norm, name)
            if value is None:  # not affine
                default = torch.ones if name == "weight" else torch.zeros
                value = default(len(norm.running_mean), device=norm.running_mean.device)
                self.register_buffer(name, value, persistent=False)
            else:
                self.register_buffer(name, value.detach().clone())
        self.train(norm.training)

    def scale_and_shift(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The (C,) factor and offset that it comes to."""
        mean, var, weight, bias = self._values()
        scale = weight * (var + self.eps).rsqrt()
        return scale, bias - mean * scale

    def _values(self) -> list[torch.Tensor]:
        names = ("running_mean", "running_var", "weight", "bias")
        dtype = torch.promote_types(self.running_mean.dtype, torch.float32)
        return [getattr(self, name).to(dtype) for name in names]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: (N, C, H, W), or (N, C) or (N, C, L) where the norm was a BatchNorm1d.
        """
        return x if self.folded else self.normalise(x)

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        """``x * scale + shift``."""
        if x.requires_grad and torch.is_grad_enabled():
            return _FixedNorm.apply(x, self.scale_and_shift()[0], *self._values(), self.eps)
        return F.batch_norm(x, *self._values(), training=False, eps=self.eps)


class FrozenBatchNorm1d(FrozenBatchNorm2d):
    """The same over (N, C) or (N, C, L)."""


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    """The same, and the activation that timm's ``BatchNormAct2d`` holds."""

    def __init__(self, norm: nn.Module):
        super().__init__(norm)
        self.drop, self.act = norm.drop, norm.act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: (N, C, H, W).
        """
        return self.act(self.drop(super().forward(x)))


class NaiveSyncBatchNormAct(detectron2.layers.NaiveSyncBatchNorm):
    """detectron2's, and the activation that timm's ``BatchNormAct2d`` holds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: (N, C, H, W), of the same size in all processes.
        """
        return self.act(self.drop(super().forward(x)))


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm with statistics of its own that are not frozen."""
    return (
        isinstance(getattr(module, "running_mean", None), torch.Tensor)
        and isinstance(getattr(module, "running_var", None), torch.Tensor)
        and not isinstance(module, (*_FROZEN, _InstanceNorm))
    )


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """Fix statistics, scale and shift of every batch norm; eps and activation stay the model's own.

    A batch norm of a class that does more than is known (see ``is_batch_norm``) is put into eval
    mode, in which it is to be kept, and its parameters get no gradients.

    Args:
        module: any module; converted in place.

    Returns:
        the module, or what replaces it if it is a batch norm itself.
    """
    return _replaced(module, _frozen)


def convert_norm(module: nn.Module, norm: str) -> nn.Module:
    """Treat every batch norm of a module as ``norm`` says.

    Args:
        module: any module; converted in place.
        norm: ``""`` as the model has it, ``"FrozenBN"`` fixed statistics and affine parameters,
            ``"SyncBN"`` statistics over all processes (without a GPU by detectron2's
            ``NaiveSyncBatchNorm``), ``"BN"`` ordinary batch norm.

    Returns:
        the module, or what replaces it if it is a batch norm itself.

    Raises:
        ValueError: for any other ``norm``, or if a batch norm cannot be converted.
    """
    one_of("norm", norm, NORMS)
    convert = {"FrozenBN": _frozen, "SyncBN": _synchronised, "BN": _ordinary}
    return _replaced(module, convert[norm]) if norm else module


def _replaced(module: nn.Module, convert: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A module with each batch norm in it, frozen or not, replaced by what ``convert`` gives."""
    found: dict[nn.Module, nn.Module] = {}  # one that has two names is to have two again

    def replace(module: nn.Module) -> nn.Module:
        if module not in found:
            if is_batch_norm(module) or isinstance(module, _FROZEN):
                found[module] = convert(module)
            else:
                found[module] = module
                for name, child in list(module._modules.items()):
                    if child is not None and (new := replace(child)) is not child:
                        setattr(module, name, new)
        return found[module]

    return replace(module)


def _is_known(norm: nn.Module) -> bool:
    known = isinstance(norm, (*_FROZEN, NaiveSyncBatchNormAct))
    return known or type(norm).forward in _KNOWN_FORWARDS


def _frozen(norm: nn.Module) -> nn.Module:
    if isinstance(norm, FrozenBatchNorm2d):
        return norm
    if not _is_known(norm):
        return norm.eval().requires_grad_(False)
    if hasattr(norm, "act"):
        return FrozenBatchNormAct2d(norm)
    return (FrozenBatchNorm1d if isinstance(norm, nn.BatchNorm1d) else FrozenBatchNorm2d)(norm)


def _ordinary(norm: nn.Module) -> nn.Module:
    if not isinstance(norm, _FROZEN):
        return norm
    if hasattr(norm, "act"):
        new = _with_values(BatchNormAct2d, norm)
        new.drop, new.act = norm.drop, norm.act
        return new
    one_dimension = isinstance(norm, FrozenBatchNorm1d)
    return _with_values(nn.BatchNorm1d if one_dimension else nn.BatchNorm2d, norm)


def _synchronised(norm: nn.Module) -> nn.Module:
    if not _is_known(norm):
        raise ValueError(f"norm='SyncBN' is not possible for a {type(norm).__name__}")
    if torch.cuda.is_available():
        kinds = nn.SyncBatchNorm, timm.layers.SyncBatchNormAct
    else:  # where torch's own does not work
        kinds = detectron2.layers.NaiveSyncBatchNorm, NaiveSyncBatchNormAct
    norm = _ordinary(norm)
    if not hasattr(norm, "act"):
        return _with_values(kinds[0], norm, momentum=norm.momentum)
    new = _with_values(kinds[1], norm, momentum=norm.momentum)
    new.drop, new.act = norm.drop, norm.act
    return new


def _with_values(kind: type[nn.Module], norm: nn.Module, **kwargs: Any) -> nn.Module:
    """A batch norm of some kind with the eps, affine parameters and statistics of another."""
    affine = "weight" in norm.state_dict()
    new = kind(len(norm.running_mean), eps=norm.eps, affine=affine, **kwargs)
    new = new.to(norm.running_mean).train(norm.training)
    new.load_state_dict(norm.state_dict(), strict=False)
    return new
