"""Outputs of named modules: what hooks on the whole model see, and no more of it than is needed."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from detbackbones import FeatureBackbone
from detbackbones.measure.layers import LayerExtractor, check_layers
from support import assert_close, images, randomise
from torch import nn


class Down(nn.Conv2d):
    """A layer whose only tensor is in a dictionary."""

    def forward(self, x):
        return {"map": super().forward(x), "mask": None}


class Net(nn.Module):
    """A model of a user's own, with most of what can go wrong in it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 4, 4)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Identity()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.down = Down(4, 6, 2, 2)
        self.aux = nn.Conv2d(6, 6, 1)
        self.classifier = nn.Linear(6 * 7 * 7, 10)

    def forward(self, x):
        x = self.drop(self.act(self.stem(x)))
        x = F.dropout(x, 0.5, self.training, inplace=True)
        tokens = x.flatten(2).transpose(1, 2)
        x = x + self.attention(tokens, tokens, tokens)[0].mT.unflatten(2, x.shape[2:])
        return self.classifier(self.down(x)["map"].flatten(1))


OPTIONS = {
    "swin_tiny_patch4_window7_224": {"strict_img_size": False},
    "vit_tiny_patch16_224": {"dynamic_img_size": True},
    "tv:googlenet": {"init_weights": False},
}


def build(name):
    """A timm model, a torchvision model ("tv:...") or the model above ("Net")."""
    torch.manual_seed(0)
    if name == "Net":
        return Net().eval()
    create = torchvision.models.get_model if name.startswith("tv:") else timm.create_model
    return randomise(create(name.removeprefix("tv:"), **OPTIONS.get(name, {}))).eval()


# model, layers with their channels and strides, parts that the backbone of them does not have
MODELS = [
    ("resnet18", {"layer2": (128, 8), "layer1": (64, 4)}, ["layer3", "layer4", "fc"]),
    ("tv:resnet18", {"layer1.0.conv2": (64, 4), "layer3": (256, 16)}, ["layer4", "fc"]),
    ("convnext_atto", {"stages.1": (80, 8), "stages.0": (40, 4)}, ["stages.2", "stages.3", "head"]),
    (
        "densenet121",
        {"features.denseblock1": (256, 4), "features.transition2.conv": (256, 8)},
        ["features.denseblock3", "features.denseblock4", "features.norm5", "classifier"],
    ),
    # what follows norm5 overwrites its output, but no longer runs
    ("tv:densenet121", {"features.norm5": (1024, 32)}, ["classifier"]),
    (
        "swin_tiny_patch4_window7_224",  # channels last
        {"layers.0": (96, 4), "layers.1.blocks.1": (192, 8)},
        ["layers.2", "layers.3", "head"],
    ),
    (
        "mobilenetv3_small_050",
        {"blocks.0": (8, 4), "blocks.2": (24, 16)},
        ["blocks.3", "blocks.4", "blocks.5", "conv_head", "classifier"],
    ),
    (
        "efficientnet_b0",
        {"blocks.1": (24, 4), "blocks.2": (40, 8)},
        ["blocks.3", "blocks.6", "conv_head", "bn2", "classifier"],
    ),
    ("vit_tiny_patch16_224", {"patch_embed": (192, 16)}, ["blocks", "norm", "head"]),
    ("Net", {"down": (6, 8), "act": (4, 4)}, ["aux", "classifier"]),
]


def hooked(model, layers, x):
    """Copies of the layers' outputs in a run of the whole model."""
    outputs = {}

    def keep(name, output):
        outputs[name] = (output["map"] if isinstance(output, dict) else output).clone()

    for name in layers:
        model.get_submodule(name).register_forward_hook(lambda *io, name=name: keep(name, io[-1]))
    try:
        model(x)
    except RuntimeError:  # the classifier of Net takes one size of images
        assert len(outputs) == len(layers)
    return [outputs[name] for name in layers]


@pytest.mark.parametrize("name, layers, gone", MODELS)
def test_outputs_are_those_of_the_whole_model(name, layers, gone):
    model, x = build(name), images(2, 3, 64, 96)
    assert check_layers(model, list(layers)) == {layer: layer for layer in layers}
    outputs = LayerExtractor(model, layers)(x)
    assert all(map(torch.equal, outputs, hooked(copy.deepcopy(model), layers, x)))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name, layers, gone", MODELS)
def test_a_backbone_measures_the_layers_and_drops_what_follows(name, layers, gone):
    model, x = build(name), images(2, 3, 64, 96)
    outputs = dict(zip(layers, LayerExtractor(model, layers)(x)))
    keys = model.state_dict().keys()
    backbone = FeatureBackbone.from_module(model, list(layers)).eval()
    measured = {n: (spec.channels, spec.stride) for n, spec in backbone.output_shape().items()}
    assert measured == layers
    for layer, level in backbone(x).items():
        assert level.shape[1:] == (layers[layer][0], 64 // layers[layer][1], 96 // layers[layer][1])
        as_given = level if level.shape == outputs[layer].shape else level.permute(0, 2, 3, 1)
        assert_close(as_given, outputs[layer])
    left = {key.removeprefix("model.") for key in backbone.state_dict()}
    assert left < keys
    assert not [key for key in left if key.startswith(tuple(f"{part}." for part in gone))]
    assert all(any(key.startswith(f"{part}.") for key in keys) for part in gone)


def test_what_follows_in_the_same_part_is_dropped():
    part = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 8, 2, 2))
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), part)
    backbone = FeatureBackbone.from_module(model, {"0": "conv", "1.0": "relu"})
    assert isinstance(part[1], nn.Conv2d) and model[0].weight.requires_grad
    assert not [key for key in backbone.state_dict() if key.startswith("model.1.1")]
    assert not any(module._forward_hooks for module in model.modules())
    assert backbone(images(2, 3, 64, 96))["relu"].shape == (2, 4, 16, 24)


def test_a_copy_runs_its_own_modules():
    extractor, x = LayerExtractor(build("resnet18"), ["layer1"]), images(2, 3, 64, 96)
    before = extractor(x)[0]
    twin = copy.deepcopy(extractor)
    with torch.no_grad():
        for parameter in extractor.parameters():
            parameter.zero_()
    assert torch.equal(twin(x)[0], before)
    assert not extractor(x)[0].any()


def test_the_run_ends_with_the_last_layer():
    model = build("resnet18")
    ran = []
    for name, module in model.named_children():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    assert LayerExtractor(model, ["layer2", "layer1"])(images(2, 3, 64, 96))[0].shape[1] == 128
    assert ran[-1] == "layer2"
    model.layer3 = None  # which cannot be called
    LayerExtractor(model, ["layer2"])(images(2, 3, 64, 96))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_whole_model(checkpointing):
    """Also under checkpointing, which runs modules again, here with the last layer in its span."""
    layers, x = ["stages.1", "stages.2.blocks.3"], images(2, 3, 64, 96)
    model = build("convnext_atto").train()
    plain = copy.deepcopy(model)
    model.set_grad_checkpointing(checkpointing)
    for outputs in (LayerExtractor(model, layers)(x), hooked(plain, layers, x)):
        sum(output.square().sum() for output in outputs).backward()
    gradients = dict(plain.named_parameters())
    assert model.stem[0].weight.grad.any()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (gradients[name].grad is None)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, gradients[name].grad)


def test_autocast_and_inference_mode():
    extractor, x = LayerExtractor(build("resnet18"), ["layer1"]), images(2, 3, 64, 96)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        output = extractor(x)[0]
    assert output.is_inference() and output.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name, layers, training",
    [
        ("tv:resnet18", ["layer1.0.bn1", "layer1"], False),  # an activation in place
        ("resnet18", ["layer1.0.bn2", "layer1"], False),  # the shortcut is added in place
        ("tv:densenet121", ["features.norm0", "features.denseblock1"], False),
        ("Net", ["drop", "down"], True),  # dropout in place; "drop" gives the very input it takes
    ],
)
def test_an_output_that_is_overwritten_is_refused(name, layers, training):
    model, x = build(name), images(2, 3, 64, 96)
    with pytest.raises(ValueError, match=f"layers='{layers[0]}' is overwritten by an in-place"):
        LayerExtractor(model.train(training), layers)(x)
    LayerExtractor(model, layers[:1])(x)
    if not training:
        with pytest.raises(ValueError, match="overwritten"):
            FeatureBackbone.from_module(model, layers)


@pytest.mark.parametrize(
    "name, layers, sentence",
    [
        ("resnet18", [], r"layers=\[\] must be a list of different names of modules, or a mapping"),
        ("resnet18", "layer1", "layers='layer1' must be a list"),
        ("resnet18", ["layer1", "layer1"], "must be a list of different names"),
        ("resnet18", {"layer1": "a", "layer2": "a"}, "different names of outputs"),
        ("resnet18", ["layer5"], "layers='layer5' is unknown: the nearest are 'layer4', 'layer3'"),
        ("resnet18", [""], "layers='' is unknown"),
        (
            "resnet18",
            ["fc"],
            r"layers='fc' gives \(2, 1000\), not one feature map \(N, C, H, W\) or",
        ),
        ("tv:resnet18", ["avgpool"], r"layers='avgpool' gives \(2, 512, 1, 1\), not one"),
        (
            "tv:resnet18",
            ["layer1.0.relu"],
            "layers='layer1.0.relu' runs 2 times in a forward pass, not once: .* 'layer1.0'",
        ),
        ("tv:googlenet", ["aux1"], "layers='aux1' runs 0 times"),
        ("hrnet_w18_small", ["stage2"], r"gives \(2, 16, .*\) and \(2, 32, .*\), not one"),
        (
            "vit_tiny_patch16_224",
            ["blocks.3"],
            r"gives \(2, 321, 192\), not one .*: valid are 'patch_embed', .*; for a ViT's tokens "
            "as maps leave layers out and use out_indices",
        ),
        (
            "swin_tiny_patch4_window7_224",
            ["layers.0.blocks.0.attn"],  # windows
            "the nearest are 'layers.0.blocks.0', [^;]*$",
        ),
        ("Net", ["attention", "down"], r"layers='attention' gives \(2, 5120, 4\) and "),
        (
            "Net",
            ["aux"],
            r"layers=\['aux'\] did not all run: Net fails on images \(2, 3, 256, ",
        ),
    ],
)
def test_refusals(name, layers, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_layers(build(name), layers)


def test_a_mapping_names_the_outputs():
    model = build("resnet18")
    assert check_layers(model, {"layer3": "b", "layer1": "a"}) == {"layer3": "b", "layer1": "a"}
    assert not model.training and not any(p.is_meta for p in model.parameters())


def test_sizes_and_channels_that_the_model_takes():
    model = timm.create_model("vit_tiny_patch16_224", in_chans=1)
    layers = {"patch_embed.proj": "p4"}
    assert check_layers(model, layers, size=(224, 224), in_channels=1) == layers
    with pytest.raises(ValueError, match=r"fails on images \(2, 3, 256, 320\), Input height"):
        check_layers(timm.create_model("vit_tiny_patch16_224"), layers)
    # a MaxViT's windows of 7x7 look like maps of stride 32
    model = timm.create_model("maxvit_tiny_tf_224")
    with pytest.raises(ValueError, match=r"gives \(128, 7, 7, 64\)"):
        check_layers(model, ["stages.0.blocks.0.attn_block.attn"], size=(224, 224))
