"""Running and building modules on the meta device: without memory or arithmetic."""

import io
from contextlib import nullcontext, redirect_stderr
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode


def meta_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """A module's parameters and buffers as meta tensors, tied where they are tied."""
    state, made = {}, {}
    for prefix, child in module.named_modules():
        for name, tensor in [*child._parameters.items(), *child._buffers.items()]:
            if tensor is not None:
                meta = made.setdefault(id(tensor), torch.empty_like(tensor, device="meta"))
                state[f"{prefix}.{name}" if prefix else name] = meta
    return state


def run_on_meta(module: nn.Module, state: dict[str, torch.Tensor], shape: tuple[int, ...]) -> Any:
    """Run a module without memory or arithmetic.

    Args:
        module: is not touched.
        state: what :func:`meta_state` made of it. (By the name of every tensor, for
            ``functional_call`` leaves modules that have two names on the meta device if it is to
            find the second itself.)
        shape: of its input.
    """
    x = torch.empty(*shape, device="meta")
    # torch.fx prints the traceback of what fails, even where the failure is an answer
    graph = isinstance(module, fx.GraphModule)
    with torch.no_grad(), redirect_stderr(io.StringIO()) if graph else nullcontext():
        return torch.func.functional_call(module, state, (x,), tie_weights=False)


class NumbersOnCPU(TorchFunctionMode):
    """Keeps tensors made of given numbers on the CPU while a module is built on the meta device.

    Some constructors read such numbers back: those of torchvision's RegNets compute their widths
    with tensors. Others refuse to have numbers there, so that it is not for all.
    """

    makers = (torch.arange, torch.linspace, torch.tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        # where torch.tensor([]) lies is how torch finds its default device
        if func in self.makers and args != ([],) and kwargs.get("device") is None:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)
