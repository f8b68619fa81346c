"""What the tests of the backbones share: telling weights, names of parameters, closeness."""

import torch
from torch import nn


def randomise(model, seed=0):
    """Give every batch norm statistics and affine parameters of its own; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for name, low, high in (
                ("running_mean", -0.2, 0.2),
                ("running_var", 0.5, 1.5),
                ("weight", 0.5, 1.5),
                ("bias", -0.2, 0.2),
            ):
                getattr(module, name).data.uniform_(low, high, generator=generator)
    return model


def trainable(backbone):
    """Names, in the source model, of the parameters that have gradients."""
    names = {v.data_ptr(): k for k, v in backbone.state_dict().items()}
    return {
        names[p.data_ptr()].removeprefix("model.") for p in backbone.parameters() if p.requires_grad
    }


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got, expected):
    """The largest difference is below 1e-4 of the largest value."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
