"""FoldedConv2d: a convolution and the frozen batch norm after it, in one pass over the maps."""

import math
import operator

import torch
from timm.layers import Conv2dSame
from timm.layers.padding import pad_same
from torch import nn

from .depthwise import TrainsInFloat32
from .norm import FrozenBatchNorm2d


class FoldedConv2d(TrainsInFloat32):
    """A convolution and the frozen batch norm after it: ``conv(x, weight * scale) + shift``.

    Weight and bias are the convolution's own, trainable as they are. Where they need no gradient
    their product with the scale is remembered until one of its factors is written to, until
    ``train()`` or ``eval()`` is called, or the module is moved. Where they do, it is their output
    that is scaled if it has fewer numbers than the weight, as in the last stages of small images.
    """

    def __init__(self, conv: nn.Conv2d, norm: FrozenBatchNorm2d):
        """
        Args:
            conv: shares its parameters.
            norm: over the output of ``conv``; it remains the owner of its values.
        """
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            padding_mode=conv.padding_mode,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.same = isinstance(conv, Conv2dSame)
        self._norm = (norm,)  # in a tuple it is no submodule
        self._forget()
        self.train(conv.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: (N, in_channels, H, W).
        """
        if self.same:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if learns and not torch.compiler.is_compiling():
            n, _, h, w = x.shape
            outputs = n * self.out_channels * h * w // math.prod(self.stride)
            if outputs < self.weight.numel():
                return self._norm[0].normalise(self._conv_forward(x, self.weight, self.bias))
        remembers = not (learns or torch.compiler.is_compiling() or torch.jit.is_tracing())
        weight, bias = self._remember(x) if remembers else self._product()
        return self._conv_forward(x, weight, bias)

    def plain(self) -> nn.Conv2d:
        """The same as a convolution of torch or timm, with a weight and a bias of its own."""
        shape = (self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding)
        if self.same:
            conv = Conv2dSame(*shape, self.dilation, self.groups)
        else:
            mode = {"padding_mode": self.padding_mode}
            conv = nn.Conv2d(*shape, self.dilation, self.groups, **mode)
        weight, bias = self._product()
        conv.weight, conv.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
        return conv.train(self.training)

    def _remember(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The product in the type and memory format in which the convolution of x takes it."""
        factors = [*self._parameters.values(), *self._norm[0]._buffers.values()]
        factors = [factor for factor in factors if factor is not None]
        if any(factor.is_inference() for factor in factors):  # torch does not count their changes
            return self._product()
        device = x.device.type
        casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        casts = casts and not self.leaves_autocast(x)
        dtype = torch.get_autocast_dtype(device) if casts else self.weight.dtype
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        versions = [dtype, layout, *(factor._version for factor in factors)]
        same = len(factors) == len(self._factors) and all(map(operator.is_, factors, self._factors))
        if not same or versions != self._versions:
            with torch.inference_mode(False), torch.no_grad():
                weight, bias = (value.to(dtype) for value in self._product())
                self._remembered = weight.contiguous(memory_format=layout), bias
            self._factors, self._versions = factors, versions
        return self._remembered

    def _product(self) -> tuple[torch.Tensor, torch.Tensor]:
        scale, shift = self._norm[0].scale_and_shift()
        if self.bias is not None:
            shift = shift + self.bias * scale
        weight = self.weight * scale.view(-1, 1, 1, 1)
        return weight.to(self.weight.dtype), shift.to(self.weight.dtype)

    def _forget(self) -> None:
        self._factors, self._versions, self._remembered = [], [], ()

    def train(self, mode: bool = True) -> "FoldedConv2d":
        """Set the mode, and forget the product."""
        self._forget()
        return super().train(mode)

    def _apply(self, *args, **kwargs) -> "FoldedConv2d":
        self._forget()
        return super()._apply(*args, **kwargs)
