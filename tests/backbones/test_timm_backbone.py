"""TimmBackbone: its levels are the source model's own, whatever the family."""

import copy
import os
import subprocess
import sys

import detectron2.layers
import pytest
import timm
import torch
import torchvision
from detbackbones import TimmBackbone
from safetensors.torch import save_file
from support import assert_close, images, randomise, trainable
from timm.models import save_for_hf
from torch import nn

# channels of res2 to res5, and what lets the source model itself take small images
MODELS = {
    "resnet18": ((64, 128, 256, 512), {}),
    "resnet50": ((256, 512, 1024, 2048), {}),
    "regnety_002": ((24, 56, 152, 368), {}),
    "efficientnet_b0": ((24, 40, 112, 320), {}),
    "tf_efficientnet_b0": ((24, 40, 112, 320), {}),
    "mobilenetv3_large_100": ((24, 40, 112, 960), {}),
    "convnext_atto": ((40, 80, 160, 320), {}),
    "densenet121": ((256, 512, 1024, 1024), {}),
    "vgg11_bn": ((256, 512, 512, 512), {}),
    "swin_tiny_patch4_window7_224": ((96, 192, 384, 768), {"strict_img_size": False}),
    "vit_tiny_patch16_224": ((None, None, 192, None), {"dynamic_img_size": True}),
    "hrnet_w18_small": ((128, 256, 512, 1024), {}),
}


def expected_levels(name):
    channels = MODELS[name][0]
    return {f"res{n}": (c, 2**n) for n, c in enumerate(channels, start=2) if c}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The source model with telling weights, and the file of its state dict."""
    folder = tmp_path_factory.mktemp("checkpoints")
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            model = randomise(timm.create_model(name, **MODELS.get(name, ((), {}))[1])).eval()
            path = str(folder / f"{name}.{'pth' if len(made) % 2 else 'safetensors'}")
            save = torch.save if path.endswith("pth") else save_file
            save(model.state_dict(), path)
            made[name] = model, path
        return made[name]

    return get


def levels_of_source(model, x):
    """The last of timm's own intermediate maps at each stride from 4 to 32."""
    if hasattr(model, "forward_intermediates"):
        maps = model.forward_intermediates(x, intermediates_only=True, output_fmt="NCHW")
    else:  # timm's own extractor then
        extractor = timm.create_model(model.pretrained_cfg["architecture"], features_only=True)
        extractor.load_state_dict(model.state_dict(), strict=False)
        maps = extractor.eval()(x)
    by_stride = {x.shape[-1] // m.shape[-1]: m for m in maps}
    return {f"res{n}": by_stride[2**n] for n in range(2, 6) if 2**n in by_stride}


@pytest.mark.parametrize("name", MODELS)
def test_levels_equal_those_of_the_source_model(name, checkpoint):
    source, path = checkpoint(name)
    x = images(2, 3, 96, 64)
    with torch.no_grad():
        expected = levels_of_source(source, x)
        for norm in ("", "FrozenBN"):
            backbone = TimmBackbone(name, checkpoint_path=path, norm=norm).eval()
            shapes = backbone.output_shape()
            assert {n: (s.channels, s.stride) for n, s in shapes.items()} == expected_levels(name)
            levels = backbone(x)
            assert list(levels) == list(shapes) == list(expected)
            for level, shape in shapes.items():
                size = (2, shape.channels, 96 // shape.stride, 64 // shape.stride)
                assert levels[level].shape == size
                assert_close(levels[level], expected[level])
    if name not in ("swin_tiny_patch4_window7_224",):  # the only one that drops paths by default
        for level, again in backbone.train()(x).items():
            assert_close(again, levels[level])


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_has_the_keys_of_the_source_model(name, checkpoint, tmp_path):
    source, path = checkpoint(name)
    backbone = TimmBackbone(name, checkpoint_path=path, norm="FrozenBN")
    state = backbone.state_dict()
    own = source.state_dict()
    assert all(key.startswith("model.") for key in state)
    state = {key.removeprefix("model."): value for key, value in state.items()}
    assert all(torch.equal(value, own[key]) for key, value in state.items())

    fresh = timm.create_model(name)
    missing, unexpected = fresh.load_state_dict(state, strict=False)
    assert not unexpected
    used = {key.partition(".")[0] for key in state} - {"features"}
    assert not [k for k in missing if k.partition(".")[0] in used and "num_batches" not in k]

    torch.save(state, tmp_path / "backbone.pth")  # a trained backbone has no classifier
    again = TimmBackbone(name, checkpoint_path=str(tmp_path / "backbone.pth"))
    for key, value in again.state_dict().items():
        assert key.endswith("num_batches_tracked") or torch.equal(value, backbone.state_dict()[key])


def test_deep_copies_are_whole_and_apart(checkpoint):
    backbone = TimmBackbone("convnext_atto", freeze_at=2)
    twin = copy.deepcopy(backbone).train()
    assert list(twin.state_dict()) == list(backbone.state_dict())
    assert trainable(twin) == trainable(backbone)
    before = backbone.state_dict()["model.stages.3.blocks.0.gamma"].clone()
    twin.load_source(checkpoint("convnext_atto")[0].state_dict())
    with torch.no_grad():
        twin.get_parameter("model.stages.3.blocks.0.gamma").zero_()
    assert twin.state_dict()["model.stages.3.blocks.0.gamma"].eq(0).all()
    assert backbone.state_dict()["model.stages.3.blocks.0.gamma"].equal(before)
    assert not backbone.state_dict()["model.stem.0.weight"].equal(
        twin.state_dict()["model.stem.0.weight"]
    )


def test_images_of_any_size():
    backbone = TimmBackbone("vit_tiny_patch16_224").eval()
    for h, w in ((32, 48), (240, 224)):
        assert backbone(images(1, 3, h, w))["res4"].shape == (1, 192, h // 16, w // 16)


@pytest.mark.parametrize(
    "norm_layer",
    [
        detectron2.layers.FrozenBatchNorm2d,
        torchvision.ops.FrozenBatchNorm2d,
        "detectron2.layers.FrozenBatchNorm2d",
    ],
)
def test_config_written_for_detrex(norm_layer):
    backbone = TimmBackbone(
        model_name="resnet152d",
        features_only=True,
        pretrained=False,
        in_channels=3,
        out_indices=(1, 2, 3),
        norm_layer=norm_layer,
    )
    shapes = backbone.output_shape()
    assert {n: (s.channels, s.stride) for n, s in shapes.items()} == {
        "p1": (256, 4),
        "p2": (512, 8),
        "p3": (1024, 16),
    }
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in backbone.modules())
    assert "model.layer4.0.conv1.weight" not in backbone.state_dict()


def test_out_indices_name_what_timm_gives(checkpoint):
    source, path = checkpoint("resnet18")
    x = images(1, 3, 64, 64)
    maps = source.forward_intermediates(x, intermediates_only=True)
    levels = TimmBackbone("resnet18", out_indices=(-1, 1), checkpoint_path=path).eval()(x)
    assert list(levels) == ["p1", "p4"]
    assert_close(levels["p1"], maps[1])
    assert_close(levels["p4"], maps[4])


@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch16_dinov3"])
def test_depths_and_norm_of_a_vit(name):
    torch.manual_seed(0)
    kwargs = {"depth": 8, "embed_dim": 64, "num_heads": 2}
    backbone = TimmBackbone(
        name, out_depths=[1, 0.5, 0.2], final_norm=True, img_size=64, model_kwargs=kwargs
    ).eval()
    source = timm.create_model(name, img_size=64, **kwargs).eval()
    for module in source.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    backbone.model.load_state_dict(source.state_dict(), strict=False)
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        expected = source.forward_intermediates(x, norm=True, intermediates_only=True)
        levels = backbone(x)
    assert list(levels) == ["p1", "p3", "p7"]
    for level, index in zip(levels.values(), (1, 3, 7)):
        assert_close(level, expected[index])


def test_layers_by_name(checkpoint):
    source, path = checkpoint("resnet18")
    layers = {"layer3.0": "res4", "layer1": "fine"}
    backbone = TimmBackbone("resnet18", layers=layers, checkpoint_path=path, norm="FrozenBN")
    assert {n: (s.channels, s.stride) for n, s in backbone.output_shape().items()} == {
        "fine": (64, 4),
        "res4": (256, 16),
    }
    assert backbone.size_divisibility == 16
    assert {key.removeprefix("model.") for key in backbone.state_dict()} < set(source.state_dict())
    assert not [key for key in backbone.state_dict() if key.startswith("model.layer4")]
    x = images(2, 3, 64, 96)
    expected = []
    for name in ("layer1", "layer3.0"):
        source.get_submodule(name).register_forward_hook(lambda m, a, y: expected.append(y))
    with torch.no_grad():
        levels = backbone.eval()(x)
        source(x)
    assert_close(levels["fine"], expected[0])
    assert_close(levels["res4"], expected[1])
    sum(level.square().mean() for level in backbone.train()(x).values()).backward()
    assert not [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize(
    "name, last",
    [
        ("resnet18", "layer4"),
        ("convnext_atto", "stages.3"),
        ("swin_tiny_patch4_window7_224", "layers.3"),
    ],
)
@pytest.mark.parametrize("freeze_at", [1, 2, 3])
def test_freeze_at_is_the_same_for_layers_by_name(name, last, freeze_at):
    by_name = TimmBackbone(name, layers=[last], freeze_at=freeze_at)
    by_stride = TimmBackbone(name, freeze_at=freeze_at)
    assert trainable(by_name) == trainable(by_stride)
    norms = [type(m) for m in by_name.modules() if type(m).__name__.rstrip("12d").endswith("Norm")]
    assert norms and norms == [
        type(m) for m in by_stride.modules() if type(m).__name__.rstrip("12d").endswith("Norm")
    ]


@pytest.mark.parametrize(
    "name",
    ["resnet18", "efficientnet_b0", "mobilenetv3_large_100", "swin_tiny_patch4_window7_224"],
)
def test_later_stages_are_not_built_and_all_that_is_learns(name):
    whole = TimmBackbone(name)
    backbone = TimmBackbone(name, out_features=["res4", "res3"])
    assert list(backbone.output_shape()) == ["res3", "res4"] and backbone.size_divisibility == 16
    assert set(backbone.state_dict()) < set(whole.state_dict())
    sum(level.square().mean() for level in backbone(images(2, 3, 64, 64)).values()).backward()
    assert not [n for n, p in backbone.named_parameters() if p.requires_grad and p.grad is None]


def test_output_stride():
    dilated = TimmBackbone("resnet18", model_kwargs={"output_stride": 16})
    assert dilated.output_shape()["res5"].stride == 16
    shapes = TimmBackbone("resnet18", output_stride=16).output_shape()
    assert {n: s.stride for n, s in shapes.items()} == {
        "res2": 4,
        "res3": 8,
        "res4": 16,
        "res5": 16,
    }
    backbone = TimmBackbone("resnet18", output_stride=16).eval()
    assert backbone.size_divisibility == 16
    assert backbone(images(1, 3, 48, 48))["res5"].shape == (1, 512, 3, 3)


@pytest.mark.parametrize("in_channels", [1, 4])
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224"])
def test_weights_are_adapted_to_in_channels(name, in_channels, checkpoint):
    source, path = checkpoint(name)
    key = source.pretrained_cfg["first_conv"] + ".weight"
    backbone = TimmBackbone(name, in_channels=in_channels, checkpoint_path=path)
    weight, original = backbone.state_dict()["model." + key], source.state_dict()[key]
    if in_channels == 1:
        assert_close(weight, original.sum(1, keepdim=True))
    else:
        assert_close(weight, original[:, [0, 1, 2, 0]] * 3 / 4)
    assert backbone.eval()(images(1, in_channels, 32, 32))


def test_drop_path_rate_and_model_kwargs():
    backbone = TimmBackbone(
        "convnext_atto", drop_path_rate=0.3, model_kwargs={"dims": (8, 16, 24, 32)}
    )
    assert [s.channels for s in backbone.output_shape().values()] == [8, 16, 24, 32]
    drops = [m.drop_prob for m in backbone.modules() if type(m).__name__ == "DropPath"]
    assert max(drops) == pytest.approx(0.3)


def test_local_dir(tmp_path):
    source = randomise(timm.create_model("resnet18"))
    save_for_hf(source, str(tmp_path), safe_serialization=True)
    backbone = TimmBackbone(f"local-dir:{tmp_path}", pretrained=True)
    assert [s.channels for s in backbone.output_shape().values()] == [64, 128, 256, 512]
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, source.state_dict()[key.removeprefix("model.")])
    assert (
        not TimmBackbone(f"local-dir:{tmp_path}")
        .state_dict()["model.conv1.weight"]
        .equal(source.state_dict()["conv1.weight"])
    )


WRONG = [
    ({"model_name": "resnet81"}, "model_name='resnet81' .*'resnet18'"),
    ({"model_name": "resnet18.nope"}, "model_name='resnet18.nope' .*'resnet18.a1_in1k'"),
    ({"model_name": "nope:resnet18"}, "'nope:resnet18', valid sources: hf-hub, local-dir"),
    ({"model_name": "local-dir:/no/such"}, "model_name='local-dir:/no/such' .* not found"),
    ({"layers": ["layr2"]}, "layers='layr2' is unknown: the nearest are 'layer2'"),
    ({"layers": ["layer2"], "out_indices": [1]}, "out_indices=.* and layers=.* together: use one"),
    ({"out_depths": [0.5], "out_indices": [1]}, "out_indices=.* and out_depths=.* use one"),
    ({"out_depths": [0.5]}, r"out_depths=\[0.5\] needs a plain ViT.* and resnet18 is none"),
    ({"model_name": "test_vit", "out_depths": [1.5]}, r"=\[1.5\] must be .* above 0, up to 1"),
    ({"model_name": "test_vit", "out_depths": [True]}, r"=\[True\] must be a list of numbers"),
    ({"model_name": "test_vit", "out_depths": 1}, "out_depths=1 must be a list of numbers"),
    ({"model_name": "test_vit", "out_depths": [0.95, 1]}, r"out_depths=\[0.95, 1\] .* different"),
    ({"final_norm": True}, "final_norm=True needs a plain ViT with a norm .* resnet18 has none"),
    (
        {"model_name": "eva02_tiny_patch14_224", "final_norm": True},
        "final_norm=True needs .* eva02_tiny_patch14_224 has none",
    ),
    ({"final_norm": "LN"}, "final_norm='LN' is unknown: valid are True, False"),
    ({"layers": ["layer2"], "final_norm": True}, "final_norm=True and layers=.* use one"),
    ({"layers": ["fc"]}, r"layers='fc' gives \(2, 1000\), not one feature map"),
    ({"norm": "GN"}, "norm='GN' is unknown: valid are '', 'FrozenBN', 'SyncBN', 'BN'"),
    ({"norm_layer": nn.LayerNorm}, "norm_layer=.*LayerNorm.* valid are 'FrozenBatchNorm2d'"),
    ({"out_features": ["res7"]}, r"out_features=\['res7'\] .* 'res1', .* 'res5'"),
    ({"out_features": ["res2", "res2"]}, r"out_features=\['res2', 'res2'\] must be different"),
    ({"out_features": []}, r"out_features=\[\] "),
    ({"out_indices": (1, 5)}, r"out_indices=\[1, 5\] .* resnet18, 0 to 4"),
    ({"out_indices": (1, -4)}, r"out_indices=\[1, -4\] must be different"),
    ({"out_indices": ()}, r"out_indices=\[\] .* 0 to 4"),
    ({"out_indices": 2}, "out_indices=2 must be a list of whole numbers"),
    ({"out_indices": ("res2",)}, "out_indices=.'res2',. must be a list of whole numbers"),
    (
        {"out_features": ["res2"], "out_indices": (1,)},
        "out_features=.* and out_indices=.* use one",
    ),
    ({"features_only": False}, "features_only=False is not possible"),
    ({"in_channels": 0}, "in_channels=0 must be .* from 1"),
    ({"in_channels": 2.5}, "in_channels=2.5 must be .* from 1"),
    ({"output_stride": 5}, "output_stride=5 is unknown: valid are 8, 16, 32"),
    ({"model_name": "vgg11", "output_stride": 16}, "'vgg11' cannot be built: .*output_stride"),
    ({"model_name": "vgg11", "drop_path_rate": 0.1}, "'vgg11' cannot be built: .*drop_path_rate"),
    ({"model_kwargs": {"in_channels": 4}}, "model_kwargs=.* must not have 'in_channels'"),
    ({"model_kwargs": {"nope": 1}}, "model_name='resnet18' cannot be built: .*'nope'"),
]


@pytest.mark.parametrize("arguments, message", WRONG)
def test_wrong_input(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        TimmBackbone(**{"model_name": "resnet18", **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, other",
    [
        ("resnet18", "convnext_atto"),
        ("convnext_atto", "resnet18"),
        ("swin_tiny_patch4_window7_224", "resnet18"),
        ("vit_tiny_patch16_224", "convnext_atto"),
        ("resnet34", "resnet18"),
        ("resnet18", "resnet34"),  # has every tensor of the right shape, and more
        ("vit_small_patch16_224", "vit_tiny_patch16_224"),
    ],
)
def test_checkpoint_of_another_architecture(name, other, checkpoint):
    path = checkpoint(other)[1]
    with pytest.raises(ValueError, match=f"checkpoint_path='{path}' is not of {name}: "):
        TimmBackbone(name, checkpoint_path=path)


OFFLINE = {
    **dict.fromkeys(
        ("HF_ENDPOINT", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"),
        "http://127.0.0.1:9",
    ),
    **dict.fromkeys(("no_proxy", "NO_PROXY", "HF_HUB_OFFLINE"), ""),
}


@pytest.mark.parametrize("call", ["'resnet18', pretrained=True", "'hf-hub:timm/resnet18.a1_in1k'"])
def test_no_network(call, tmp_path):
    program = (
        f"from detbackbones import TimmBackbone\nimport time\nstart = time.time()\n"
        f"try:\n    TimmBackbone({call})\n"
        "except ConnectionError as error:\n    print(time.time() - start, error)\n"
    )
    env = {**os.environ, **OFFLINE, "HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path)}
    out = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    ).stdout
    seconds, _, sentence = out.strip().partition(" ")
    assert float(seconds) < 15
    assert "resnet18" in sentence and "checkpoint_path" in sentence and "\n" not in sentence
