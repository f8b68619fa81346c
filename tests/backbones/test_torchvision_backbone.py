"""TorchvisionBackbone: its levels are the outputs of the source model's own stages."""

import copy
import os
import subprocess
import sys

import pytest
import torch
import torchvision
from detbackbones import TorchvisionBackbone
from detbackbones.backbones.torchvision_source import TorchvisionSource, find_level_nodes
from detbackbones.config import without_weights
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from support import assert_close, images, randomise, trainable
from torchvision.models import ResNet18_Weights, ResNet50_Weights

# the modules whose outputs are res2 to res5, and the channels of these
MODELS = {
    "resnet18": ("layer1 layer2 layer3 layer4", (64, 128, 256, 512)),
    "regnet_y_400mf": (
        "trunk_output.block1 trunk_output.block2 trunk_output.block3 trunk_output.block4",
        (48, 104, 208, 440),
    ),
    "efficientnet_b0": ("features.2 features.3 features.5 features.8", (24, 40, 112, 1280)),
    "mobilenet_v3_large": ("features.3 features.6 features.12 features.16", (24, 40, 112, 960)),
    "convnext_tiny": ("features.1 features.3 features.5 features.7", (96, 192, 384, 768)),
    "densenet121": (
        "features.denseblock1 features.denseblock2 features.denseblock3 features",
        (256, 512, 1024, 1024),
    ),
    "vgg11_bn": ("features.13 features.20 features.27 features.28", (256, 512, 512, 512)),
    "swin_t": ("features.1 features.3 features.5 norm", (96, 192, 384, 768)),
}


def source_model(name):
    torch.manual_seed(0)
    return randomise(torchvision.models.get_model(name)).eval()


def levels_of_source(model, modules, x):
    outputs = []
    for module in modules.split():
        model.get_submodule(module).register_forward_hook(
            lambda _, args, output: outputs.append(output.clone())
        )
    model(x)
    return outputs


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("norm", ["", "FrozenBN"])
def test_levels_equal_those_of_the_source_model(name, norm):
    modules, channels = MODELS[name]
    source = source_model(name)
    backbone = TorchvisionBackbone(name, norm=norm).eval()
    assert backbone.load_source(source.state_dict())[1] == []
    shapes = backbone.output_shape()
    assert list(shapes) == ["res2", "res3", "res4", "res5"]
    assert [s.stride for s in shapes.values()] == [4, 8, 16, 32]
    assert tuple(s.channels for s in shapes.values()) == channels
    x = images(2, 3, 96, 64)
    with torch.no_grad():
        levels = backbone(x)
        expected = levels_of_source(source, modules, x)
    assert list(levels) == list(shapes)
    for (level, shape), reference in zip(shapes.items(), expected):
        if name == "swin_t":
            reference = reference.permute(0, 3, 1, 2)
        if name == "densenet121" and level == "res5":
            reference = reference.relu()  # follows the norm, as a function
        assert levels[level].shape == (2, shape.channels, 96 // shape.stride, 64 // shape.stride)
        assert_close(levels[level], reference)

    state = {k.removeprefix("model."): v for k, v in backbone.state_dict().items()}
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in state.items())
    assert not torchvision.models.get_model(name).load_state_dict(state, strict=False)[1]


def test_seed_gives_the_weights_of_torchvision():
    torch.manual_seed(3)
    source = torchvision.models.resnet18()
    torch.manual_seed(3)
    state = TorchvisionBackbone("resnet18").state_dict()
    assert torch.equal(state["model.layer4.1.conv2.weight"], source.layer4[1].conv2.weight)


def test_constants_of_the_graph_are_not_in_the_state_dict():
    source = torchvision.models.maxvit_t()
    backbone = TorchvisionBackbone("maxvit_t")
    assert backbone.load_source(source.state_dict())[1] == []
    for twin in (backbone, copy.deepcopy(backbone)):
        assert {k.removeprefix("model.") for k in twin.state_dict()} <= source.state_dict().keys()


RETURN_NODES = {"layer2": "res3", "layer3": "res4", "layer4": "res5"}


@pytest.mark.parametrize("order", [1, -1])
def test_return_nodes(order):
    nodes = dict(list(RETURN_NODES.items())[::order])
    source = source_model("resnet18")
    backbone = TorchvisionBackbone(model_name="resnet18", pretrained=False, return_nodes=nodes)
    backbone.eval().load_source(source.state_dict())
    assert {n: (s.channels, s.stride) for n, s in backbone.output_shape().items()} == {
        "res3": (128, 8),
        "res4": (256, 16),
        "res5": (512, 32),
    }
    x = images(1, 3, 64, 64)
    levels = backbone(x)
    assert list(levels) == ["res3", "res4", "res5"]
    for level, expected in zip(
        levels.values(), levels_of_source(source, "layer2 layer3 layer4", x)
    ):
        assert_close(level, expected)


def test_return_nodes_of_a_vit_whose_weights_are_of_another_size():
    with torch.device("meta"):
        backbone = TorchvisionBackbone("vit_h_14", return_nodes=["conv_proj"])
    assert backbone.size_divisibility == 224  # what it is built for without weights
    with torch.no_grad():
        maps = backbone.eval()(torch.empty(1, 3, 224, 224, device="meta"))
    assert maps["conv_proj"].shape == (1, 1280, 16, 16)


def test_return_nodes_and_out_features():
    backbone = TorchvisionBackbone(
        "resnet18",
        return_nodes=["layer1.0", "layer2", "layer4"],
        out_features=["layer2", "layer1.0"],
    )
    assert list(backbone.output_shape()) == ["layer1.0", "layer2"]
    assert not [key for key in backbone.state_dict() if key.startswith("model.layer3")]


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny"])
def test_later_stages_are_dropped_and_all_that_is_left_learns(name):
    whole = TorchvisionBackbone(name)
    backbone = TorchvisionBackbone(name, out_features=["res3", "res2"], model_kwargs={})
    assert list(backbone.output_shape()) == ["res2", "res3"]
    assert set(backbone.state_dict()) < set(whole.state_dict())
    sum(level.square().mean() for level in backbone(images(2, 3, 64, 64)).values()).backward()
    assert not [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None]


def test_layers_and_checkpoint_path(tmp_path):
    source = source_model("resnet18")
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    backbone = TorchvisionBackbone(
        "resnet18",
        layers={"layer3.0": "res4", "layer1": "fine"},
        checkpoint_path=str(tmp_path / "resnet18.pth"),
        freeze_at=2,
    ).eval()
    x = images(1, 3, 64, 64)
    levels = backbone(x)
    for level, expected in zip(levels.values(), levels_of_source(source, "layer1 layer3.0", x)):
        assert_close(level, expected)
    assert list(levels) == ["fine", "res4"]
    assert {name.partition(".")[0] for name in trainable(backbone)} == {"layer2", "layer3"}


def test_drop_path_rate():
    for name in ("convnext_tiny", "swin_t", "efficientnet_b0"):
        with torch.device("meta"):
            kinds = [TorchvisionBackbone(name), TorchvisionBackbone(name, drop_path_rate=0.3)]
            kinds.append(kinds[1].source.create())
        own, scaled, whole = (
            [m.p for m in model.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
            for model in kinds
        )
        assert max(whole) == pytest.approx(0.3)
        assert [b / max(scaled) for b in scaled] == pytest.approx([a / max(own) for a in own])
    with pytest.raises(ValueError, match="drop_path_rate=0.3 must be left out for resnet18"):
        TorchvisionBackbone("resnet18", drop_path_rate=0.3)


def test_deep_copy():
    backbone = TorchvisionBackbone("resnet18", freeze_at=2, norm="FrozenBN").train()
    twin = copy.deepcopy(backbone)
    assert trainable(twin) == trainable(backbone)
    x = images(1, 3, 64, 64)
    assert torch.equal(twin(x)["res5"], backbone(x)["res5"])
    with torch.no_grad():
        twin.get_parameter("model.conv1.weight").zero_()
    assert not torch.equal(twin(x)["res5"], backbone(x)["res5"])


def test_default_nodes_of_resnet():
    nodes = find_level_nodes(torchvision.models.resnet18())
    assert list(nodes) == ["res1", "res2", "res3", "res4", "res5"]
    assert nodes["res1"] == "relu" and nodes["res2"].startswith("layer1.1")


WRONG = [
    ({"model_name": "resnet81"}, "model_name='resnet81' .*'resnet18'"),
    ({"model_name": "fcos_resnet50_fpn"}, "model_name='fcos_resnet50_fpn' .*'resnet50'"),
    ({"norm": "GN"}, "norm='GN' is unknown: valid are '', 'FrozenBN'"),
    ({"weights": "V7"}, "weights='V7' is unknown: valid are 'IMAGENET1K_V1', 'DEFAULT'"),
    ({"weights": ResNet50_Weights.DEFAULT}, "weights='ResNet50_Weights.*'IMAGENET1K_V1'"),
    ({"out_features": ["res7"]}, r"out_features=\['res7'\] .* 'res1', .* 'res5'"),
    ({"out_features": []}, r"out_features=\[\] "),
    ({"return_nodes": {"layr2": "res3"}}, "return_nodes='layr2' is unknown: .* 'layer2'"),
    ({"return_nodes": {}}, "return_nodes={} must"),
    ({"return_nodes": {"layer2": "a", "layer3": "a"}}, "return_nodes=.* different names"),
    ({"return_nodes": {"avgpool": "a"}}, r"return_nodes={'avgpool': 'a'} .*\(2, 512, 1, 1\)"),
    ({"return_nodes": RETURN_NODES, "out_features": ["res2"]}, "'res2'.*'res3', 'res4', 'res5'"),
    ({"layers": ["layer2"], "return_nodes": ["layer3"]}, "layers=.* and return_nodes were given"),
    ({"layers": ["layr2"]}, "layers='layr2' is unknown: the nearest are 'layer2'"),
    ({"pretrained": "yes"}, "pretrained='yes' is unknown: valid are True, False"),
    ({"model_kwargs": {"weights": "DEFAULT"}}, "model_kwargs=.* must not have 'weights'"),
    ({"return_nodes": ["encoder"], "model_name": "vit_b_16"}, "return_nodes=.* cannot be levels"),
    ({"model_kwargs": {"nope": 1}}, "model_name='resnet18' cannot be built: .*'nope'"),
]


@pytest.mark.parametrize("arguments, message", WRONG)
def test_wrong_input(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        TorchvisionBackbone(**{"model_name": "resnet18", **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1", "ResNet18_Weights.IMAGENET1K_V1"])
def test_weights_from_the_cache(weights, tmp_path, monkeypatch):
    """The file that torchvision looks for, so nothing is downloaded."""
    source = source_model("resnet18")
    file = tmp_path / "hub" / "checkpoints" / os.path.basename(ResNet18_Weights.DEFAULT.url)
    file.parent.mkdir(parents=True)
    torch.save(source.state_dict(), file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    for arguments in ({"weights": weights}, {"pretrained": True}):
        state = TorchvisionBackbone("resnet18", **arguments).state_dict()
        assert torch.equal(
            state["model.layer3.0.bn1.running_var"], source.layer3[0].bn1.running_var
        )


def test_no_network(tmp_path):
    program = (
        "from detbackbones import TorchvisionBackbone\n"
        "try:\n    TorchvisionBackbone('resnet18', pretrained=True)\n"
        "except ConnectionError as error:\n    print(error)\n"
    )
    proxies = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    env = {**os.environ, **dict.fromkeys(proxies, "http://127.0.0.1:9"), "no_proxy": ""}
    env.update(TORCH_HOME=str(tmp_path), NO_PROXY="")
    out = subprocess.run(
        [sys.executable, "-c", program],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    sentence = out.splitlines()[-1]  # torch.hub says before it what it downloads
    assert sentence.startswith("the pretrained weights of 'resnet18' could not be downloaded")
    assert "pretrained=False" in sentence


@pytest.mark.parametrize(
    ("name", "weights"), [("googlenet", "DEFAULT"), ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1")]
)
def test_the_model_of_weights_without_them_is_the_same(name, weights):
    """What eval and --resume build is what was trained: an input transform, a size of images."""
    config = L(TorchvisionBackbone)(model_name=name, weights=weights, norm="FrozenBN")
    plain = without_weights(config)
    assert plain["weights"] == weights and plain["pretrained"] is False
    with torch.device("meta"):
        backbone = instantiate(plain)
    source = TorchvisionSource(name, weights=weights)
    if name == "googlenet":
        assert backbone.source.model.transform_input and source.model.transform_input
    else:
        assert backbone.model.encoder.pos_embedding.shape[1] == 577
