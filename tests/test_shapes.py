"""A neck that is told its input's shapes fits any backbone, and no second backbone is built."""

import importlib.util
import socket
import sys

import pytest
import torch
from detbackbones import (
    FeatureBackbone,
    TimmBackbone,
    TorchvisionBackbone,
    build_pyramid,
    get_config,
)
from detbackbones.config import without_weights
from detbackbones.shapes import output_names, output_shapes
from detbackbones.training.overrides import apply_overrides
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import BasicStem, ResNet, SwinTransformer
from omegaconf import DictConfig
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

NO_DETREX = importlib.util.find_spec("detrex") is None


class Neck(nn.Module):
    """Levels of one width and coarser ones after them; shapes and names are given as in detrex."""

    def __init__(self, input_shapes, in_features, out_channels, num_outs):
        super().__init__()
        self.in_features = in_features
        channels = [input_shapes[name].channels for name in in_features]
        self.lateral = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in channels)
        inputs = [channels[-1]] + [out_channels] * num_outs
        self.coarser = nn.ModuleList(
            nn.Conv2d(c, out_channels, 3, stride=2, padding=1)
            for c in inputs[: num_outs - len(channels)]
        )

    def forward(self, levels):
        assert list(levels) == self.in_features
        x = levels[self.in_features[-1]]
        maps = [conv(levels[name]) for name, conv in zip(self.in_features, self.lateral)]
        for conv in self.coarser:
            x = conv(x)
            maps.append(x)
        return maps


class Detector(nn.Module):
    def __init__(self, backbone, neck, pixel_mean=None, pixel_std=None):
        super().__init__()
        self.backbone, self.neck, self.pixel_mean = backbone, neck, pixel_mean

    def forward(self, x):
        return self.neck(self.backbone(x))


def detector_config(backbone=None):
    """A config as detrex has them, with static shapes unless a backbone is given."""
    neck = L(Neck)(
        input_shapes={"res4": ShapeSpec(channels=16), "res5": ShapeSpec(channels=32)},
        in_features=["res4", "res5"],
        out_channels=8,
        num_outs=4,
    )
    model = L(Detector)(backbone=backbone, neck=neck)
    if backbone is not None:
        model.neck.input_shapes = L(output_shapes)(backbone={"config": "${....backbone}"})
        model.neck.in_features = L(output_names)(backbone={"config": "${....backbone}"})
    return DictConfig({"model": model}, flags={"allow_objects": True})


@pytest.fixture
def registered():
    """The parameters that modules get during a test."""
    parameters = []
    hook = register_module_parameter_registration_hook(
        lambda module, name, parameter: parameters.append(parameter)
    )
    yield parameters
    hook.remove()


@pytest.fixture
def offline(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError("a download was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))


def run(model, size=(64, 96)):
    """The strides of the neck's maps."""
    with torch.no_grad():
        maps = model.eval()(torch.zeros(1, 3, *size))
    assert all(m.shape[1] == 8 for m in maps)
    return [size[0] // m.shape[2] for m in maps]


BACKBONES = {
    "timm by index": (
        L(TimmBackbone)(model_name="test_resnet", out_indices=(1, 2, 3), norm="FrozenBN"),
        [4, 8, 16, 32],
    ),
    "timm by stride": (
        L(TimmBackbone)(model_name="test_efficientnet", out_features=["res3", "res5"], freeze_at=2),
        [8, 32, 64, 64],
    ),
    "a ViT alone": (L(TimmBackbone)(model_name="test_vit"), [16, 32, 64, 64]),
    "a ViT's pyramid": (
        L(build_pyramid)(bottom_up=L(TimmBackbone)(model_name="test_vit"), out_channels=16),
        [4, 8, 16, 32],
    ),
    "torchvision": (
        L(TorchvisionBackbone)(
            model_name="mobilenet_v3_small", out_features=["res3", "res4", "res5"], norm="FrozenBN"
        ),
        [8, 16, 32, 64],
    ),
    "torchvision by node": (
        L(TorchvisionBackbone)(
            model_name="resnet18", return_nodes={"layer2": "res3", "layer4": "last"}
        ),
        [8, 32, 64, 64],
    ),
    "detectron2's ResNet": (
        L(ResNet)(
            stem=L(BasicStem)(norm="FrozenBN"),
            stages=L(ResNet.make_default_stages)(depth=18, norm="FrozenBN"),
            out_features=["res3", "res4", "res5"],
        ),
        [8, 16, 32, 64],
    ),
    "detectron2's Swin": (
        L(SwinTransformer)(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1]),
        [4, 8, 16, 32],
    ),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_neck_fits_what_is_measured(name):
    backbone, strides = BACKBONES[name]
    cfg = detector_config(backbone)
    model = instantiate(cfg.model)
    assert run(model) == strides
    shapes = output_shapes(cfg.model.backbone)
    assert shapes == model.backbone.output_shape() == output_shapes(model.backbone)
    assert list(shapes) == list(model.backbone.output_shape()) == model.neck.in_features
    assert all(type(shape) is ShapeSpec for shape in shapes.values())
    assert [shape.stride for shape in shapes.values()] == strides[: len(shapes)]


@pytest.mark.parametrize(
    "name, words",
    [
        ("timm by index", ["model_name=convnext_atto", "norm=''"]),
        ("timm by index", ["model_name=test_resnet", "in_channels=3", "out_indices=[2, 4]"]),
        ("timm by index", ["model_name=vit_tiny_patch16_224", "norm=''"]),
        ("a ViT's pyramid", ["bottom_up.model_name=test_resnet"]),
        ("torchvision", ["model_name=shufflenet_v2_x0_5"]),
        ("torchvision", ["model_name=regnet_y_400mf"]),  # reads numbers out of tensors
    ],
)
def test_another_name_on_the_command_line_fits(name, words):
    cfg = detector_config(BACKBONES[name][0])
    before = output_shapes(cfg.model.backbone)
    apply_overrides(cfg, [f"model.backbone.{word}" for word in words])
    model = instantiate(cfg.model)
    shapes = model.backbone.output_shape()
    assert run(model, (224, 224))[: len(shapes)] == [shape.stride for shape in shapes.values()]
    assert name == "a ViT's pyramid" or shapes != before


@pytest.mark.parametrize("name", ["timm by index", "torchvision", "a ViT's pyramid"])
def test_no_second_backbone_is_built(registered, name):
    backbone = BACKBONES[name][0]
    torch.manual_seed(0)
    alone = instantiate(backbone)
    after_alone = torch.get_rng_state()
    once = sum(p.numel() for p in registered if not p.is_meta)

    torch.manual_seed(0)
    registered.clear()
    model = instantiate(detector_config(backbone).model)
    real = sum(p.numel() for p in registered if not p.is_meta)
    assert real == once + sum(p.numel() for p in model.neck.parameters())
    assert any(p.is_meta for p in registered)
    pairs = zip(alone.state_dict().values(), model.backbone.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)

    registered.clear()
    torch.set_rng_state(after_alone)
    output_shapes(backbone)
    assert registered and all(p.is_meta for p in registered)
    assert torch.equal(torch.get_rng_state(), after_alone)  # or a seed would mean other weights


@pytest.mark.parametrize(
    "backbone",
    [
        L(TimmBackbone)(model_name="test_resnet", pretrained=True, norm="FrozenBN", freeze_at=2),
        L(TimmBackbone)(model_name="test_vit", checkpoint_path="there/is/none.pth"),
        L(TorchvisionBackbone)(model_name="resnet18", weights="DEFAULT"),
        L(TorchvisionBackbone)(model_name="resnet18", pretrained=True),
        L(build_pyramid)(bottom_up=L(TimmBackbone)(model_name="test_vit", pretrained=True)),
    ],
)
def test_no_weights_are_fetched_or_read(offline, registered, backbone):
    before = DictConfig(backbone).copy()
    shapes = output_shapes({"config": backbone})
    assert backbone == before  # and they are when the backbone itself is built
    assert registered and all(p.is_meta for p in registered)
    assert shapes == instantiate(without_weights(backbone)).output_shape()


def test_the_config_of_a_backbone_may_point_outside_of_it():
    cfg = detector_config(L(TimmBackbone)(model_name="${name}", out_indices="${..indices}"))
    cfg.name, cfg.model.indices = "test_resnet", [0, 2]
    assert output_names(cfg.model.backbone) == ["p0", "p2"]
    assert output_shapes(cfg.model.neck.input_shapes.backbone)["p2"].stride == 8


def test_the_config_can_be_saved(tmp_path):
    cfg, file = detector_config(BACKBONES["timm by index"][0]), str(tmp_path / "config.yaml")
    LazyConfig.save(cfg, file)
    assert not (tmp_path / "config.yaml.pkl").exists()
    loaded = LazyConfig.load(file)
    apply_overrides(loaded, ["model.backbone.model_name=test_convnext", "model.backbone.norm=''"])
    assert run(instantiate(loaded.model)) == [8, 16, 32, 64]


def test_an_argument_that_is_built_first():
    cfg = detector_config(BACKBONES["timm by index"][0])
    cfg.model.neck.input_shapes = L(output_shapes)(backbone="${...backbone}")
    cfg.model.neck.in_features = L(output_names)(backbone="${...backbone}")
    assert run(instantiate(cfg.model)) == [4, 8, 16, 32]


DILATED = {"replace_stride_with_dilation": [False, False, True]}
NODES = {"layer2": "res3", "layer3": "res4", "layer4": "res5"}


@pytest.mark.parametrize(
    "backbone, expected",
    [
        (
            L(TimmBackbone)(model_name="resnet50", output_stride=16),
            {"res2": (256, 4), "res3": (512, 8), "res4": (1024, 16), "res5": (2048, 16)},
        ),
        (
            L(TimmBackbone)(
                model_name="resnet50", output_stride=16, out_indices=(2, 3, 4), norm="FrozenBN"
            ),
            {"p2": (512, 8), "p3": (1024, 16), "p4": (2048, 16)},
        ),
        (
            L(TimmBackbone)(model_name="resnet50", output_stride=8, out_features=["res4", "res5"]),
            {"res4": (1024, 8), "res5": (2048, 8)},
        ),
        (  # by its stride: the last of each
            L(TorchvisionBackbone)(model_name="resnet50", model_kwargs=DILATED),
            {"res2": (256, 4), "res3": (512, 8), "res4": (2048, 16)},
        ),
        (
            L(TorchvisionBackbone)(
                model_name="resnet50", model_kwargs=DILATED, return_nodes=NODES, norm="FrozenBN"
            ),
            {"res3": (512, 8), "res4": (1024, 16), "res5": (2048, 16)},
        ),
    ],
)
def test_dilated_stages_have_the_strides_of_their_maps(backbone, expected):
    shapes = output_shapes(backbone)
    assert {name: (s.channels, s.stride) for name, s in shapes.items()} == expected
    built = instantiate(backbone).eval()
    assert built.size_divisibility == max(stride for _, stride in expected.values())
    with torch.no_grad():
        maps = built(torch.zeros(1, 3, 48, 80))
    assert {n: tuple(m.shape[1:]) for n, m in maps.items()} == {
        name: (channels, 48 // stride, 80 // stride)
        for name, (channels, stride) in expected.items()
    }


class Net(Backbone):
    def __init__(self, reads_a_weight=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 2, stride=2)
        if reads_a_weight:
            self.first = self.conv.weight[0, 0, 0, 0].item()

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize(
    "backbone, message",
    [
        (5, "backbone=5 must be a detectron2 Backbone or the config of one"),
        ({"model_name": "resnet18"}, "backbone={'model_name': 'resnet18'} must be a"),
        (L(nn.Conv2d)(in_channels=3, out_channels=4, kernel_size=1), r"backbone=Conv2d\(.*must be"),
        (L(TimmBackbone)(model_name="resnet_18"), "model_name='resnet_18' is no timm model"),
        (
            L(Net)(reads_a_weight=True),
            "backbone=Net cannot be built on the meta device .*: write the",
        ),
    ],
)
def test_what_is_no_backbone(backbone, message):
    with pytest.raises(ValueError, match=message):
        output_shapes(backbone)


def test_a_module_of_ones_own():
    backbone = L(FeatureBackbone.from_module)(module=L(Net)(), layers={"conv": "res1"})
    assert output_shapes(backbone) == {"res1": ShapeSpec(channels=6, stride=2)}


CONFIGS = ["detrex/dino_timm_4scale_12ep.py", "detrex/dino_torchvision_4scale_12ep.py"]


@pytest.mark.skipif(not NO_DETREX, reason="detrex is there")
@pytest.mark.parametrize("name", CONFIGS)
def test_without_detrex_a_config_says_what_it_needs(name):
    with pytest.raises(ImportError) as error:
        get_config(name)
    message = str(error.value)
    assert "need detrex" in message and "PYTHONPATH" in message and "\n" not in message


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder laid out as detrex's, with the neck and the detector of this file."""
    project = tmp_path / "projects" / "dino"
    files = {
        "modeling/__init__.py": "",
        "configs/models/dino_r50.py": (
            f"from {__name__} import detector_config\nmodel = detector_config().model"
        ),
        "configs/dino-resnet/dino_r50_4scale_12ep.py": (
            "from ..models.dino_r50 import model\n"
            "dataloader = dict(evaluator=dict(output_dir='old'))\n"
            "lr_multiplier, optimizer = dict(), dict()\n"
            "train = dict(init_checkpoint='R-50.pkl', output_dir='old')\n"
        ),
    }
    for name, text in files.items():
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "projects"]:
        del sys.modules[name]


@pytest.mark.skipif(not NO_DETREX, reason="detrex is there")
@pytest.mark.parametrize("name, model_name", [*zip(CONFIGS, ["test_resnet", "mobilenet_v3_small"])])
def test_the_configs_fit_whatever_the_name(checkout, offline, name, model_name):
    cfg = get_config(name)
    assert cfg.keys() >= {"dataloader", "lr_multiplier", "model", "optimizer", "train"}
    assert cfg.train.init_checkpoint == ""
    assert cfg.dataloader.evaluator.output_dir == cfg.train.output_dir != "old"
    widths = [shape.channels for shape in instantiate(cfg.model.neck.input_shapes).values()]
    assert widths in ([256, 512, 1024], [512, 1024, 2048])
    weights = "pretrained=False" if "timm" in name else "weights=null"
    apply_overrides(cfg, [f"model.backbone.model_name={model_name}", f"model.backbone.{weights}"])
    model = instantiate(cfg.model)
    assert run(model) == [8, 16, 32, 64]
    assert len(model.pixel_mean) == 3 and model.pixel_mean[0] > 1
