"""Measuring levels: channels, stride and layout come from a run, not from a table."""

import pytest
import torch
from detbackbones.measure.levels import Level, last_of_each_stride, measure_shape
from detbackbones.measure.trace import trace
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
        ((2, 24, 64, 80), (24, 4, "NCHW", False)),
        ((2, 64, 80, 24), (24, 4, "NHWC", False)),
        ((2, 256, 8, 10), (256, 32, "NCHW", False)),
        ((2, 320, 24), (24, 16, "NLC", False)),
        ((2, 321, 24), None),  # with a class token
        ((2, 64, 64), None),  # no map
        ((2, 24, 64, 64), None),  # strides 4 and 5
        ((2, 24, 25, 32), None),  # 256 / 25 is not whole
        ((2, 512, 1, 1), None),
    ],
)
def test_measure_shape(shape, measured):
    assert measure_shape(torch.Size(shape), (256, 320)) == measured


@pytest.mark.parametrize(
    "shape, measured",
    [
        ((2, 24, 29, 37), (24, 8, "NCHW", True)),
        ((2, 29, 37, 24), (24, 8, "NHWC", True)),
        ((2, 24, 32, 40), (24, 8, "NCHW", False)),
        ((2, 24, 16, 80), None),  # strides 16 and 4
        ((2, 512, 1, 1), None),
    ],
)
def test_measure_shape_to_resample(shape, measured):
    assert measure_shape(torch.Size(shape), (256, 320), resample=True) == measured


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NLC"])
def test_feature_map(layout):
    expected = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    output = {
        "NCHW": expected,
        "NHWC": expected.permute(0, 2, 3, 1),
        "NLC": expected.flatten(2).transpose(1, 2),
    }[layout]
    level = Level(3, 8, layout, False, 0)
    assert torch.equal(level.feature_map(output, (32, 40)), expected)


def test_feature_map_is_resampled():
    ramp = torch.arange(5.0).expand(1, 1, 3, 5)
    level = Level(1, 8, "NCHW", True, 0)
    assert level.feature_map(ramp, (48, 80)).shape == (1, 1, 6, 10)
    assert level.feature_map(ramp, (48, 80))[0, 0, 2, 1:4].tolist() == [0.25, 0.75, 1.25]


def test_trace_measures_outputs_and_the_order_of_execution():
    found = trace(Pair())
    fine, coarse = found.levels
    assert (fine.channels, fine.stride, fine.layout) == (5, 2, "NCHW")
    assert (coarse.channels, coarse.stride, coarse.layout) == (7, 8, "NHWC")
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
