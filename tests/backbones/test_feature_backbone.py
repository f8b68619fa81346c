"""FeatureBackbone: any source, measured; a third needs nothing more."""

import copy

import pytest
import timm
import torch
from detbackbones import FeatureBackbone, TimmBackbone, TorchvisionBackbone
from detbackbones.backbones.source import Levels, Source
from detbackbones.measure.levels import select_levels
from support import assert_close, images, randomise
from torch import nn


class Extractor(nn.Module):
    """Three levels, given coarse to fine, the middle one with channels last."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.ReLU())
        self.b = nn.Conv2d(4, 6, 2, 2)
        self.c = nn.Conv2d(6, 8, 2, 2)
        self.classifier = nn.Linear(8, 10)

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        return [self.c(b), b.permute(0, 2, 3, 1), a]


NAMES = ["coarse", "middle", "fine"]


class Given(Source):
    """An extractor that is there; its levels are called by their positions."""

    level_keys = native_size = None

    def __init__(self, extractor, names, prefix="", **arguments):
        super().__init__(type(extractor).__name__, **arguments)
        self.module, self.prefix = extractor, prefix
        self.level_keys, self.native_size = range(len(names)), 256

    @classmethod
    def names(cls):
        return []

    def create(self, pretrained=False):
        return self.module if pretrained else copy.deepcopy(self.module)

    def extractor(self, model, keys):
        return model


def backbone_of(extractor, names=NAMES, *, freeze_at=0, **arguments):
    source = Given(extractor, names, **arguments)
    return FeatureBackbone(
        source, Levels(dict(enumerate(names))), pretrained=True, freeze_at=freeze_at
    )


def test_levels_are_measured_and_ordered_fine_to_coarse():
    extractor = Extractor()
    backbone = backbone_of(extractor)
    assert {n: (s.channels, s.stride) for n, s in backbone.output_shape().items()} == {
        "fine": (4, 4),
        "middle": (6, 8),
        "coarse": (8, 16),
    }
    assert backbone.size_divisibility == 16
    levels = backbone(images(2, 3, 32, 48))
    assert [(n, tuple(x.shape)) for n, x in levels.items()] == [
        ("fine", (2, 4, 8, 12)),
        ("middle", (2, 6, 4, 6)),
        ("coarse", (2, 8, 2, 3)),
    ]
    assert torch.equal(levels["middle"], extractor.b(levels["fine"]))


def test_what_no_level_needs_is_dropped():
    backbone = backbone_of(Extractor())
    assert not [key for key in backbone.state_dict() if "classifier" in key]
    assert {key.split(".")[1] for key in backbone.state_dict()} == {"a", "b", "c"}


class Tail(Extractor):
    """Runs on after its only level, whether or not it can do so on another input."""

    def __init__(self, splits):
        super().__init__()
        self.splits = splits

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        if self.splits:
            b[:, 4:].relu()[:, 1].sum()
        self.c(b)
        return [a]


@pytest.mark.parametrize("splits", [False, True])
def test_what_runs_after_the_last_level(splits):
    backbone = backbone_of(Tail(splits), ["fine"])
    assert not [key for key in backbone.state_dict() if key.startswith(("model.b.", "model.c."))]
    level = backbone(images(2, 3, 32, 32))["fine"]
    level.square().mean().backward()
    learning = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert learning == {f"model.a.{key}" for key in ("0.weight", "0.bias", "1.weight", "1.bias")}
    assert all(backbone.get_parameter(name).grad is not None for name in learning)


def test_keys_of_the_source_model():
    def build():  # an extractor that has the model under the name "0"
        return backbone_of(nn.Sequential(Extractor()), prefix="0.")

    backbone = build()
    state = backbone.state_dict()
    assert "model.b.weight" in state and "model.0.b.weight" not in state
    assert "model.a.0.weight" in state

    inside = nn.Sequential(backbone)
    assert "0.model.c.bias" in inside.state_dict()
    twin = nn.Sequential(build())
    given = inside.state_dict()
    result = twin.load_state_dict(given)
    assert not result.missing_keys and not result.unexpected_keys
    assert "0.model.c.bias" in given  # the caller's dictionary is not renamed
    assert torch.equal(twin[0].model.b.weight, backbone.model.b.weight)


def test_load_source_counts_what_fits():
    backbone = backbone_of(Extractor())
    source = Extractor().state_dict()
    part, wanting = backbone.load_source(source)
    assert part.fitting == 10 and not part.prefix and not wanting
    assert torch.equal(backbone.model.c.weight, source["c.weight"])
    source["c.weight"] = torch.zeros(1)
    del source["a.0.bias"], source["a.1.num_batches_tracked"]
    part, wanting = backbone.load_source(source)
    assert part.fitting == 8 and wanting == ["a.0.bias", "c.weight"]


def test_layers_that_the_source_has_not_are_refused():
    source = Extractor().state_dict()
    backbone = backbone_of(Extractor())
    assert backbone.load_source({**source, "other.weight": torch.zeros(1)})[1] == []
    with pytest.raises(ValueError, match="no a.3.weight"):
        backbone.load_source({**source, "a.3.weight": torch.zeros(1)})


def test_frozen_modules_stay_in_eval_mode():
    backbone = backbone_of(Extractor(), freeze_at=2)
    for mode in (True, False, True):
        assert backbone.train(mode) is backbone
        assert not backbone.model.a.training and backbone.model.b.training is mode
    assert backbone.eval().model.c.training is False
    assert [n for n, p in backbone.named_parameters() if not p.requires_grad] == [
        "model.a.0.weight",
        "model.a.0.bias",
    ]


def test_other_numbers_of_input_channels():
    backbone = backbone_of(
        nn.Sequential(nn.Conv2d(2, 4, 2, 2), nn.Unflatten(0, (1, -1))), ["x"], in_channels=2
    )
    assert backbone.output_shape()["x"].channels == 4


@pytest.mark.parametrize(
    "asked, given",
    [
        (None, ["res2", "res3", "res5"]),
        (["res5", "res2"], ["res2", "res5"]),
        (("res1",), ["res1"]),
    ],
)
def test_select_levels(asked, given):
    assert select_levels(asked, ["res1", "res2", "res3", "res5", "res6"]) == given


class Net(nn.Module):
    """A user's own model: a stem, two stages, a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 4, 4), nn.BatchNorm2d(4), nn.ReLU())
        self.stage1 = nn.Conv2d(4, 6, 2, 2)
        self.stage2 = nn.Conv2d(6, 8, 2, 2)
        self.classifier = nn.Linear(8, 10)

    def forward(self, x):
        return self.classifier(self.stage2(self.stage1(self.stem(x))).mean((2, 3)))


def test_from_module():
    net = Net().eval()
    backbone = FeatureBackbone.from_module(
        net, {"stage1": "res3", "stem": "res2"}, in_channels=1, norm="FrozenBN", freeze_at=2
    ).eval()
    assert {n: (s.channels, s.stride) for n, s in backbone.output_shape().items()} == {
        "res2": (4, 4),
        "res3": (6, 8),
    }
    assert backbone.size_divisibility == 8
    x = images(1, 1, 24, 40)
    levels = backbone(x)
    assert torch.allclose(levels["res2"], net.stem(x), atol=1e-6)
    assert torch.allclose(levels["res3"], net.stage1(net.stem(x)), atol=1e-6)
    assert {k.split(".")[1] for k in backbone.state_dict()} == {"stem", "stage1"}
    assert {n for n, p in backbone.named_parameters() if p.requires_grad} == {
        "model.stage1.weight",
        "model.stage1.bias",
    }
    # the user's module is as it was
    assert isinstance(net.classifier, nn.Linear) and isinstance(net.stem[1], nn.BatchNorm2d)
    assert all(p.requires_grad for p in net.parameters())
    net.stem[0].weight.data.zero_()
    assert backbone.load_source(net.state_dict())[1] == []
    assert backbone.state_dict()["model.stem.0.weight"].eq(0).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layers": ["stage3"]}, "layers='stage3' is unknown: valid are .*'stage2'"),
        ({"layers": ["classifier"]}, r"layers='classifier' gives \(2, 10\), not one feature map"),
        ({"layers": ["stage2"], "freeze_at": 2}, "freeze_at=2 needs a level of stride 4 or less"),
        ({"layers": ["stage2"], "freeze_at": 7}, "freeze_at=7 is out of range"),
        ({"layers": ["stage2"], "freeze_at": "2"}, "freeze_at='2' is out of range"),
        ({"layers": ["stage2"], "img_size": 0}, "img_size=0 must be a whole number from 1"),
        ({"layers": ["stage2"], "norm": "GN"}, "norm='GN' is unknown"),
    ],
)
def test_from_module_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureBackbone.from_module(Net(), in_channels=1, **arguments)


def test_a_checkpoint_of_another_module(tmp_path):
    torch.save(Extractor().state_dict(), tmp_path / "other.pth")
    backbone = FeatureBackbone.from_module(Net(), ["stage2"], in_channels=1)
    with pytest.raises(ValueError, match="checkpoint_path='.*other.pth' is not of Net: 0 of 10"):
        backbone.load_checkpoint(str(tmp_path / "other.pth"))
    torch.save(Net().state_dict(), tmp_path / "own.pth")
    backbone.load_checkpoint(str(tmp_path / "own.pth"))
    weight = torch.load(tmp_path / "own.pth")["stage2.weight"]
    assert torch.equal(backbone.state_dict()["model.stage2.weight"], weight)


def test_a_module_is_not_kept_beside_the_backbone():
    backbone = FeatureBackbone.from_module(Net(), ["stage2"], in_channels=1)
    assert all(p.is_meta for p in backbone.source.create().parameters())


@pytest.mark.parametrize("kind, name", [(TimmBackbone, "resnet18"), (TorchvisionBackbone, "vgg11")])
def test_parameters_have_the_names_of_the_state_dict(kind, name):
    backbone = kind(name)
    names = [key for key, _ in backbone.named_parameters()]
    assert names == [key for key in backbone.state_dict() if key in set(names)]
    assert {key.removeprefix("model.") for key in names} <= backbone.source.state_names


def calls_of(monkeypatch, build):
    """How often timm builds a model while a function runs, and what the function gives."""
    create, names = timm.create_model, []
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: names.append(a) or create(*a, **k))
    return build(), names


def test_a_model_is_built_once_on_meta_and_once_for_real(monkeypatch):
    backbone, calls = calls_of(monkeypatch, lambda: TimmBackbone("resnet18", freeze_at=2))
    assert len(calls) == 2
    assert backbone.pixel_mean and backbone.parameter_depths() is not None
    assert backbone.no_weight_decay() == set()
    backbone.load_source(timm.models.resnet18().state_dict())
    assert len(calls) == 2


class Detour(Extractor):
    """A branch that is used before the last level, and on which no level depends."""

    def __init__(self, overwrites):
        super().__init__()
        self.overwrites = overwrites
        self.branch = nn.Conv2d(4, 6, 2, 2)

    def forward(self, x):
        a = self.a(x)
        if self.overwrites:
            self.branch(a).mul_(2)  # of what, if the branch were an Identity?
        else:
            self.branch(a)
        b = self.b(a)
        b[:, 0].add_(self.c.bias[0])  # through a view
        return [b]


@pytest.mark.parametrize("overwrites", [False, True])
def test_what_feeds_no_level_is_dropped(overwrites):
    extractor = Detour(overwrites)
    x = images(2, 3, 32, 32)
    expected = extractor(x)[0].detach()
    backbone = backbone_of(extractor, ["fine"])
    assert {key.split(".")[1] for key in backbone.state_dict()} == {"a", "b", "c"}
    level = backbone(x)["fine"]
    assert_close(level, expected)
    level.square().mean().backward()
    learning = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert "model.c.bias" in learning and "model.c.weight" not in learning
    assert all(backbone.get_parameter(name).grad is not None for name in learning)


@pytest.mark.parametrize(
    "name, arguments, channels_last",
    [
        ("resnet18", {}, True),
        ("resnet18", {"norm": "FrozenBN"}, True),
        ("resnet18", {"channels_last": False}, False),
        ("convnext_atto", {}, False),
        ("convnext_atto", {"channels_last": True}, True),
        ("vit_tiny_patch16_224", {}, False),
        ("resnest14d", {"norm": "FrozenBN"}, False),
        ("repvgg_a0", {}, False),
        ("repvgg_a0", {"channels_last": True}, False),  # oneDNN would write beyond its memory
    ],
)
def test_memory_format(name, arguments, channels_last):
    formats = []
    backbone = TimmBackbone(name, **arguments)
    convolution = next(m for m in backbone.modules() if isinstance(m, nn.Conv2d))
    convolution.register_forward_hook(
        lambda _, inputs, __: formats.append(
            inputs[0].is_contiguous(memory_format=torch.channels_last)
        )
    )
    x = images(1, 3, 64, 64)
    assert x.is_contiguous()
    backbone(x)
    assert formats == [channels_last]
    for moved in (backbone, backbone.double(), copy.deepcopy(backbone)):
        for module in moved.modules():
            if isinstance(module, nn.Conv2d):
                layout = torch.channels_last if channels_last else torch.contiguous_format
                assert module.weight.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    "kind, name", [(TimmBackbone, "resnet18"), (TorchvisionBackbone, "vit_b_16")]
)
def test_gradient_checkpointing_of_a_folded_backbone(kind, name):
    gradients = []
    for arguments in ({}, {"grad_checkpointing": True}):
        torch.manual_seed(0)
        backbone = kind(name, norm="FrozenBN", freeze_at=1, **arguments)
        backbone = copy.deepcopy(backbone).train()
        levels, kept = run_and_count(backbone, images(2, 3, 64, 64))
        sum(level.square().mean() for level in levels.values()).backward()
        gradients.append({k: p.grad for k, p in backbone.named_parameters() if p.requires_grad})
        gradients[-1]["saved"] = kept
    plain, checkpointed = gradients
    assert checkpointed.pop("saved") < plain.pop("saved") / 2
    assert plain.keys() == checkpointed.keys() and plain
    for key, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[key]), key


@pytest.mark.parametrize(
    "kind, name, arguments",
    [
        (TimmBackbone, "efficientnet_b0", {"norm": "FrozenBN"}),
        (TimmBackbone, "mobilenetv3_small_100", {"norm": "FrozenBN", "freeze_at": 1}),
        (TorchvisionBackbone, "vgg11_bn", {"norm": "FrozenBN"}),
        (TorchvisionBackbone, "vgg11_bn", {"freeze_at": 2}),
        (TorchvisionBackbone, "mnasnet0_5", {"norm": "FrozenBN"}),
    ],
)
def test_gradient_checkpointing_of_activations_in_place_after_folded_norms(kind, name, arguments):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = kind(name, grad_checkpointing=checkpointing, **arguments).train()
        torch.manual_seed(1)
        sum(m.square().mean() for m in backbone(images(2, 3, 64, 64)).values()).backward()
        gradients.append([p.grad for p in backbone.parameters() if p.requires_grad])
    assert gradients[0]
    torch.testing.assert_close(gradients[1], gradients[0])


def run_and_count(backbone, x):
    """The levels, and how many tensors are saved for the backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        levels = backbone(x)
    return levels, len(kept)


@pytest.mark.parametrize("key", ["fold", "compile", "grad_checkpointing", "channels_last"])
def test_switches_are_on_or_off(key):
    with pytest.raises(ValueError, match=f"{key}='no' is unknown: valid are .*True.*False"):
        TimmBackbone("resnet18", **{key: "no"})


def test_gradient_checkpointing_with_nothing_to_gain():
    with pytest.raises(ValueError, match="grad_checkpointing=True has no effect"):
        TimmBackbone("resnet18", freeze_at=5, grad_checkpointing=True)
    with pytest.raises(ValueError, match="compile=True and grad_checkpointing=True cannot be"):
        TimmBackbone("resnet18", compile=True, grad_checkpointing=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, arguments",
    [
        (TimmBackbone, {"model_name": "test_efficientnet"}),
        (TimmBackbone, {"model_name": "test_efficientnet", "layers": ["blocks.1", "blocks.3"]}),
        (TimmBackbone, {"model_name": "test_vit"}),
        (TorchvisionBackbone, {"model_name": "resnet18"}),
    ],
)
def test_compiled(kind, arguments, monkeypatch):
    compile_module = nn.Module.compile
    used = []

    def compile_without_a_compiler(module, **kwargs):  # the code of inductor takes minutes to build
        used.append(kwargs)
        compile_module(module, backend="aot_eager", **kwargs)

    monkeypatch.setattr(nn.Module, "compile", compile_without_a_compiler)
    torch._dynamo.reset()
    plain = kind(**arguments, norm="FrozenBN")
    compiled = kind(**arguments, norm="FrozenBN", compile=True)
    assert used == [{"dynamic": True}]
    compiled.load_state_dict(plain.state_dict())
    for size in (64, 96):
        x = images(2, 3, size, size)
        for learns in (False, True):
            with torch.set_grad_enabled(learns):
                expected, got = plain.train(learns)(x), compiled.train(learns)(x)
            for level, output in got.items():
                assert_close(output, expected[level])
    sum(level.mean() for level in got.values()).backward()
    assert all(p.grad is not None for p in compiled.parameters())


@pytest.mark.parametrize("kind", [TimmBackbone, TorchvisionBackbone])
@torch.no_grad()
def test_a_copy_is_in_the_same_mode(kind):
    """A copied GraphModule would be in training mode, and its batch norm compute otherwise."""
    backbone = randomise(kind("resnet18")).eval()
    detector = copy.deepcopy(nn.Sequential(backbone).eval())
    assert not any(module.training for module in detector.modules())
    x = images(1, 3, 64, 64)
    for got, expected in zip(detector(x).values(), backbone(x).values(), strict=True):
        assert torch.equal(got, expected)
