"""Which tensors of a state dict fit a module, and which are wanting."""

from collections.abc import Collection, Iterable, Mapping

import torch


class OtherModelError(ValueError):
    """The weights are of another model: they have a layer or a token that this one has not."""


def fitting(
    state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Those tensors of a state dict that have the name and the shape of one of ``own``.

    Raises:
        ValueError: if one of them is of another kind of number, such as whole numbers for weights,
            or has values that are not finite where ``own`` has.
    """
    found = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    for name, tensor in found.items():
        if is_counter(name):  # averaged, it is a fraction
            continue
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise ValueError(f"tensor {name!r} of the checkpoint must be dense, and hold values")
        kinds = [(t.is_floating_point(), t.is_complex()) for t in (tensor, own[name])]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"tensor {name!r} of the checkpoint is of {tensor.dtype}, and must be of "
                f"{own[name].dtype}"
            )
        small = tensor.is_floating_point() and tensor.itemsize == 1  # of which torch knows little
        wrong = ~(tensor.float() if small else tensor).isfinite()
        if wrong.any() and (wrong & own[name].to(wrong.device).isfinite()).any():
            raise ValueError(
                f"tensor {name!r} of the checkpoint has {wrong.sum()} values that are not finite, "
                f"of {tensor.numel()}"
            )
    return found


def is_counter(name: str) -> bool:
    """Whether a tensor counts batches: timm and torchvision keep it, but nothing depends on it."""
    return name.endswith("num_batches_tracked")


def unloaded(own: Iterable[str], loaded: Collection[str]) -> list[str]:
    """Names of ``own`` that are not among those loaded; counters of batches do not count."""
    return [name for name in own if name not in loaded and not is_counter(name)]
