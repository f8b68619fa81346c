"""Which image sizes a model takes: found by running it, refused with a sentence."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from detbackbones import TimmBackbone, TorchvisionBackbone, build_pyramid
from detbackbones.measure.sizes import SizeRule, find_size_rule
from detectron2.structures import ImageList
from support import assert_close, images
from torch import nn


class Toy(nn.Module):
    """A level of the given stride; takes multiples of ``divisor``, or one size, or any size, and
    may resize every image to as many rows.
    """

    def __init__(self, stride, kernel=0, divisor=1, only=None, rows=0):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, kernel or stride, stride, kernel // 2)
        self.divisor, self.only, self.rows = divisor, only, rows * stride

    def forward(self, x):
        h, w = x.shape[-2:]
        if h % self.divisor or w % self.divisor or self.only not in (None, h):
            raise RuntimeError(f"no images of {h}x{w}")
        if self.rows:
            x = F.interpolate(x, (self.rows, self.rows))
        return [self.conv(x)]


@pytest.mark.parametrize(
    "toy, native, rule, stride",
    [
        (dict(stride=8), 224, SizeRule(8), 8),
        (dict(stride=32, kernel=3), 240, SizeRule(32), 32),  # 8 rows at 240, and not of stride 30
        (dict(stride=14, divisor=14), 518, SizeRule(14), 14),
        (dict(stride=32, divisor=224), 224, SizeRule(224), 32),
        (dict(stride=32, divisor=64), 256, SizeRule(64), 32),
        (dict(stride=32, divisor=96), 384, SizeRule(96), 32),
        (dict(stride=16, only=240), 240, SizeRule(240, 240), 16),
        (dict(stride=15), 230, SizeRule(16, resample=True), 16),
        (dict(stride=16, rows=14), 230, SizeRule(240, 240, resample=True), 16),
    ],
)
def test_find_size_rule(toy, native, rule, stride):
    found, index, trace = find_size_rule([lambda: Toy(**toy)], native)
    assert (found, index) == (rule, 0)
    (level,) = trace.levels
    assert (level.stride, level.resampled) == (stride, rule.resample)


def test_strides_that_are_no_powers_of_two():
    assert find_size_rule([lambda: Toy(12)], 240)[0] == SizeRule(12)
    rule, _, trace = find_size_rule([lambda: Toy(12)], 240, odd_strides=False)
    assert rule == SizeRule(16, resample=True)
    assert trace.levels[0].stride == 16 and trace.levels[0].resampled


def test_the_variant_that_takes_most_sizes():
    def fails():
        raise TypeError("no such argument")

    variants = [lambda: Toy(16, only=224), fails, lambda: Toy(16, divisor=32), lambda: Toy(16)]
    assert find_size_rule(variants, 224)[:2] == (SizeRule(16), 3)
    assert find_size_rule(variants[:3], 224)[:2] == (SizeRule(32), 2)
    assert find_size_rule(variants[:2], 224)[:2] == (SizeRule(224, 224), 0)
    assert find_size_rule(variants, 224, native_only=True)[:2] == (SizeRule(224, 224), 0)
    with pytest.raises(ValueError, match="^no such argument$"):
        find_size_rule([fails], 224)


def test_mvit_takes_its_own_size_alone():
    """It has tables of positions for one size, and on the meta device no index is out of range."""
    backbone = TimmBackbone("mvitv2_tiny", pretrained=False).eval()
    assert backbone.img_size == 224
    with torch.no_grad(), pytest.raises(ValueError, match="at most img_size=224"):
        backbone(torch.rand(1, 3, 256, 256))
    larger = TimmBackbone("mvitv2_tiny", pretrained=False, img_size=256).eval()
    with torch.no_grad():
        shapes = [tuple(level.shape) for level in larger(torch.rand(1, 3, 256, 256)).values()]
    assert shapes == [(1, 96, 64, 64), (1, 192, 32, 32), (1, 384, 16, 16), (1, 768, 8, 8)]


@pytest.mark.parametrize("divisor", [1, 14, 16, 32, 48, 64, 224, 384])
def test_a_probe_tells_a_divisor_from_its_multiples(divisor):
    h, w = SizeRule(divisor).probe
    assert h != w and math.gcd(h, w) in (divisor, 64)
    assert h % divisor == w % divisor == 0 and h >= 224


RULES = {  # model: size_divisibility, img_size, levels
    "vit_tiny_patch16_224": (16, None, {"res4": 16}),
    "swin_tiny_patch4_window7_224": (32, None, {"res2": 4, "res3": 8, "res4": 16, "res5": 32}),
    "maxvit_tiny_tf_224": (224, None, {"res2": 4, "res3": 8, "res4": 16, "res5": 32}),
    "vit_small_patch14_dinov2": (14, None, {"res4": 14}),
    "beit_base_patch16_224": (224, 224, {"res4": 16}),
    "mixer_s32_224": (224, 224, {"res5": 32}),
    "levit_128s": (224, 224, {"res4": 16, "res5": 32}),
    "tresnet_m": (32, None, {"res2": 4, "res3": 8, "res4": 16, "res5": 32}),
    "crossvit_9_240": (240, 240, {"res4": 16}),
    "gemma4_vit_167m": (16, None, {"res4": 16}),
}


@pytest.mark.parametrize("name", RULES)
def test_rules_of_timm_models(name):
    with torch.device("meta"):
        backbone = TimmBackbone(name)
    divisor, img_size, strides = RULES[name]
    assert (backbone.size_divisibility, backbone.img_size) == (divisor, img_size)
    assert {n: s.stride for n, s in backbone.output_shape().items()} == strides


@pytest.mark.parametrize(
    "name, divisor, img_size, resampled",
    [
        ("vit_b_32", 32, None, []),
        ("vit_h_14", 14, None, []),
        ("maxvit_t", 224, 224, []),
        ("alexnet", 32, None, ["res2", "res3", "res4", "res5"]),
        ("squeezenet1_1", 16, None, ["res2", "res3", "res4"]),
    ],
)
def test_rules_of_torchvision_models(name, divisor, img_size, resampled):
    with torch.device("meta"):
        backbone = TorchvisionBackbone(name)
    assert (backbone.size_divisibility, backbone.img_size) == (divisor, img_size)
    assert backbone.resampled == resampled


def padded(backbone, *sizes):
    """A batch as detectron2's meta-architectures make it."""
    return ImageList.from_tensors(
        [images(3, *size) for size in sizes],
        backbone.size_divisibility,
        padding_constraints=backbone.padding_constraints,
    ).tensor


def test_images_are_padded_to_whole_windows():
    backbone = TimmBackbone("maxvit_rmlp_pico_rw_256").eval()
    assert backbone.size_divisibility == 256
    batch = padded(backbone, (250, 333), (201, 300))
    assert batch.shape == (2, 3, 256, 512)
    assert backbone(batch)["res5"].shape == (2, 256, 8, 16)
    assert backbone(images(1, 3, 288, 256))["res5"].shape == (1, 256, 9, 8)  # by itself


def test_images_are_padded_to_the_only_size():
    backbone = TimmBackbone("levit_128s").eval()
    batch = padded(backbone, (100, 224))
    assert batch.shape == (1, 3, 224, 224)
    assert backbone(batch)["res5"].shape == (1, 256, 7, 7)
    for size in ((100, 225), (480, 640)):  # nothing is cut off
        with pytest.raises(ValueError, match="do not fit .* img_size=224"):
            backbone(padded(backbone, size))
    larger = TimmBackbone("levit_128s", img_size=640)
    assert (larger.img_size, larger.size_divisibility) == (640, 640)
    assert larger.eval()(padded(larger, (480, 640)))["res4"].shape == (1, 128, 40, 40)


def test_a_rule_is_that_of_the_levels_asked_for():
    backbone = TimmBackbone("resnet18", out_features=["res2"])
    assert backbone.size_divisibility == 4
    assert backbone(images(1, 3, 45, 30))["res2"].shape == (1, 64, 12, 8)  # as ResNet rounds
    backbone = TimmBackbone("hrnet_w18_small", out_features=["res2"]).eval()
    size = backbone.size_divisibility
    assert backbone(images(1, 3, 7 * size, 9 * size))["res2"].shape[-1] == 9 * size // 4


@pytest.mark.parametrize("name", ["inception_v3", "pit_ti_224"])
def test_maps_are_resampled_to_whole_strides(name):
    torch.manual_seed(0)
    source = timm.create_model(name).eval()
    backbone = TimmBackbone(name).eval()
    assert backbone.load_source(source.state_dict())[1] == []
    x = images(1, 3, 224, 224)
    with torch.no_grad():
        levels = backbone(x)
        maps = source.forward_intermediates(x, intermediates_only=True)
    for level, shape in backbone.output_shape().items():
        size = 224 // shape.stride
        assert levels[level].shape == (1, shape.channels, size, size)
        resampled = [
            F.interpolate(m, (size, size), mode="bilinear", align_corners=False)
            for m in maps
            if m.shape[1] == shape.channels
        ]
        assert min((m - levels[level]).abs().max() / m.abs().max() for m in resampled) < 1e-4
    assert "res3" in backbone.resampled


def test_patch_size_resamples_the_patch_embedding():
    name = "vit_small_patch14_reg4_dinov2"
    source = timm.create_model(name, img_size=28)
    backbone = TimmBackbone(name, patch_size=16, img_size=32).eval()
    assert backbone.output_shape()["res4"].stride == 16
    assert backbone.load_source(source.state_dict())[1] == []
    own = backbone.state_dict()
    assert own["model.patch_embed.proj.weight"].shape[-2:] == (16, 16)
    # the mean response to a constant image stays
    assert_close(
        own["model.patch_embed.proj.weight"].sum((2, 3)),
        source.patch_embed.proj.weight.sum((2, 3)),
    )
    key = "blocks.3.attn.qkv.weight"
    assert torch.equal(own["model." + key], source.state_dict()[key])
    assert backbone(images(1, 3, 48, 80))["res4"].shape == (1, 384, 3, 5)


def test_patch_size_keeps_the_grid_of_positions():
    with torch.device("meta"):
        backbone = TimmBackbone("vit_small_patch14_dinov2", patch_size=16)
    assert backbone.state_dict()["model.pos_embed"].shape == (1, 1 + 37 * 37, 384)
    assert backbone.size_divisibility == 16 and backbone.img_size is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model_name": "vit_tiny_patch16_224", "patch_size": 0}, "patch_size=0 must be a whole"),
        ({"model_name": "vit_tiny_patch16_224", "img_size": "64"}, "img_size='64' must be a whole"),
        ({"model_name": "resnet18", "patch_size": 16}, "patch_size=16 needs a ViT, and resnet18"),
        ({"model_name": "resnet18", "img_size": 256}, "'resnet18' cannot be built: .*img_size"),
    ],
)
def test_arguments_without_meaning(arguments, message):
    with pytest.raises(ValueError, match=message):
        TimmBackbone(**arguments)


def test_torchvision_img_size():
    with torch.device("meta"):
        assert TorchvisionBackbone("maxvit_t", img_size=448).img_size == 448
    with pytest.raises(ValueError, match="img_size=0 must be a whole number from 1"):
        TorchvisionBackbone("maxvit_t", img_size=0)
    with pytest.raises(ValueError, match="'vit_b_16' cannot be built: .* patch size"):
        TorchvisionBackbone("vit_b_16", img_size=300)
    with pytest.raises(ValueError, match="img_size=448 has no meaning for resnet18"):
        TorchvisionBackbone("resnet18", img_size=448)


ODD = {
    "resnet18": {},
    "vgg11": {},
    "convnext_atto": {},
    "swin_tiny_patch4_window7_224": {},
    "vit_tiny_patch16_224": {},
    "hrnet_w18_small": {},
    "dla34": {},
    "maxvit_rmlp_pico_rw_256": {},
    "coatnet_pico_rw_224": {"img_size": 160},
    "hiera_tiny_224": {"img_size": 224},
    "levit_128s": {},
}


@pytest.mark.parametrize("name", ODD)
def test_images_that_nobody_padded(name):
    """The maps are those of the image padded as detectron2 pads it, of ceil(size / stride)."""
    torch.manual_seed(0)
    backbone = TimmBackbone(name, **ODD[name]).eval()
    x = images(1, 3, 131, 157)
    whole = padded(backbone, (131, 157))
    whole[:] = 0
    whole[..., :131, :157] = x
    with torch.no_grad():
        ours, wanted = backbone(x), backbone(whole)
        pyramid = build_pyramid(backbone, out_channels=8).eval()(x)
    native = name in ("resnet18", "vgg11", "convnext_atto")  # they take any size, and round
    for level, shape in backbone.output_shape().items():
        height, width = -(-131 // shape.stride), -(-157 // shape.stride)
        if native:
            assert abs(ours[level].shape[2] - 131 / shape.stride) < 1
        else:
            assert ours[level].shape[2:] == (height, width)
            assert torch.equal(ours[level], wanted[level][..., :height, :width])
    for level in ("p2", "p3", "p4", "p5"):
        stride = 2 ** int(level[1])
        size = pyramid[level].shape
        if native:
            assert abs(size[2] - 131 / stride) < 1 and abs(size[3] - 157 / stride) < 1
        else:
            assert size[2:] == (-(-131 // stride), -(-157 // stride))
    images_at_once = images(2, 3, *whole.shape[2:])
    with torch.no_grad():
        for level in backbone(images_at_once).values():  # where nothing is to be padded
            assert level.shape[0] == 2
