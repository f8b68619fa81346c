"""A folded norm computes the same, learns the same and is saved the same; what cannot be is not."""

import copy

import pytest
import torch
from detbackbones import TimmBackbone, TorchvisionBackbone
from detbackbones.adapt.fold import fold_norms
from detbackbones.adapt.folded_conv import FoldedConv2d
from detbackbones.adapt.norm import convert_norm
from detbackbones.measure.trace import trace
from support import assert_close, images, randomise
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False),
    "with a bias": lambda: nn.Conv2d(4, 8, 2, stride=2),
    "grouped and dilated": lambda: nn.Conv2d(4, 8, 3, 2, padding=2, dilation=2, groups=4),
    "padded by reflection": lambda: nn.Conv2d(4, 8, 3, 2, padding=1, padding_mode="reflect"),
    "padded as TensorFlow does": lambda: Conv2dSame(4, 8, 3, stride=2),
}
NORMS = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(8, eps=0.1),
    "BatchNormAct2d": lambda: BatchNormAct2d(8, act_layer="silu"),
    "not affine": lambda: nn.BatchNorm2d(8, affine=False),
}


class Maps(nn.Module):
    """A net with one feature map, the output of the last of its modules."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        for module in self.children():
            x = module(x)
        return [x]


def frozen(model):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in module.state_dict().values():
                    if tensor.is_floating_point():
                        tensor.copy_(images(*tensor.shape).abs() + 0.5)
    return convert_norm(model, "FrozenBN")


def fold(model, in_channels=4):
    followed_by = trace(model, in_channels, (64, 64)).followed_by
    return fold_norms(model, followed_by, (1, in_channels, 64, 64))


@pytest.mark.parametrize("conv", CONVOLUTIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_folded_is_the_same(conv, norm):
    model = frozen(Maps(conv=CONVOLUTIONS[conv](), norm=NORMS[norm]()))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = images(2, 4, 32, 32)
    expected = model(x)[0]
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    assert fold(model) == ["conv"] and type(model.conv) is FoldedConv2d
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    model.train()
    got = model(x)[0]
    assert_close(got, expected)
    got.square().sum().backward()
    assert dict(model.named_parameters()).keys() == gradients.keys()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name])
    with torch.no_grad():
        assert_close(model.eval()(x)[0], expected)


class ReadTwice(Maps):
    def forward(self, x):
        x = self.conv(x)
        return [self.norm(x) + x]


class RunTwice(Maps):
    def forward(self, x):
        return [self.norm(self.conv(x)), self.conv(x[..., ::2, ::2])]


class NormTwice(Maps):
    def forward(self, x):
        return [self.norm(self.conv(x)) + self.norm(self.other(x))]


class LevelBetween(Maps):
    def forward(self, x):
        x = self.conv(x)
        return [x, self.norm(x)[..., ::2, ::2]]


class ViewBetween(Maps):
    def forward(self, x):
        return [self.norm(self.conv(x).transpose(2, 3)).transpose(2, 3)]


@pytest.mark.parametrize("kind", [ReadTwice, RunTwice, NormTwice, LevelBetween, ViewBetween])
def test_what_else_depends_on_the_convolution_prevents_it(kind):
    make = CONVOLUTIONS["plain"]
    model = frozen(kind(conv=make(), other=make(), norm=NORMS["BatchNorm2d"]()))
    assert fold(model) == []


@pytest.mark.parametrize(
    "modules, folded",
    [
        (lambda: dict(a=CONVOLUTIONS["plain"](), drop=nn.Dropout(0.5), b=nn.BatchNorm2d(8)), []),
        (lambda: dict(a=nn.BatchNorm2d(4), b=CONVOLUTIONS["plain"]()), []),
        (lambda: dict(a=CONVOLUTIONS["plain"](), b=nn.ReLU(), c=nn.BatchNorm2d(8)), []),
        (lambda: dict(a=nn.ConvTranspose2d(4, 8, 1), b=nn.BatchNorm2d(8), c=nn.MaxPool2d(2)), []),
        (
            lambda: dict(
                a=nn.Sequential(CONVOLUTIONS["plain"]()), b=nn.Sequential(nn.BatchNorm2d(8))
            ),
            ["a.0"],
        ),
    ],
)
def test_only_what_directly_follows(modules, folded):
    assert fold(frozen(Maps(**modules()))) == folded


def test_norms_that_learn_are_not_folded():
    model = Maps(conv=CONVOLUTIONS["plain"](), norm=nn.BatchNorm2d(8))
    assert fold(model) == []


def test_a_fold_that_changes_the_output_is_undone():
    model = frozen(
        Maps(
            a=CONVOLUTIONS["plain"](),
            b=nn.BatchNorm2d(8),
            c=nn.ReLU(),
            d=nn.Conv2d(8, 8, 1),
            e=nn.BatchNorm2d(8),
        )
    )
    x = images(2, 4, 32, 32)
    expected = model(x)[0]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert fold_norms(model, {"a": "e", "d": "b"}, (1, 4, 64, 64)) == []
    assert torch.equal(model(x)[0], expected)
    assert fold_norms(model, {"a": "e"}, (1, 4, 64, 64)) == []
    assert fold_norms(model, {"a": "b", "d": "e"}, (1, 4, 64, 64)) == ["a", "d"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


CHANGES = {
    "a step of the weight": lambda m: m.conv.weight.add_(1),
    "loading": lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}),
    "loading by assignment": lambda m: m.load_state_dict(
        {k: v + 1 for k, v in m.state_dict().items()}, assign=True
    ),
    "the norm's statistics": lambda m: m.norm.running_var.mul_(2),
    "the norm's shift": lambda m: m.norm.bias.add_(1),
    "moving": lambda m: m.double(),
    "data, and then eval()": lambda m: (m.conv.weight.data.add_(1), m.eval()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_product_is_remembered_until_something_changes(change):
    model = frozen(Maps(conv=CONVOLUTIONS["with a bias"](), norm=NORMS["BatchNorm2d"]()))
    x = images(2, 4, 32, 32)
    with torch.no_grad():
        plain = copy.deepcopy(model).eval()
        fold(model)
        before = model(x)[0]
        product = model.conv._remembered[0]
        model(x)
        assert model.conv._remembered[0] is product
        for m in (plain, model):
            CHANGES[change](m)
        x = x.to(model.conv.weight.dtype)
        assert_close(model(x)[0], plain(x)[0])
        assert change == "moving" or not torch.equal(model(x)[0], before)


def test_a_frozen_convolution_remembers_while_training():
    model = frozen(Maps(conv=CONVOLUTIONS["plain"](), norm=nn.BatchNorm2d(8)))
    fold(model)
    x = images(2, 4, 32, 32)
    model.train()(x)
    assert model.conv._remembered == ()
    model.requires_grad_(False)
    model(x)
    product = model.conv._remembered[0]
    assert not model(x)[0].requires_grad and model.conv._remembered[0] is product


def test_inference_mode_leaves_a_model_that_learns():
    model = frozen(Maps(conv=CONVOLUTIONS["plain"](), norm=nn.BatchNorm2d(8)))
    fold(model)
    model.conv.requires_grad_(False)
    x = images(2, 4, 32, 32).requires_grad_()
    with torch.inference_mode():
        model(x)
    model(x)[0].sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_copy_is_a_model_of_its_own():
    model = frozen(Maps(conv=CONVOLUTIONS["plain"](), norm=nn.BatchNorm2d(8)))
    fold(model)
    x = images(2, 4, 32, 32)
    expected = model(x)[0]
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.norm.bias.add_(1)
        other.conv.weight.mul_(2)
    assert torch.equal(model(x)[0], expected)
    assert_close(other(x)[0], 2 * expected - 2 * shift(model) + shift(other))


def shift(model):
    return model.norm.scale_and_shift()[1].view(-1, 1, 1)


@pytest.mark.parametrize("norm", NORMS)
def test_autocast(norm):
    model = frozen(Maps(conv=CONVOLUTIONS["with a bias"](), norm=NORMS[norm]()))
    x = images(2, 4, 32, 32)
    expected = model(x)[0]
    fold(model)
    for learns in (False, True):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(learns):
            got = model(x)[0]
        assert got.dtype == torch.bfloat16
        assert (got - expected).abs().max() < 0.02 * expected.abs().max()
    assert_close(model(x)[0], expected)  # in float32 again


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half(dtype):
    model = frozen(Maps(conv=CONVOLUTIONS["plain"](), norm=nn.BatchNorm2d(8)))
    x = images(2, 4, 32, 32)
    expected = model(x)[0]
    fold(model)
    with torch.no_grad():
        got = model.to(dtype)(x.to(dtype))[0]
    assert got.dtype == dtype and (got - expected).abs().max() < 0.02 * expected.abs().max()


FOLDED = [
    (TimmBackbone, "resnet18", {"norm": "FrozenBN"}, 20),
    (TimmBackbone, "resnet18", {"norm": "FrozenBN", "out_features": ["res3"]}, 10),
    (TimmBackbone, "resnet18", {"freeze_at": 2}, 5),
    (TimmBackbone, "tf_efficientnet_b0", {"norm": "FrozenBN"}, 48),
    (TimmBackbone, "densenet121", {"norm": "FrozenBN"}, 59),
    (TimmBackbone, "resnet18", {"norm": "FrozenBN", "layers": ["layer1", "layer3"]}, 15),
    (TimmBackbone, "resnet18", {"norm": "FrozenBN", "layers": ["layer1.0.conv1", "layer2"]}, 9),
    (TimmBackbone, "convnext_atto", {"norm": "FrozenBN"}, 0),
    (TimmBackbone, "resnet18", {"norm": "FrozenBN", "fold": False}, 0),
    (TimmBackbone, "resnet18", {"norm": "SyncBN"}, 0),
    (TorchvisionBackbone, "resnet18", {"norm": "FrozenBN"}, 20),
    (TorchvisionBackbone, "mobilenet_v3_small", {"norm": "FrozenBN"}, 34),
]


@pytest.mark.parametrize("kind, name, arguments, count", FOLDED)
def test_backbones(kind, name, arguments, count):
    torch.manual_seed(0)
    plain = randomise(kind(name)).eval()
    weights = {k.removeprefix("model."): v for k, v in plain.state_dict().items()}
    backbone = kind(name, **arguments)
    backbone.load_source(weights)
    assert sum(type(module) is FoldedConv2d for module in backbone.modules()) == count
    x = images(1, 3, 64, 64)
    expected = plain(x)
    for name, output in backbone.eval()(x).items():
        if name in expected:
            assert_close(output, expected[name])


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("make", [TimmBackbone, TorchvisionBackbone])
def test_a_traced_backbone_is_right(make, seen):
    """While torch.jit traces, no product is remembered: it would be no constant of the trace."""
    backbone = make("resnet18", norm="FrozenBN", freeze_at=2).eval()
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        if seen:
            backbone(x)
        traced = torch.jit.trace(backbone, x, strict=False)
        got, wanted = traced(2 * x), backbone(2 * x)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
