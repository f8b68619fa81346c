"""Measuring levels: channels, stride and layout come from a run, not from a table."""

import pytest
import torch
from detbackbones.levels import last_of_each_stride, measure_shape, trace
from torch import nn


class Pair(nn.Module):
    """A stem of stride 2, and a level of stride 8 that is given with channels last."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 2, 2), nn.BatchNorm2d(5), nn.ReLU(inplace=True))
        self.late = nn.Conv2d(5, 7, 4, 4)
        self.unused = nn.Conv2d(7, 9, 1)

    def forward(self, x):
        fine = self.stem(x)
        return {"fine": fine, "coarse": self.late(fine).permute(0, 2, 3, 1)}


class Outputs(nn.Sequential):
    """A sequence whose only output is its last."""

    def forward(self, x):
        return [super().forward(x)]


@pytest.mark.parametrize(
    "shape, measured",
    [
        ((2, 24, 64, 80), (24, 4, False)),
        ((2, 64, 80, 24), (24, 4, True)),
        ((2, 256, 8, 10), (256, 32, False)),
        ((2, 64, 64), None),  # no map
        ((2, 24, 64, 64), None),  # strides 4 and 5
        ((2, 24, 25, 32), None),  # 256 / 25 is not whole
        ((2, 512, 1, 1), None),
    ],
)
def test_measure_shape(shape, measured):
    assert measure_shape(torch.Size(shape), (256, 320)) == measured


def test_trace_measures_outputs_and_the_order_of_execution():
    found = trace(Pair())
    fine, coarse = found.levels
    assert (fine.channels, fine.stride, fine.channels_last) == (5, 2, False)
    assert (coarse.channels, coarse.stride, coarse.channels_last) == (7, 8, True)
    assert "unused.weight" not in found.parameters
    assert found.parameters["stem.1.bias"] <= fine.end < found.parameters["late.weight"]
    assert found.modules["stem"] <= fine.end < found.modules["late"] <= coarse.end


def test_trace_leaves_the_module_as_it_was():
    model = Pair().train()
    model.stem.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trace(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.training and model.late.training and not model.stem[1].training
    assert not any(module._forward_hooks for module in model.modules())
    assert model.late.weight.device.type == "cpu"


def test_trace_takes_images_of_other_channels():
    assert trace(Outputs(nn.Conv2d(1, 4, 2, 2)), in_channels=1).levels[0].channels == 4


def test_trace_refuses_what_is_no_feature_map():
    model = Outputs(nn.Conv2d(3, 8, 2, 2), nn.AdaptiveAvgPool2d(1))
    with pytest.raises(ValueError, match=r"shape \(2, 8, 1, 1\) .* 256x320"):
        trace(model)


def test_last_of_each_stride():
    levels = trace(Pair()).levels
    assert last_of_each_stride([levels[0], levels[0], levels[1]]) == {"res1": 1, "res3": 2}
    assert last_of_each_stride(levels[::-1]) == {"res1": 1, "res3": 0}
